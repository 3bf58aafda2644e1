"""`--latent auto`: the smallest size within the budget, found with few conversions."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from transmla.conversion.flow import convert
from transmla.conversion.measure import HeldoutNats
from transmla.conversion.plan import plan
from transmla.conversion.search import find_latent
from transmla.errors import GateError, RecipeError
from transmla.geometry import latent_candidates
from transmla.progress import silent

SIZES = latent_candidates(plan("stories260k", latent="auto", budget=0.1).gqa, None)


@dataclass
class Falling:
    """A loss that falls with the rank, and how often it was asked for."""

    asked: int = 0

    def __call__(self, latent: int) -> HeldoutNats:
        self.asked += 1
        return HeldoutNats(1.0, 1.0 + 1.0 / latent, 4)


@pytest.mark.parametrize("budget", [0.03, 0.05, 0.1, 0.5])
def test_it_is_the_smallest_within_the_budget(budget: float) -> None:
    fit, forgotten = Falling(), []
    latent, tried = find_latent(SIZES, budget, fit, forgotten.append, silent)
    assert sorted([*forgotten, latent]) == sorted(trial.kv_lora_rank for trial in tried)
    assert latent == next(size for size in SIZES if fit(size).converted - 1 <= math.log1p(budget))
    assert len(tried) <= len(SIZES).bit_length()


def test_no_size_within_the_budget() -> None:
    with pytest.raises(GateError, match="no latent stays within") as caught:
        find_latent(SIZES, 1e-6, Falling(), lambda _: None, silent)
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
    (said,) = [line for line in str(report).splitlines() if line.startswith("latent + rope")]
    assert f" {chosen}+8, within 50.0%" in said and all(
        f"{size} x{ratio:.3f}" in said for size, ratio in ratios.items()
    )


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
