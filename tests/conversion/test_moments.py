"""Second moments against double loops over queries and keys on a tiny window."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conversion.pieces import model_and_layer, random_streams
from tests.maths.weights import relative
from transmla.conversion.moments import _spread, attended, observe
from transmla.maths.attention import GqaWeights, rotate
from transmla.maths.closed_form import Moments
from transmla.model.layer import SourceLayer

TOKENS = 7


@pytest.fixture(autouse=True, params=[3, 128])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in several pieces, and in one."""
    monkeypatch.setattr("transmla.conversion.moments.ROWS", request.param)


@pytest.fixture(scope="module")
def layer() -> SourceLayer:
    return model_and_layer(heads=4, head_dim=16)[1]


def naive(x_TD: Tensor, x_hat_TD: Tensor, gqa: GqaWeights, positions_T: Tensor | None = None) -> dict[str, Tensor]:
    """One head, one query, one key at a time; float64."""
    at = torch.arange(len(x_TD)) if positions_T is None else positions_T
    heads, head_dim, size = gqa.q_HdD.shape
    tokens, heads_per_group = len(x_TD), heads // len(gqa.k_GdD)
    found = {
        "query_Hdd": torch.zeros(heads, head_dim, head_dim),
        "importance_H": torch.zeros(heads),
        "distance_HS": torch.zeros(heads, int(at[-1]) + 1),
        "received_T": torch.zeros(tokens),
        "attended_DD": torch.zeros(size, size),
    }
    found = {name: zero.double() for name, zero in found.items()}
    x_TD, x_hat_TD = x_TD.double(), x_hat_TD.double()
    for head in range(heads):
        q_Td = x_TD @ gqa.q_HdD[head].double().T
        k_Td = x_TD @ gqa.k_GdD[head // heads_per_group].double().T
        v_Td = x_TD @ gqa.v_GdD[head // heads_per_group].double().T
        o_Dd = gqa.o_DHd[:, head * head_dim : (head + 1) * head_dim].double()
        q_turned_Td, k_turned_Td = (rotate(part, gqa.inv_freq_P, at) for part in (q_Td, k_Td))
        for t in range(tokens):
            found["query_Hdd"][head] += torch.outer(q_Td[t], q_Td[t])
            score_S = torch.stack([gqa.scaling * q_turned_Td[t] @ k_turned_Td[s] for s in range(t + 1)])
            if gqa.softcap is not None:
                score_S = gqa.softcap * torch.tanh(score_S / gqa.softcap)
            if gqa.window is not None:
                score_S[at[t] - at[: t + 1] >= gqa.window] = -torch.inf
            p_S = score_S.softmax(0)
            out_d = p_S @ v_Td[: t + 1]
            y_D = p_S @ x_hat_TD[: t + 1]
            found["attended_DD"] += torch.outer(y_D, y_D) / heads
            for s in range(t + 1):
                weight = p_S[s] ** 2 * (o_Dd @ (v_Td[s] - out_d)).square().sum()
                found["importance_H"][head] += weight
                found["received_T"][s] += weight
                if s > 0:
                    found["distance_HS"][head, at[t] - at[s]] += weight
    return found


@pytest.mark.parametrize("tokens", [TOKENS, 50])
def test_attended_is_the_double_loop(layer: SourceLayer, tokens: int, device: torch.device) -> None:
    """Of fewer tokens than features, and of more."""
    assert TOKENS < layer.geometry.hidden_size < 50
    streams = random_streams(tokens=tokens)
    x_TD, x_hat_TD = streams.source_NTD[0], streams.converted_NTD[0]
    heads = tuple(part.to(device) for part in layer.heads(x_TD))
    seen = attended(heads, x_hat_TD.to(device), layer.gqa.to(device=device))
    expected = naive(x_TD, x_hat_TD, layer.gqa)
    for name, value in expected.items():
        assert relative(getattr(seen, name), value) < 1e-5, name


@pytest.mark.parametrize("gaps", [(30,), (1,), (5, 200)])
def test_attended_across_gaps(layer: SourceLayer, gaps: tuple[int, ...]) -> None:
    streams = random_streams(tokens=TOKENS)
    positions_T = torch.arange(TOKENS)
    for number, gap in enumerate(gaps, 1):
        positions_T[number * TOKENS // 3 :] += gap
    x_TD, x_hat_TD = streams.source_NTD[0], streams.converted_NTD[0]
    seen = attended(layer.heads(x_TD), x_hat_TD, layer.gqa, positions_T)
    expected = naive(x_TD, x_hat_TD, layer.gqa, positions_T)
    for name, value in expected.items():
        assert relative(getattr(seen, name), value) < 1e-5, name
    assert float(seen.distance_HS[:, TOKENS:].sum()) > 0 or gaps == (1,)


@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("family", [{"window": 3}, {"softcap": 0.3}, {"window": 4, "softcap": 0.3}], ids=str)
def test_attended_as_some_families_attend(layer: SourceLayer, family: dict[str, Any], gap: int) -> None:
    """With a window, of which distances are those of positions, and with capped scores."""
    streams, gqa = random_streams(tokens=TOKENS), replace(layer.gqa, **family)
    x_TD, x_hat_TD, positions_T = streams.source_NTD[0], streams.converted_NTD[0], torch.arange(TOKENS)
    positions_T[4:] += gap
    seen = attended(layer.heads(x_TD), x_hat_TD, gqa, positions_T)
    expected, plain = (naive(x_TD, x_hat_TD, one, positions_T) for one in (gqa, layer.gqa))
    for name, value in expected.items():
        assert relative(getattr(seen, name), value) < 1e-5, name
        assert name == "query_Hdd" or relative(plain[name], value) > 1e-3, name


def test_distances_of_windows_that_reach_differently(layer: SourceLayer) -> None:
    streams = random_streams(tokens=TOKENS)
    streams.positions_NT = streams.positions_NT.clone()
    streams.positions_NT[1, TOKENS // 2 :] += 100
    distance_HS = observe(layer, streams, num_attended=16).distance_HS
    assert distance_HS.shape[1] == TOKENS + 100 and torch.allclose(distance_HS.sum(1), torch.ones(()).double())
    assert distance_HS[:, 100 + TOKENS // 2].min() > 0 and distance_HS[:, TOKENS:100].abs().max() == 0


def test_narrow_products_round_only_the_attended_moment(layer: SourceLayer) -> None:
    streams = random_streams(tokens=50)
    x_TD, x_hat_TD = streams.source_NTD[0], streams.converted_NTD[0]
    exact, narrow = (attended(layer.heads(x_TD), x_hat_TD, layer.gqa, narrow=dtype) for dtype in (None, torch.bfloat16))
    for field in fields(exact):
        rounded = relative(getattr(narrow, field.name), getattr(exact, field.name))
        assert 0 < rounded < 2**-8 if field.name == "attended_DD" else rounded == 0, field.name


def test_observe_is_the_mean_over_fitted_windows(layer: SourceLayer, device: torch.device) -> None:
    streams = random_streams(tokens=TOKENS, device=device)
    there = model_and_layer(device=device, heads=4, head_dim=16)[1]
    moments = observe(there, streams, num_attended=16)
    parts: list[dict[str, Tensor]] = []
    for index in range(3):
        x_TD = layer.into_attention(streams.source_NTD[index])
        x_hat_TD = layer.into_attention(streams.converted_NTD[index])
        part = naive(x_TD, x_hat_TD, layer.gqa)
        x_TD, x_hat_TD = x_TD.double(), x_hat_TD.double()
        part |= {"converted_DD": x_hat_TD.T @ x_hat_TD, "cross_DD": x_TD.T @ x_hat_TD}
        weight_T = part["received_T"] / part["received_T"].mean()
        part["received_D"] = weight_T @ x_hat_TD
        part["received_DD"] = (weight_T[:, None] * x_hat_TD).T @ x_hat_TD
        parts.append(part)
    mean: dict[str, Any] = {name: sum(part[name] for part in parts) / (3 * TOKENS) for name in parts[0]}
    mean["received_DD"] -= torch.outer(mean["received_D"], mean["received_D"])
    mean["distance_HS"] /= mean["distance_HS"].sum(1, keepdim=True)
    # the last of the three chooses ridges
    assert moments.aside_share == pytest.approx(1 / 3)
    energy = layer.into_attention(streams.source_NTD[2]).double().square().sum() / TOKENS
    assert moments.aside_energy == pytest.approx(float(energy), rel=1e-5)
    mean |= {f"aside{name}_DD": parts[2][of] / TOKENS for name, of in (("", "converted_DD"), ("_cross", "cross_DD"))}
    for field in fields(moments):
        if field.name in ("aside_share", "aside_energy"):
            continue
        value = getattr(moments, field.name)
        assert value.dtype == torch.float64 and relative(value, mean[field.name]) < 1e-5, field.name


def test_the_first_token_has_no_distance(layer: SourceLayer) -> None:
    """An attention sink says nothing about distances: with two tokens, only distance 0 is left."""
    streams = random_streams(tokens=2)
    distance_HS = observe(layer, streams, num_attended=16).distance_HS
    assert torch.equal(distance_HS[:, 1], torch.zeros(4, dtype=torch.float64))


def same(one: Moments, other: Moments) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_held_out_windows_never_enter(layer: SourceLayer) -> None:
    streams = random_streams(heldout=2)
    before = observe(layer, streams, 16)
    streams.source_NTD[2:], streams.converted_NTD[2:] = 7.0, -7.0
    after = observe(layer, streams, 16)
    assert same(before, after)
    streams.source_NTD[1], streams.converted_NTD[1] = 7.0, -7.0
    assert not torch.equal(before.converted_DD, observe(layer, streams, 16).converted_DD)


def test_equal_streams_have_one_moment(layer: SourceLayer) -> None:
    moments = observe(layer, random_streams(noise=0.0), 16)
    assert torch.equal(moments.converted_DD, moments.cross_DD)
    apart = observe(layer, random_streams(), 16)
    assert not torch.equal(apart.converted_DD, apart.cross_DD)


def test_attended_windows_are_spread(layer: SourceLayer) -> None:
    """Of nine fitted windows and three attended ones, one of each third is looked at."""
    streams = random_streams(windows=10)
    before = observe(layer, streams, num_attended=3)
    for unseen in (1, 2, 3, 5, 6, 7):
        streams.source_NTD[unseen] = torch.randn(10, 48)
    after = observe(layer, streams, num_attended=3)
    assert torch.equal(before.importance_H, after.importance_H)
    assert not torch.equal(before.cross_DD, after.cross_DD)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_processes_share_the_attended_windows(size: int) -> None:
    """Which take every n-th window: 32 of 128 are those of a model of 4,096 features."""
    for wanted, available in ((32, 128), (32, 160), (3, 9), (7, 7), (40, 9)):
        places = _spread(wanted, available)
        assert len(places) == min(wanted, available) and max(places) < available and min(places) == 0
    places = _spread(32, 128)
    assert all(sum(place // 4 == part for place in places) == 1 for part in range(32))
    share = [sum(place % size == rank for place in places) for rank in range(size)]
    assert max(share) - min(share) <= 4, share
