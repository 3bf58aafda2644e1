"""Sizes that the plain conversion has not: queries through a latent, wider heads."""

import json
from typing import Any

import pytest
import torch

from tests.conversion.made import IDS, Convert, logits, weights
from tests.families import MakeSource
from transmla.conversion import run as run_module
from transmla.conversion.levels import Descent, Refinement
from transmla.conversion.plan import plan
from transmla.errors import GeometryError, RecipeError
from transmla.maths.fold import MAX_NORM_DEVIATION
from transmla.model.loading import load


@pytest.mark.parametrize("refine", ["off", "fast"])
def test_queries_through_a_latent(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, refine: str
) -> None:
    """At full rank nothing is lost; at a smaller one what is written is still what was converted (verified).

    In float32, since a lively model makes much of the noise of bfloat16.
    """
    monkeypatch.setattr(run_module, "narrow_dtype", lambda device: None)
    source = lively()
    wide = run(source, "wide", refine=refine, theta=100.0)
    full = run(source, "full", refine=refine, theta=100.0, q_latent=48)
    narrow = run(source, "narrow", refine=refine, theta=100.0, q_latent=20)
    assert wide.layers[0].query_loss is None and full.layers[0].query_loss < 1e-9 < narrow.layers[0].query_loss
    config = json.loads((narrow.destination / "config.json").read_text())
    assert config["q_lora_rank"] == 20
    assert weights(narrow.destination)["model.layers.0.self_attn.q_a_proj.weight"].shape == (20, 48)
    if refine == "off":
        assert full.heldout.converted == pytest.approx(wide.heldout.converted, abs=1e-3)
    else:
        assert narrow.blocks[0].loss_after < narrow.blocks[0].loss_before
    own = load(narrow.destination, dtype=torch.float32)
    with torch.no_grad():
        error = own(IDS).logits - logits(narrow.destination)
    # our class has the linear map that the norm of the stock class approximates within this
    assert error.norm() < MAX_NORM_DEVIATION * logits(narrow.destination).norm()


@pytest.mark.parametrize("layerwise", [False, True])
def test_wider_heads(lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, layerwise: bool) -> None:
    """The same start, and weights that only the wider model has come out of the refinement in use; what is written is
    what was converted (verified)."""
    monkeypatch.setattr(run_module, "narrow_dtype", lambda device: None)
    descent = Descent(passes=2.0, batch=2, rate=1e-2)
    refinement = Refinement(Descent(passes=1.0, batch=2, rate=1e-3) if layerwise else None, descent)
    given: dict[str, Any] = {"refine": "fast", "theta": 100.0, "latent": 20, "rope": 8, "refinement": refinement}
    given["context"] = 1  # so few windows do not teach distances
    narrow = run(lively(), "narrow", **given)
    wide = run(lively(), "wide", nope=16, value=20, **given)
    config = json.loads((wide.destination / "config.json").read_text())
    assert (config["qk_nope_head_dim"], config["v_head_dim"]) == (16, 20)
    if not layerwise:
        assert wide.blocks[0].loss_before == pytest.approx(narrow.blocks[0].loss_before, rel=1e-4)
    assert wide.blocks[0].loss_after < wide.blocks[0].loss_before
    heads, width = config["num_attention_heads"], json.loads((lively() / "config.json").read_text())["head_dim"]
    tensors = weights(wide.destination)
    q_Hxd = tensors["model.layers.0.self_attn.q_proj.weight"].unflatten(0, (heads, 16 + 8))
    o_DHv = tensors["model.layers.0.self_attn.o_proj.weight"].unflatten(1, (heads, 20))
    assert q_Hxd[:, width:16].abs().amax() > 1e-4 and o_DHv[..., width:].abs().amax() > 1e-4


def test_wider_heads_need_refinement(lively: MakeSource, run: Convert) -> None:
    with pytest.raises(RecipeError, match="wider heads and no refinement"):
        run(lively(), "wide", nope=16, refine="off", latent=20, rope=8)


def test_wider_heads_fit_every_latent_that_is_tried(lively: MakeSource) -> None:
    """Refused before anything is loaded, not in the middle of the search."""
    with pytest.raises(GeometryError, match="v_head_dim 40 is impossible"):
        plan(str(lively()), latent="auto", budget=0.5, value=40)
