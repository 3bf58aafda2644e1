"""Write transmla/data/stories.txt: what stories260k, the model that ships with the program, writes by itself.

Calibration text of its recipe. `--calibration self` draws such text at every conversion, and draws other text on every
kind of CPU: one logit that is rounded differently is another word, and all that follows is another story. Written once,
it is the same for everybody. It is kept word for word, with the mistakes that a model of this size makes.

    python benchmarks/stories.py [--out transmla/data/stories.txt]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from transmla.model.loading import load_any, load_tokenizer

OUT = Path(__file__).parents[1] / "transmla/data/stories.txt"
MODEL = "stories260k"
# three times what the recipe asks for; a text is as long as the model can read
TOKENS, LENGTH, BATCH, SEED = 100_000, 512, 64, 0


@torch.no_grad()
def sample(model: Any, prompt_BP: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """Each prompt and its continuation at temperature 1, int64 [B, length] on the CPU: how the program itself sampled
    when the stories were written, with all texts drawing from one generator.

    The most likely token under Gumbel noise is a sample (Maddison et al., 1411.0030).
    """
    cache = StaticCache(config=model.config, max_cache_len=length)
    ids = prompt_BP
    step = prompt_BP.to(model.device)
    for _ in range(length - prompt_BP.shape[1]):
        logits_BV = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float().cpu()
        noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
        next_B1 = (logits_BV - noise_BV.log_()).argmax(-1, keepdim=True)
        ids = torch.cat([ids, next_B1], dim=1)
        step = next_B1.to(model.device)
    return ids


def texts(tokens: int) -> Iterator[list[int]]:
    """Token ids that follow the begin token; in float64, so that few CPUs could disagree about one."""
    model = load_any(MODEL).double()
    generator = torch.Generator().manual_seed(SEED)
    done = 0
    while done < tokens:
        count = min(BATCH, 1 + (tokens - done) // LENGTH)
        begin_B1 = torch.full((count, 1), model.config.bos_token_id)
        yield from sample(model, begin_B1, LENGTH, generator).tolist()
        done += count * LENGTH


def stories(tokens: int = TOKENS) -> str:
    """One behind the other. Where a story ends before its text does, the model begins the next one by itself."""
    tokenizer = load_tokenizer(MODEL)
    begin = tokenizer.bos_token_id
    found = []
    for ids in texts(tokens):
        starts = [place for place, token in enumerate(ids) if token == begin]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            text = tokenizer.decode(ids[start:end], skip_special_tokens=True)
            found.append(text.replace("\ufffd", "").strip())
    return "\n\n".join(text for text in found if text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    arguments.out.write_text(stories(), encoding="utf-8")


if __name__ == "__main__":
    main()
