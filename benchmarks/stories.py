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

import torch

from transmla.model.loading import load_any, load_tokenizer
from transmla.text.sampling import sample

OUT = Path(__file__).parents[1] / "transmla/data/stories.txt"
MODEL = "stories260k"
# three times what the recipe asks for; a text is as long as the model can read
TOKENS, LENGTH, BATCH, SEED = 100_000, 512, 64, 0


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
