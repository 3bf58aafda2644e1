"""`--latent auto`: the smallest latent whose measured loss stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transmla.conversion.measure import HeldoutNats
from transmla.errors import GateError
from transmla.progress import Progress


@dataclass(frozen=True)
class Trial:
    """One size and its perplexity over the source's, on the held-out calibration windows."""

    kv_lora_rank: int
    ratio: float


def find_latent(
    sizes: Sequence[int],
    budget: float,
    fit: Callable[[int], HeldoutNats],
    forget: Callable[[int], None],
    progress: Progress,
) -> tuple[int, tuple[Trial, ...]]:
    """The smallest kv_lora_rank within the budget, by bisection (more rank, less loss), and all that were tried.

    sizes:  candidates, ascending;  budget: relative increase of perplexity
    fit:    a whole conversion at that size but for the writing
    forget: what `fit` has kept of a size that will not be the result
    Raises `GateError` if even the largest size is above the budget.
    """
    tried: list[Trial] = []
    most = len(sizes).bit_length()

    def within(place: int) -> bool:
        last = f", after x{tried[-1].ratio:.3f} at {tried[-1].kv_lora_rank}" if tried else ""
        progress("try latents", len(tried), most, f"rank {sizes[place]}{last}")
        found = fit(sizes[place])
        tried.append(Trial(sizes[place], math.exp(found.converted - found.source)))
        return tried[-1].ratio <= 1 + budget

    low, high = 0, len(sizes)  # the first size within the budget is in low .. high
    while low < high:
        middle = (low + high) // 2
        if within(middle):
            if high < len(sizes):
                forget(sizes[high])
            high = middle
        else:
            forget(sizes[middle])
            low = middle + 1
    if low == len(sizes):
        best = min(tried, key=lambda trial: trial.ratio)
        raise GateError(
            "no latent stays within the budget",
            where=f"--budget {budget:.1%}",
            why=f"the best that was measured is {best.ratio - 1:+.1%} at kv_lora_rank {best.kv_lora_rank}",
            remedy="allow more, refine more (--refine full, more --tokens) or give the rotary key more (--rope)",
        )
    progress("try latents", most, most, f"rank {sizes[low]}")
    return sizes[low], tuple(tried)
