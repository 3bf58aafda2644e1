"""Blocks of layers: the forward pass is that of the streams, and the loss goes down."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conversion.pieces import model_and_layer, random_streams
from tests.maths.weights import fit_layer, relative
from transmla.conversion.block import BlockDistiller, through
from transmla.conversion.levels import Descent
from transmla.conversion.moments import observe
from transmla.conversion.streams import Streams, advance_converted, advance_source, converted_heads
from transmla.maths.attention import MlaWeights
from transmla.maths.closed_form import ClosedForm
from transmla.model.head import Head
from transmla.model.layer import SourceLayer
from transmla.model.source import Ends

LAYERS = [model_and_layer(index, heads=4, head_dim=16)[1] for index in (0, 1)]
ENDS = Ends(lambda x_TD: x_TD, Head(0.3 * torch.randn(97, 48, generator=torch.Generator().manual_seed(3))))
CAPPED = replace(ENDS, head=replace(ENDS.head, softcap=0.5, scale=0.7))


def converted(layer: SourceLayer, streams: Streams) -> MlaWeights:
    """Closed form of a layer, streams past it."""
    moments = observe(layer, streams, 16)
    mla = fit_layer(layer.gqa.to(dtype=torch.float64), moments, 8, 4, 10000.0, ClosedForm()).mla.to(dtype=torch.float32)
    heads = converted_heads(layer, mla, streams)
    advance_source(layer, streams)
    advance_converted(layer, mla, heads, streams)
    return mla


@pytest.fixture
def fitted() -> tuple[Streams, list[MlaWeights], torch.Tensor]:
    """Streams with the block's input and the source behind it, weights, and the converted stream behind it."""
    streams = random_streams(windows=108, tokens=16, heldout=8, noise=0.0, gap=40)
    start_NTD = streams.converted_NTD.clone()
    weights = [converted(layer, streams) for layer in LAYERS]
    behind_NTD, streams.converted_NTD = streams.converted_NTD, start_NTD
    return streams, weights, behind_NTD


def test_a_block_is_its_layers_one_by_one(fitted: Any) -> None:
    streams, weights, behind_NTD = fitted
    start_NTD, positions_NT = streams.converted_NTD, streams.positions_NT
    assert relative(through(LAYERS, weights, start_NTD, positions_NT), behind_NTD) < 1e-5
    assert relative(through(LAYERS[:1], weights[:1], start_NTD, positions_NT), behind_NTD) > 0.1
    assert relative(through(LAYERS, weights, start_NTD), behind_NTD) > 0.01


@pytest.mark.parametrize("ends", [None, ENDS, CAPPED], ids=["stream", "predictions", "capped"])
def test_it_lowers_the_loss_that_it_reports(fitted: Any, ends: Ends | None) -> None:
    streams, weights, behind_NTD = fitted
    distiller = BlockDistiller(LAYERS, weights, streams, ends, Descent(10.0, 10, 5e-3))
    before = distiller.heldout()
    assert before == pytest.approx(_naive(streams.source_NTD[100:], behind_NTD[100:], ends), rel=1e-4)
    losses: list[float] = []
    found = distiller.run(before, losses.append)
    assert len(losses) == 100 and sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert found.loss_after < before
    again_NTD = through(LAYERS, found.weights, streams.converted_NTD, streams.positions_NT)
    assert found.loss_after == pytest.approx(_naive(streams.source_NTD[100:], again_NTD[100:], ends), rel=1e-4)


@pytest.mark.parametrize("ends", [None, ENDS], ids=["stream", "predictions"])
@pytest.mark.parametrize("at_once", [2, 4])
def test_a_step_reports_the_mean_over_its_windows(
    fitted: Any, ends: Ends | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of them go through the block together."""
    streams, weights, behind_NTD = fitted
    monkeypatch.setattr("transmla.conversion.block.tokens_per_pass", lambda device: 16 * at_once)
    distiller = BlockDistiller(LAYERS, weights, streams, ends, Descent(1.0, 5, 1e-3), 5)
    losses: list[float] = []
    distiller.run(1e9, losses.append)
    assert losses == [pytest.approx(_naive(streams.source_NTD[:5], behind_NTD[:5], ends), rel=1e-4)]


def test_only_the_first_windows_are_trained_on(fitted: Any) -> None:
    streams, weights, _ = fitted
    seen: list[int] = []

    class Watched(BlockDistiller):
        def losses(self, places: list[int], weights: Any) -> tuple[torch.Tensor, torch.Tensor]:
            seen.extend(places)
            return super().losses(places, weights)

    distiller = Watched(LAYERS, weights, streams, ENDS, Descent(1.0, 1, 1e-3), 3)
    distiller.run(1e9, lambda loss: None)
    assert sorted(seen[:3]) == [0, 1, 2] and distiller.descender.num_steps == 3
    assert set(seen[3:]) == set(range(streams.num_fitted, len(streams.source_NTD)))  # what is held out measures


def test_what_does_not_help_is_not_taken(fitted: Any) -> None:
    streams, weights, _ = fitted
    distiller = BlockDistiller(LAYERS, weights, streams, ENDS, Descent(1.0, 2, 10.0))
    before = distiller.heldout()
    found = distiller.run(before, lambda _: None)
    assert found.loss_after == before and torch.equal(found.weights[0].o_DHv, weights[0].o_DHv)


def _naive(target_NTD: torch.Tensor, found_NTD: torch.Tensor, ends: Ends | None) -> float:
    target_NTD, found_NTD = target_NTD.double(), found_NTD.double()
    if ends is None:
        return float(((found_NTD - target_NTD).square().sum(-1) / target_NTD.square().sum(-1)).mean())
    target, found = (_logits(x_NTD, ends.head).log_softmax(-1) for x_NTD in (target_NTD, found_NTD))
    return float((target.exp() * (target - found)).sum(-1).mean())


def _logits(x_NTD: torch.Tensor, head: Head) -> torch.Tensor:
    logits = x_NTD @ head.weight_VD.double().T * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
