"""Choosing rope_theta: which candidates, which layers, and that the measured error decides."""

import pytest
import torch

from tests.conversion.pieces import model_and_layer, random_streams
from tests.maths.weights import fit_layer
from transmla.conversion.moments import observe
from transmla.conversion.theta import candidates, choose, output_error, surveyed_layers
from transmla.maths.closed_form import ClosedForm


def test_the_source_s_own_theta_comes_first() -> None:
    found = candidates(10000.0, 64, 32)
    assert found[0] == 10000.0 and found[-1] == pytest.approx(100.0) and len(set(found)) == len(found)
    assert candidates(10000.0, 64, 64)[0] == 10000.0


def test_layers_are_spread_from_first_to_last() -> None:
    assert surveyed_layers(30) == {0, 9, 19, 29}
    assert surveyed_layers(2) == {0, 1} and surveyed_layers(1) == {0}


def test_another_theta_has_to_be_clearly_better() -> None:
    assert choose({10.0: [1.0, 1.0], 5.0: [0.99, 0.98]}) == 10.0
    assert choose({10.0: [1.0, 1.0], 5.0: [0.9, 0.9], 3.0: [0.5, 0.9]}) == 3.0
    assert choose({10.0: [1.0]}) == 10.0


def test_error_is_none_where_nothing_is_lost() -> None:
    """One key/value head at full width: exact with the source's theta, not with another."""
    _, layer = model_and_layer(kv_heads=1)
    streams = random_streams(windows=8, tokens=20, heldout=3)
    streams.converted_NTD = streams.source_NTD
    moments = observe(layer, streams, 16)
    errors = [
        output_error(layer, fit_layer(layer.gqa, moments, 12, 12, theta, ClosedForm()).mla, streams)
        for theta in (10000.0, 100.0)
    ]
    assert errors[0] < 1e-8 and errors[1] > 1e-2
    assert torch.is_grad_enabled()


def test_error_is_that_of_held_out_windows_at_their_positions() -> None:
    _, layer = model_and_layer(kv_heads=1)
    streams = random_streams(windows=6, tokens=20, heldout=2, gap=30)
    streams.converted_NTD = streams.source_NTD
    mla = fit_layer(layer.gqa, observe(layer, streams, 16), 8, 6, 10000.0, ClosedForm()).mla
    x_NTD = layer.into_attention(streams.source_NTD[4:])
    exact_NTD = layer.attention(x_NTD, streams.positions_NT[4:])
    lost_NTD = exact_NTD - layer.latent_attention(x_NTD, mla.to(dtype=torch.float32), streams.positions_NT[4:])
    found = output_error(layer, mla, streams)
    assert found == pytest.approx(float(lost_NTD.square().sum() / exact_NTD.square().sum()), rel=1e-4) and found > 1e-3
