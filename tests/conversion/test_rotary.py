"""Rotary embeddings that change with the length of the text: fixed ones are converted, and the source has them, too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import transmla
from tests.conversion.made import IDS, PLAIN, Convert
from tests.families import THETA, MakeSource
from tests.maths.weights import relative
from transmla.checkpoint.read import open_source
from transmla.errors import UnsupportedError
from transmla.families import FAMILIES, fixed_rotary
from transmla.model.loading import load, load_source

# longer than the original context, and shorter
LONG, SHORT = IDS, IDS[:, :20]
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": THETA, "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.2, 2.0, 5.0, 9.0],
}  # fmt: skip
PHI: dict[str, Any] = {
    "model_type": "phi3", "kv_heads": 1, "head_dim": 8, "layers": 2, "rope": LONGROPE,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC: dict[str, Any] = {
    "kv_heads": 1, "layers": 2, "rope": {"rope_type": "dynamic", "rope_theta": THETA, "factor": 2.0},
    "max_position_embeddings": 64,
}  # fmt: skip


def logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids_BT).logits
    return found


def stock(folder: Path) -> Any:
    """As transformers loads it, which looks at the length of each text."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def changed(folder: Path, **values: Any) -> Path:
    """config.json with other rotary settings, in their older spelling."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    rotary = config.pop("rope_parameters")
    config |= {"rope_theta": rotary.pop("rope_theta"), "rope_scaling": rotary} | values
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_longrope_turns_like_long_texts(lively: MakeSource, run: Convert) -> None:
    """The same model as the source of a long text, and of a short one as where an engine serves the whole context."""
    source = lively(**PHI)
    report = run(source, format="transmla", latent=16, rope=8, method=PLAIN)
    own, theirs, fixed = load(report.destination), stock(source), load_source(open_source(source))
    assert relative(logits(own, LONG), logits(theirs, LONG)) < 1e-4
    assert torch.equal(logits(fixed, LONG), logits(theirs, LONG))
    assert relative(logits(own, SHORT), logits(fixed, SHORT)) < 1e-4
    assert relative(logits(fixed, SHORT), logits(theirs, SHORT)) > 1e-2, "it is seen that there are two"
    assert report.heldout.converted == pytest.approx(report.heldout.source, abs=0.02)
    assert "texts of all lengths turn like those of 256 tokens" in " ".join(report.plan.notes)


def test_longrope_within_its_first_context(lively: MakeSource, run: Convert) -> None:
    """What is never longer than that turns like short texts."""
    source = lively(**PHI | {"max_position_embeddings": 64, "original_max_position_embeddings": 64})
    own = load(run(source, format="transmla", latent=16, rope=8, method=PLAIN).destination)
    assert relative(logits(own, LONG), logits(stock(source), LONG)) < 1e-4


def test_the_first_name_of_longrope(lively: MakeSource, tmp_path: Path) -> None:
    """`su`, in the older spelling of the settings."""
    other = {key: value for key, value in LONGROPE.items() if key not in ("rope_type", "rope_theta")}
    plain = logits(load_source(open_source(lively(**PHI))), SHORT)
    again = changed(copied(lively(**PHI), tmp_path), rope_scaling={"type": "su"} | other)
    assert torch.equal(logits(load_source(open_source(again)), SHORT), plain)
    assert transmla.plan(str(again)).max_position_embeddings == 256


def copied(source: Path, folder: Path) -> Path:
    """Sources of the fixture are shared."""
    copy = folder / "source"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("older", [False, True])
def test_dynamic_changes_nothing_within_the_context(
    lively: MakeSource, run: Convert, tmp_path: Path, older: bool
) -> None:
    source = copied(lively(**DYNAMIC), tmp_path)
    wanted = logits(stock(source), LONG)
    if older:
        changed(source, rope_scaling={"type": "dynamic", "factor": 2.0})
    report = run(source, latent=12, rope=12, theta=THETA, method=PLAIN)
    assert relative(logits(load(report.destination), LONG), wanted) < 1e-4
    config = json.loads((report.destination / "config.json").read_text("utf-8"))
    assert config["max_position_embeddings"] == 64 and "dynamic" not in json.dumps(config)
    assert "it begins behind 64 tokens" in " ".join(report.plan.notes)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"long_factor": None}, "long_factor"),
        ({"short_factor": "1.0"}, "short_factor"),
        ({"long_factor": [1.0, 0.0, 1.0, 1.0]}, "long_factor"),
        ({}, "original_max_position_embeddings"),
        ({"original_max_position_embeddings": 32}, "original_max_position_embeddings"),
    ],
    ids=str,
)
def test_longrope_without_what_it_needs(
    lively: MakeSource, tmp_path: Path, changes: dict[str, Any], missing: str
) -> None:
    source = changed(copied(lively(**PHI), tmp_path), rope_scaling=LONGROPE | changes)
    if not changes or "original_max_position_embeddings" in changes:  # where the class of Phi-3 does not look
        path = source / "config.json"
        config = json.loads(path.read_text("utf-8"))
        del config["original_max_position_embeddings"]
        path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsupportedError, match=f"(?s)incomplete.*{missing}"):
        transmla.plan(str(source))


def test_longrope_without_a_context(lively: MakeSource, tmp_path: Path) -> None:
    source = changed(copied(lively(**PHI), tmp_path), rope_scaling=LONGROPE, max_position_embeddings=None)
    with pytest.raises(UnsupportedError, match=r"(?s)incomplete.*: max_position_embeddings"):
        transmla.plan(str(source))


def test_layers_of_two_kinds_are_fixed_one_by_one() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}
    config = {"rope_parameters": {"sliding_attention": plain, "full_attention": dynamic}}
    fixed = fixed_rotary(config)["rope_parameters"]
    assert fixed == {"sliding_attention": plain, "full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert config["rope_parameters"]["full_attention"] == dynamic, "as it was"


@pytest.mark.parametrize("settings", [None, {}, {"rope_type": "yarn", "factor": 2.0}, "fast"], ids=str)
def test_others_stay_as_they_are(settings: Any) -> None:
    assert fixed_rotary({"rope_scaling": settings, "rope_theta": 1e4}) == {}
    assert "yarn" not in FAMILIES["phi3"].rope_types, "its class takes it for longrope"
