"""The calibration windows of a conversion: made once, then a step of the journal.

Legend: N windows, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.journal import Journal
from transmla.checkpoint.provenance import portable_name
from transmla.conversion.plan import Plan
from transmla.devices import narrow_dtype
from transmla.model.loading import load_source
from transmla.processes import Processes
from transmla.progress import Progress
from transmla.text.mixes import needs_source
from transmla.text.sampling import continue_from, sample_from
from transmla.text.windows import (
    CalibrationTokens,
    begin_tokens,
    calibration_tokens,
    shuffled,
    with_begin,
    with_sampled,
)


def calibration_text(
    planned: Plan, journal: Journal, processes: Processes, device: torch.device, progress: Progress
) -> CalibrationTokens:
    """The windows, the same in all processes. An interrupted conversion continues with those that it had, since what a
    model or a hub writes need not be the same twice."""
    progress("tokens", 0, 1, planned.recipe.mix)
    text = None
    if processes.first:
        if kept := journal.load("text"):
            text = CalibrationTokens(kept[0]["ids_NT"], **kept[1] | {"begin": tuple(kept[1]["begin"])})
        else:
            text = _made(planned, device, progress)
            text = replace(text, name=portable_name(text.name))
            values = {key: getattr(text, key) for key in ("name", "digest", "num_heldout", "begin")}
            # what can be read again is not worth a folder of its own
            again = not needs_source(planned.recipe.mix, planned.recipe.sampled)
            journal.save("text", {"ids_NT": text.ids_NT}, values, alone=not again)
    found: CalibrationTokens = processes.from_first(text)
    progress("tokens", 1, 1, f"{found.ids_NT.numel():,} tokens")
    return found


def _made(planned: Plan, device: torch.device, progress: Progress) -> CalibrationTokens:
    """Windows from the texts of the recipe, and sampled ones among them."""
    recipe, source = planned.recipe, planned.source
    window = min(recipe.window, planned.max_position_embeddings)

    def model() -> Any:
        return load_source(source, dtype=narrow_dtype(device) or torch.float32, device=str(device))

    def tell(done: int, total: int) -> None:
        progress("sample", done, total, "tokens")

    def sampler(num_windows: int, length: int) -> Tensor:
        return sample_from(model(), num_windows, length, seed=recipe.seed, progress=tell)

    cutter = tokenizer(source)
    made = calibration_tokens(recipe.mix, cutter, recipe.num_tokens, window, sampler=sampler, begin=recipe.begin)
    begin = () if recipe.begin == "none" else begin_tokens(cutter)
    found = shuffled(made, recipe.seed)
    if num_sampled := -(-recipe.sampled // window):
        prompts_NT = found.ids_NT[: -found.num_heldout]
        sampled_NT = continue_from(model(), prompts_NT, num_sampled, seed=recipe.seed, progress=tell)
        found = with_sampled(found, with_begin(sampled_NT, begin) if recipe.begin == "all" else sampled_NT)
    return replace(found, begin=begin)
