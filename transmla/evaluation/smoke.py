"""Does it still write? Greedy continuations of a few prompts: empty ones, and ones that repeat themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

PROMPTS = (
    "The history of the city begins",
    "Once upon a time",
    "The main difference between the two is",
    "In order to make a good soup, you",
    "def fibonacci(n):",
    "She opened the letter and",
    "Water boils at",
    "The most important thing to know about music is",
)
GRAM = 4


@dataclass(frozen=True)
class Continuation:
    """repeated: share of the text's four-token runs that occurred before in it, 0 to 1"""

    prompt: str
    text: str
    num_tokens: int
    repeated: float


@dataclass(frozen=True)
class Smoke:
    """Means over the prompts, and the texts themselves."""

    continuations: tuple[Continuation, ...]

    @property
    def repeated(self) -> float:
        return sum(one.repeated for one in self.continuations) / len(self.continuations)

    @property
    def num_empty(self) -> int:
        return sum(not one.text.strip() for one in self.continuations)


def smoke(model: Any, tokenizer: Any, prompts: tuple[str, ...] = PROMPTS, max_new_tokens: int = 64) -> Smoke:
    """Greedy continuations of the prompts by a transformers model."""
    found = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        with torch.no_grad():
            ids = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id or 0,
            )[0, given.shape[1] :].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        found.append(Continuation(prompt, text, len(ids), repeated_share(ids)))
    return Smoke(tuple(found))


def repeated_share(ids: list[int]) -> float:
    """Share of runs of `GRAM` tokens that occurred earlier."""
    runs = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
