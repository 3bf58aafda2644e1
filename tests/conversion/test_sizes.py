"""Sizes that the plain conversion has not: queries through a latent."""

import json

import pytest
import torch

from tests.conversion.made import IDS, Convert, logits, weights
from tests.families import MakeSource
from transmla.conversion import run as run_module
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
