"""Write transmla/data/synthetic.txt and continued.txt: what an instruct model answers to requests of many kinds, what
it writes when it starts with a random token, and how it goes on where pieces of a text stop.

Calibration text for whatever an encyclopedia does not contain, and more text like one.
It is kept word for word, with the "# TODO" lines that the model writes into its code: what it predicts is the point.

    python benchmarks/synthetic.py MODEL [--out transmla/data] [--text transmla/data/wikitext2-train-excerpt.txt]
    python benchmarks/synthetic.py MODEL --chats FOLDER

The second writes chats instead, the answers to requests that no text that ships has: train.jsonl and
held-out.txt.

The texts that ship were drawn in another order of batches (the long ones in turns), so a new run writes other texts of
the same kinds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transmla.devices import narrow_dtype

KINDS = (
    "Write a short story for small children about {}.",
    "Write a Python function that has to do with {}. Only code with comments.",
    "Write a C program that has to do with {}. Only code.",
    "Write a JavaScript class for an application about {}. Only code.",
    "Write a news article about {}.",
    "Write a blog post with tips about {}.",
    "Write a dialogue between two friends about {}.",
    "Write an advertisement of a small company that sells something for {}.",
    "Write the beginning of a novel in which {} matters.",
    "Explain {} to a student, step by step.",
    "Write a formal letter about {}.",
    "Write questions and answers about {}.",
    "Write an HTML page about {}. Only code.",
    "Write a review of a product for {}.",
    "Write a mathematical word problem about {} and solve it.",
    "Write a forum post of somebody who needs help with {}, and a reply.",
    "Write an email to a customer about {}.",
    "Write a Python class with docstrings that models {}. Only code.",
    "Write documentation of a command line program for {}, with examples.",
    "Write a shell script or a configuration file that has to do with {}. Only the file.",
    "Write a SQL schema and three queries about {}. Only code.",
    "Write a page of a web shop that sells things for {}.",
    "Write a diary entry in which {} matters.",
    "Write a recipe or instructions in numbered steps that have to do with {}.",
    "Write the terms and conditions of a service for {}.",
    "Write a short biography of an invented person who is known for {}.",
    "Write a summary of a scientific paper about {}.",
    "Write a travel report or event announcement about {}.",
)
TOPICS = (
    "a lost dog", "the weather", "cooking soup", "a school trip", "bank accounts", "a birthday party", "football",
    "sorting numbers", "old bicycles", "a visit to the doctor", "music lessons", "saving energy", "a garden",
    "travel by train", "a shopping list", "mountains", "the stock market", "phones", "winter clothes",
    "a broken window", "history homework", "photographs", "healthy food", "rivers and boats", "a new neighbour",
    "taxes", "a calendar", "moving house", "cats", "an election", "learning English", "a small robot",
)  # fmt: skip
DATA = Path(__file__).parents[1] / "transmla/data"
BATCH = 64
# requests that the texts that ship have answers to
SHIPPED = 704
# tokens of a text: short ones, which show more, and long ones, in which there is more to look back at
SHORT, LONG = 256, 448
PROMPT = 64


class Writer:
    """Texts of one model, sampled in batches."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        dtype = narrow_dtype(torch.device("cpu")) or torch.float32
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def answers(self, requests: list[str], length: int) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(requests), BATCH):
            chats = [[{"role": "user", "content": request}] for request in requests[start : start + BATCH]]
            prompts = [
                self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
            ]
            given = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            texts += self._words(self._sample(given.input_ids, given.attention_mask, length))
        return texts

    def from_random_tokens(self, count: int, length: int) -> list[str]:
        texts: list[str] = []
        for _ in range(0, count, BATCH):
            ids = torch.randint(len(self.tokenizer), (BATCH, 1))
            texts += self._words(torch.cat([ids, self._sample(ids, torch.ones_like(ids), length)], dim=1))
        return texts

    def continuations(self, text: str, count: int, length: int) -> list[str]:
        """Of random pieces of the text, without these."""
        ids_N = torch.tensor(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        texts: list[str] = []
        for _ in range(0, count, BATCH):
            starts = torch.randint(len(ids_N) - PROMPT, (BATCH,)).tolist()
            ids = torch.stack([ids_N[start : start + PROMPT] for start in starts])
            texts += self._words(self._sample(ids, torch.ones_like(ids), length))
        return texts

    def _sample(self, ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        """What follows, alone."""
        with torch.no_grad():
            found: torch.Tensor = self.model.generate(
                ids, attention_mask=mask, do_sample=True, temperature=0.9, top_k=500, top_p=1.0, max_new_tokens=length,
                pad_token_id=self.model.config.eos_token_id,
            )  # fmt: skip
        return found[:, ids.shape[1] :]

    def _words(self, ids: torch.Tensor) -> list[str]:
        print(f"{len(ids)} texts", flush=True)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts


def joined(texts: list[str], seed: int) -> str:
    """One behind the other, in random order."""
    random.Random(seed).shuffle(texts)
    clean = (text.replace("\ufffd", "").replace("\r\n", "\n").replace("\r", "\n").strip() for text in texts)
    return "\n\n".join(text for text in clean if text) + "\n"


def write_chats(requests: list[str], writer: Writer, folder: Path) -> None:
    """Rows of `messages` to train on; every sixth chat goes through the template into a text that is held out."""
    answers = writer.answers(requests, LONG)
    chats = [
        [{"role": "user", "content": request}, {"role": "assistant", "content": answer.strip()}]
        for request, answer in zip(requests, answers, strict=True)
        if answer.strip()
    ]
    held_out = [str(writer.tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats[::6]]
    del chats[::6]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "held-out.txt").write_text("".join(held_out), encoding="utf-8")
    rows = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (folder / "train.jsonl").write_text("".join(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--text", type=Path, default=DATA / "wikitext2-train-excerpt.txt")
    parser.add_argument("--chats", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    writer = Writer(arguments.model)
    requests = [kind.format(topic) for kind, topic in itertools.product(KINDS, TOPICS)]
    random.Random(0).shuffle(requests)
    torch.manual_seed(0)
    if arguments.chats:
        write_chats(requests[SHIPPED:], writer, arguments.chats)
        return
    short = joined(writer.answers(requests[:512], SHORT) + writer.from_random_tokens(64, SHORT), seed=1)
    torch.manual_seed(1)
    long = joined(writer.answers(requests[512:SHIPPED], LONG) + writer.from_random_tokens(64, LONG), seed=2)
    (arguments.out / "synthetic.txt").write_text(f"{short}\n{long}", encoding="utf-8")
    continued = writer.continuations(arguments.text.read_text(encoding="utf-8"), 320, LONG)
    (arguments.out / "continued.txt").write_text(joined(continued, seed=1), encoding="utf-8")


if __name__ == "__main__":
    main()
