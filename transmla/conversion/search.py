"""`--latent auto`: the smallest latent whose measured loss stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from transmla.conversion.plan import with_latent
from transmla.conversion.run import Run
from transmla.conversion.write import HeldoutNats
from transmla.errors import GateError
from transmla.geometry import latent_candidates


@dataclass(frozen=True)
class Trial:
    """One size and its perplexity over the source's, on the held-out calibration windows."""

    kv_lora_rank: int
    ratio: float


def find_latent(
    run: Run, fit: Callable[[Run], HeldoutNats], forget: Callable[[Run], None]
) -> tuple[Run, tuple[Trial, ...]]:
    """The run with the smallest latent within the budget, by bisection (more rank, less loss), and all that was tried.

    fit:    a whole conversion but for the writing;  forget: of a size that will not be the result, what `fit` has kept
    Raises `GateError` if even the largest size is above the budget.
    """
    budget = run.plan.recipe.budget
    assert budget is not None
    sizes = latent_candidates(run.plan.gqa, run.plan.recipe.rope)
    tried: list[Trial] = []

    def at(place: int) -> Run:
        return replace(run, plan=with_latent(run.plan, sizes[place]))

    def within(place: int) -> bool:
        run.progress("try latents", len(tried), len(sizes).bit_length(), f"rank {sizes[place]}")
        found = fit(at(place))
        tried.append(Trial(sizes[place], math.exp(found.converted - found.source)))
        return tried[-1].ratio <= 1 + budget

    low, high = 0, len(sizes)  # the first size within the budget is in low .. high
    while low < high:
        middle = (low + high) // 2
        if within(middle):
            if high < len(sizes):
                forget(at(high))
            high = middle
        else:
            forget(at(middle))
            low = middle + 1
    if low == len(sizes):
        best = min(tried, key=lambda trial: trial.ratio)
        raise GateError(
            "no latent stays within the budget",
            where=f"--budget {budget:.1%}",
            why=f"the best that was measured is {best.ratio - 1:+.1%} at kv_lora_rank {best.kv_lora_rank}",
            remedy="allow more, refine more (--refine full, more --tokens) or give the rotary key more (--rope)",
        )
    return at(low), tuple(tried)
