"""`--latent auto`: the smallest size within the budget, found with few conversions."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from transmla.conversion.flow import convert
from transmla.conversion.levels import LEVELS
from transmla.conversion.plan import plan
from transmla.conversion.run import Run
from transmla.conversion.search import find_latent
from transmla.conversion.write import HeldoutNats
from transmla.errors import GateError, RecipeError
from transmla.geometry import latent_candidates
from transmla.maths.closed_form import ClosedForm


def run_with(budget: float) -> Run:
    import torch

    planned = plan("stories260k", latent="auto", budget=budget)
    return Run(planned, ClosedForm(), LEVELS["off"], torch.device("cpu"), lambda *_: None)


@dataclass
class Falling:
    """A loss that falls with the rank, and how often it was asked for."""

    asked: int = 0

    def __call__(self, candidate: Run) -> HeldoutNats:
        self.asked += 1
        return HeldoutNats(1.0, 1.0 + 1.0 / candidate.plan.mla.kv_lora_rank, 4)


@pytest.mark.parametrize("budget", [0.03, 0.05, 0.1, 0.5])
def test_it_is_the_smallest_within_the_budget(budget: float) -> None:
    fit, forgotten = Falling(), []
    run, tried = find_latent(run_with(budget), fit, lambda one: forgotten.append(one.plan.mla.kv_lora_rank))
    assert sorted([*forgotten, run.plan.mla.kv_lora_rank]) == sorted(trial.kv_lora_rank for trial in tried)
    sizes = latent_candidates(run.plan.gqa, run.plan.recipe.rope)
    expected = next(size for size in sizes if fit(replace_latent(run, size)).converted - 1 <= math.log1p(budget))
    assert run.plan.mla.kv_lora_rank == expected
    assert len(tried) <= len(sizes).bit_length()


def replace_latent(run: Run, size: int) -> Run:
    return replace(run, plan=replace(run.plan, mla=replace(run.plan.mla, kv_lora_rank=size)))


def test_no_size_within_the_budget() -> None:
    with pytest.raises(GateError, match="no latent stays within") as caught:
        find_latent(run_with(1e-6), Falling(), lambda _: None)
    assert caught.value.exit_code == 5 and "the best that was measured" in caught.value.why


@pytest.mark.parametrize("settings", [{"latent": "auto"}, {"budget": 0.1}, {"latent": 8, "budget": 0.1}])
def test_latent_auto_and_budget_belong_together(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="belong together"):
        plan("stories260k", **settings)


def test_a_budget_is_kept_by_a_real_conversion(tmp_path: Any) -> None:
    report = convert(
        "stories260k", tmp_path / "out", latent="auto", budget=0.5, rope=8, tokens=4096, window=128,
        calibration="wikitext", theta=10000.0, refine="off",
    )  # fmt: skip
    chosen = report.plan.mla.kv_lora_rank
    assert report.heldout.converted - report.heldout.source <= math.log(1.5)
    ratios = {trial.kv_lora_rank: trial.ratio for trial in report.tried}
    assert ratios[chosen] <= 1.5 and all(ratio > 1.5 for size, ratio in ratios.items() if size < chosen)


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    """Sizes that were tried are not tried again, and no layers are kept of those that lost."""
    settings: dict[str, Any] = {
        "latent": "auto", "budget": 0.5, "rope": 8, "tokens": 4096, "window": 128, "calibration": "wikitext",
        "theta": 10000.0, "refine": "off",
    }  # fmt: skip
    whole = convert("stories260k", tmp_path / "whole", **settings)
    tried = [trial.kv_lora_rank for trial in whole.tried]
    assert len(tried) > 2

    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == "try latents" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("stories260k", tmp_path / "out", progress=interrupt, **settings)
    kept = {path.name.partition("-layer-")[0] for path in (tmp_path / "out.partial" / "journal").glob("*-layer-*")}
    assert len(kept) <= 1
    seen: list[str] = []
    again = convert("stories260k", tmp_path / "out", progress=lambda at, *_: seen.append(at), **settings)
    assert again.tried == whole.tried and again.plan.mla == whole.plan.mla
    chosen_was_tried = whole.plan.mla.kv_lora_rank in tried[:2]
    layers = whole.plan.mla.num_hidden_layers
    assert seen.count("convert layers") == layers * (len(tried) - 2 + chosen_was_tried)
