"""One layer against the source's stream."""

from dataclasses import replace

import pytest
import torch

from tests.conversion.pieces import model_and_layer, random_streams
from tests.maths.weights import relative
from transmla.conversion.layerwise import refine_layer
from transmla.conversion.levels import Descent
from transmla.conversion.moments import observe
from transmla.conversion.streams import Streams, add_source_attention
from transmla.maths.attention import MlaWeights
from transmla.maths.closed_form import ClosedForm, fit_layer
from transmla.maths.reference import mla_naive
from transmla.model.source import SourceLayer


@pytest.fixture(scope="module")
def layer() -> SourceLayer:
    return model_and_layer(heads=4, head_dim=16)[1]


@pytest.fixture
def streams() -> Streams:
    return random_streams(windows=68, tokens=16, heldout=8, noise=0.1, gap=40)


def closed_form(layer: SourceLayer, streams: Streams) -> MlaWeights:
    moments = observe(layer, streams, 16)
    fitted = fit_layer(layer.gqa.to(dtype=torch.float64), moments, 8, 4, 10000.0, ClosedForm()).mla
    add_source_attention(layer, streams)
    return fitted.to(dtype=torch.float32)


def naive_loss(layer: SourceLayer, mla: MlaWeights, streams: Streams) -> float:
    """Over the held-out windows, in float64, token by token."""
    found = []
    for place in range(streams.num_fitted, len(streams.source_NTD)):
        target_TD, converted_TD = (stream[place].double() for stream in (streams.source_NTD, streams.converted_NTD))
        x_hat_TD = layer.input_layernorm(converted_TD.float()).double()
        out_TD = mla_naive(x_hat_TD, mla.to(dtype=torch.float64), streams.positions_NT[place].tolist())
        error_TD = converted_TD + out_TD - target_TD
        found += [float(e @ e / (t @ t)) for e, t in zip(error_TD, target_TD, strict=True)]
    return sum(found) / len(found)


def test_it_lowers_the_loss_that_it_reports(layer: SourceLayer, streams: Streams) -> None:
    mla = closed_form(layer, streams)
    steps: list[int] = []
    refined = refine_layer(layer, mla, streams, Descent(8.0, 8, 1e-2), lambda done, total, _: steps.append(done))
    assert steps == list(range(1, 61))
    assert refined.loss_before == pytest.approx(naive_loss(layer, mla, streams), rel=1e-4)
    assert refined.loss_after == pytest.approx(naive_loss(layer, refined.mla, streams), rel=1e-4)
    assert refined.loss_after < 0.97 * refined.loss_before
    assert all(relative(getattr(refined.mla, name), getattr(mla, name)) > 1e-3 for name in ("q_rope_HeD", "v_up_Hvr"))


def test_what_does_not_help_is_not_taken(layer: SourceLayer, streams: Streams) -> None:
    mla = closed_form(layer, streams)
    refined = refine_layer(layer, mla, streams, Descent(1.0, 4, 10.0), lambda *_: None)
    assert refined.loss_after == refined.loss_before
    assert torch.equal(refined.mla.o_DHv, mla.o_DHv)


def test_held_out_windows_are_not_fitted_to(layer: SourceLayer, streams: Streams) -> None:
    mla = closed_form(layer, streams)
    other = replace(streams, source_NTD=streams.source_NTD.clone())
    other.source_NTD[60:] = 1.01 * other.source_NTD[60:]
    results = [
        refine_layer(layer, mla, windows, Descent(4.0, 8, 1e-2), lambda *_: None).mla for windows in (streams, other)
    ]
    assert torch.equal(results[0].o_DHv, results[1].o_DHv)
    other.source_NTD[0] = 1.1 * other.source_NTD[0]
    third = refine_layer(layer, mla, other, Descent(4.0, 8, 1e-2), lambda *_: None).mla
    assert not torch.equal(results[0].o_DHv, third.o_DHv)
