"""Write transmla/data/synthetic.txt: what an instruct model answers to requests of many kinds, and what it writes when
it starts with a random token. Calibration text for whatever an encyclopedia does not contain.
It is kept word for word, with the "# TODO" lines that the model writes into its code: what it predicts is the point.

    python benchmarks/synthetic.py MODEL [--answers 512] [--random 64] [--out transmla/data/synthetic.txt]
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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
LENGTH, BATCH = 256, 64


def sample(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Continuations alone."""
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=0.9, top_k=500, top_p=1.0, max_new_tokens=LENGTH,
            pad_token_id=model.config.eos_token_id,
        )  # fmt: skip
    return found[:, ids.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--answers", type=int, default=512)
    parser.add_argument("--random", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "transmla/data/synthetic.txt")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    requests = [kind.format(topic) for kind, topic in itertools.product(KINDS, TOPICS)]
    random.Random(0).shuffle(requests)
    texts: list[str] = []
    for start in range(0, arguments.answers, BATCH):
        chats = [[{"role": "user", "content": request}] for request in requests[start : start + BATCH]]
        prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        given = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        found = sample(model, given.input_ids, given.attention_mask)
        texts += tokenizer.batch_decode(found, skip_special_tokens=True)
        print(f"{len(texts)} texts", flush=True)
    for start in range(0, arguments.random, BATCH):
        ids = torch.randint(len(tokenizer), (min(BATCH, arguments.random - start), 1))
        continued = torch.cat([ids, sample(model, ids, torch.ones_like(ids))], dim=1)
        texts += tokenizer.batch_decode(continued, skip_special_tokens=True)
        print(f"{len(texts)} texts", flush=True)
    random.Random(1).shuffle(texts)
    clean = (text.replace("\ufffd", "").replace("\r\n", "\n").replace("\r", "\n").strip() for text in texts)
    arguments.out.write_text("\n\n".join(text for text in clean if text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
