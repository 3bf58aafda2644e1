"""`--rope auto`: a total of cached values is divided by measured error; what is best is known by construction."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import transmla
from tests.conversion.made import Convert, check
from tests.families import LINEAR, MakeSource, lively_config, sparse_source
from transmla.cli import main as command_line
from transmla.conversion.flow import default_destination
from transmla.errors import GeometryError, RecipeError, TransmlaError
from transmla.geometry import rope_candidates
from transmla.targets.engines import LLAMA_CPP, VLLM_GPU

TURNING = {"rope_type": "default", "rope_theta": 100.0}
# turned by next to nothing: no text is long enough to see it
STILL = LINEAR | {"factor": 1e9}


def test_a_head_that_turns_gets_a_rotary_key_and_one_that_stands_a_latent(lively: MakeSource, run: Convert) -> None:
    """One key/value head of 12, 24 values: with all pairs in the rotary key nothing is lost. Of keys that do not turn
    every value of the latent holds more, since it may be of keys or of values."""
    for rope, best in ((TURNING, 12), (STILL, 2)):
        report = run(lively(kv_heads=1, rope=rope), f"best-{best}", rope="auto", total=24, tokens=1024)
        losses = {trial.qk_rope_head_dim: trial.loss for trial in report.splits}
        assert report.plan.mla.qk_rope_head_dim == best == min(losses, key=lambda width: losses[width])
        assert list(losses) == [split.mla.qk_rope_head_dim for split in report.plan.splits] == [6, 2, 4, 8, 12]
        assert (losses[12] < 1e-2 < losses[2]) if rope is TURNING else (losses[2] < 0.5 * losses[12])
        provenance = json.loads((report.destination / "transmla.json").read_text("utf-8"))
        assert [row["qk_rope_head_dim"] for row in provenance["splits"]] == list(losses)
        assert provenance["geometry"]["mla"]["qk_rope_head_dim"] == best
        config = json.loads((report.destination / "config.json").read_text("utf-8"))
        assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (24 - best, best)


def test_it_is_the_best_of_whole_conversions(run: Convert) -> None:
    """The survey, a few layers and windows, picks what the held-out loss of the whole model is smallest with."""
    given: dict[str, Any] = {"calibration": "wikitext", "tokens": 4096, "window": 128, "total": 32, "theta": 10000.0}
    chosen = run(Path("stories260k"), "auto", rope="auto", **given).plan.mla
    lost = {}
    for rope in (2, 8):
        heldout = run(Path("stories260k"), f"rope-{rope}", rope=rope, **given).heldout
        lost[rope] = heldout.converted - heldout.source
    assert chosen.qk_rope_head_dim == 8 == min(lost, key=lambda rope: lost[rope]) and lost[2] > 2 * lost[8]


def test_an_interrupted_choice_is_not_made_again(lively: MakeSource, run: Convert) -> None:
    given: dict[str, Any] = {"rope": "auto", "total": 24}

    def stop(at: str, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    whole = run(lively(), "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=stop, **given)
    seen: list[str] = []
    again = run(lively(), progress=lambda at, *_: seen.append(at), **given)
    assert again.splits == whole.splits and again.plan.mla == whole.plan.mla
    assert "choose rope width" not in seen and "convert layers" in seen


def test_plan_lists_what_would_be_measured(tmp_path: Path) -> None:
    """With the engines of each: nothing else tells them apart before weights are read."""
    values = lively_config(hidden=4096, heads=32, kv_heads=8, head_dim=128, layers=2).to_dict()
    source = str(sparse_source(tmp_path / "source", values))
    planned = transmla.plan(source, rope="auto")
    sizes = [(split.mla.kv_lora_rank, split.mla.qk_rope_head_dim) for split in planned.splits]
    assert sizes == [(512, 64), (560, 16), (544, 32), (528, 48), (480, 96), (448, 128)]
    assert [VLLM_GPU in split.engines for split in planned.splits] == [True, *[False] * 5]
    assert all(LLAMA_CPP in split.engines for split in planned.splits)
    assert planned.summary()["splits"][-1]["kv_lora_rank"] == 448
    assert any("6 ways to divide 576" in note for note in planned.notes)
    assert default_destination(planned).name.endswith("-mla-576")
    assert transmla.plan(source).splits == ()
    shown = CliRunner().invoke(command_line, ["plan", source, "--rope", "auto", "--total", "320"])
    assert "256 + 64" in shown.output and "192 + 128" in shown.output, shown.output
    assert CliRunner().invoke(command_line, ["plan", source, "--rope", "wide"]).exit_code == 2


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"total": 24}, (18, 6)),
        ({"total": 24, "rope": 8}, (16, 8)),
        ({"total": 24, "latent": 16}, (16, 8)),
    ],
    ids=str,
)
def test_a_total_stands_for_one_of_the_sizes(
    lively: MakeSource, settings: dict[str, Any], sizes: tuple[int, int]
) -> None:
    mla = transmla.plan(str(lively()), **settings).mla
    assert (mla.kv_lora_rank, mla.qk_rope_head_dim) == sizes


def test_a_recipe_s_sizes_are_divided_anew() -> None:
    """stories260k has 24 + 8."""
    found = transmla.plan("stories260k", rope="auto")
    assert found.mla.cache_values() == 32 and {split.mla.cache_values() for split in found.splits} == {32}
    assert transmla.plan("stories260k", total=16).mla.kv_lora_rank == 8
    assert transmla.plan("stories260k", total=16, latent=10).mla.qk_rope_head_dim == 6


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"rope": "auto", "latent": 16}, RecipeError, ("leave out --latent",)),
        ({"rope": 8, "latent": 16, "total": 24}, RecipeError, ("one of the three",)),
        ({"rope": "auto", "latent": "auto", "budget": 0.1}, RecipeError, ("--rope a number",)),
        ({"total": 24, "latent": "auto", "budget": 0.1}, RecipeError, ("--total",)),
        ({"rope": "wide"}, RecipeError, ("auto",)),
        ({"total": 24, "latent": 10}, GeometryError, ("qk_rope_head_dim 14",)),
        ({"rope": 8, "total": 8}, RecipeError, ("--total at least 9", "smaller --rope")),
        ({"latent": 16, "total": 17}, RecipeError, ("--total at least 18", "smaller --latent")),
        ({"rope": "auto", "total": 2}, GeometryError, ("--total 3",)),
        ({"rope": "auto", "total": 90}, GeometryError, ("--total 60",)),
    ],
    ids=str,
)
def test_what_does_not_fit_together(
    lively: MakeSource, settings: dict[str, Any], kind: type[TransmlaError], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        transmla.plan(str(lively()), **settings)
    check(caught.value, "", words)


def test_pairs_that_stand_are_no_candidates(lively: MakeSource) -> None:
    planned = transmla.plan(str(lively(model_type="phi3")), rope="auto", total=24)
    assert max(split.mla.qk_rope_head_dim for split in planned.splits) == 6
    assert rope_candidates(planned.gqa, 24, 12) == (6, 2, 4, 8, 12)
