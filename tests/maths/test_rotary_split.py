"""The rotary split: what it keeps exactly, and that what is left over is what it says."""

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.maths.weights import THETA, fit_layer, gqa_weights, inputs, lively, moments, on, relative
from transmla.maths import rotary_split as module
from transmla.maths.attention import GqaWeights, MlaWeights, inverse_frequencies, mla_attention, rotate
from transmla.maths.closed_form import ClosedForm
from transmla.maths.reference import gqa_naive, mla_naive
from transmla.maths.rotary_split import (
    RotarySplit,
    chosen_frequencies,
    mean_turn,
    nearest_pairs,
    pair_gram,
    rotary_split,
    unit_keys,
)

# rank pressure under which no pair is left to the latent for turning with another frequency
ALL_PAIRS = 10.0


def split(
    gqa: GqaWeights,
    rope: int,
    theta: float | None = THETA,
    pressure: float = 0.3,
    device: torch.device = torch.device("cpu"),
    **changes: Any,
) -> RotarySplit:
    seen, gqa = on(device, moments(gqa, **changes)), gqa.to(device=device)
    return rotary_split(
        gqa, gqa.k_GdD, seen.converted_DD, seen.query_Hdd, seen.importance_H, seen.distance_HS, rope, theta, pressure
    )


def not_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left over is read as if it did not turn."""
    leftover = module._leftover
    monkeypatch.setattr(module, "_leftover", lambda still_P, *rest: leftover(torch.ones_like(still_P), *rest))


def not_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair that gains from turning counts alike, whatever the queries ask of it."""

    def by_gain(query_Hdd: Tensor, importance_H: Tensor, gain_HP: Tensor, num_groups: int) -> Tensor:
        return (gain_HP.unflatten(0, (num_groups, -1)).mean(dim=1) > 0).double()

    monkeypatch.setattr(module, "_pair_weights", by_gain)


def real_component(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real direction per bucket instead of a complex one."""

    def top(gram_GBGB: Tensor, omega_GB: Tensor) -> Tensor:
        weighted = (omega_GB[..., None, None] * gram_GBGB * omega_GB).flatten(2).flatten(0, 1)
        return torch.linalg.eigh(weighted.real)[1][:, -1].to(torch.complex128).unflatten(0, omega_GB.shape)

    monkeypatch.setattr(module, "_top_component", top)


def at_distance(gqa: GqaWeights, distance: int, size: int = 30) -> dict[str, Tensor]:
    """Every head looks exactly that far back."""
    weights_HS = torch.zeros(len(gqa.q_HdD), size, dtype=torch.float64)
    weights_HS[:, distance] = 1
    return {"distance_HS": weights_HS}


def scores(gqa: GqaWeights, found: RotarySplit, x_D: Tensor, y_D: Tensor, distance: int) -> tuple[Tensor, Tensor]:
    """Scores [H] of query x at position `distance` and key y at 0: the source's, and rotary plus leftover."""
    later, first = torch.tensor([distance]), torch.tensor([0])
    q_Hd, k_Gd = gqa.q_HdD @ x_D, gqa.k_GdD @ y_D
    k_Hd = k_Gd.repeat_interleave(len(q_Hd) // len(k_Gd), 0)
    frequencies = gqa.inv_freq_P
    source = rotate(q_Hd[:, None], frequencies, later) * rotate(k_Hd[:, None], frequencies, first)
    q_rope_He, k_rope_e = found.q_rope_HeD @ x_D, found.k_rope_eD @ y_D
    turned = rotate(q_rope_He[:, None], found.inv_freq_M, later) * rotate(k_rope_e[None], found.inv_freq_M, first)
    still_H = (q_Hd * (found.leftover_HdK @ k_Gd.flatten())).sum(1)
    return source.sum((1, 2)), turned.sum((1, 2)) + still_H


def test_one_key_head_at_full_width_leaves_nothing_over(device: torch.device) -> None:
    gqa = gqa_weights(groups=1)
    assert split(gqa, rope=8, device=device).leftover_HdK.abs().max() < 1e-12
    assert split(gqa, rope=6, device=device).leftover_HdK.abs().max() > 0.1
    assert split(gqa, rope=8, theta=50.0, device=device).leftover_HdK.abs().max() > 0.1


@pytest.mark.parametrize("head_dim", [64, 256])
def test_sizes_of_real_models(head_dim: int) -> None:
    gqa = gqa_weights(heads=2, groups=1, head_dim=head_dim, hidden=256)
    assert split(gqa, rope=head_dim).leftover_HdK.abs().max() < 1e-12
    assert split(gqa, rope=head_dim - 2).leftover_HdK.abs().max() > 0.1


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("rope", "theta"), [(8, THETA), (4, THETA), (2, 50.0), (8, 3.0)])
@pytest.mark.parametrize("variant", [None, real_component, not_weighted])
def test_rotary_part_and_leftover_add_up(
    monkeypatch: pytest.MonkeyPatch, groups: int, rope: int, theta: float, variant: Any
) -> None:
    """At distance 0 nothing turns: the two parts together are the source's score, whatever was chosen."""
    if variant is not None:
        variant(monkeypatch)
    gqa = gqa_weights(groups=groups)
    found = split(gqa, rope, theta, **at_distance(gqa, 0))
    source, both = scores(gqa, found, lively(24, seed=6), lively(24, seed=7), distance=0)
    assert relative(both, source) < 1e-12


def test_a_head_of_one_distance_is_exact_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leftovers keep the phase of the distance that the head attends to."""
    gqa = gqa_weights(groups=2)
    x_D, y_D = lively(24, seed=6), lively(24, seed=7)
    found = split(gqa, 8, **at_distance(gqa, 2))
    source, both = scores(gqa, found, x_D, y_D, distance=2)
    assert relative(both, source) < 1e-12
    source, both = scores(gqa, found, x_D, y_D, distance=3)
    assert relative(both, source) > 0.05
    not_shrunk(monkeypatch)
    found = split(gqa, 8, **at_distance(gqa, 2))
    source, both = scores(gqa, found, x_D, y_D, distance=2)
    assert relative(both, source) > 0.05


def test_leftover_is_the_complex_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """leftover k = c_p (z_p - captured z_p) on complex numbers, for any keys."""
    gqa = gqa_weights(groups=2)
    not_weighted(monkeypatch)
    whole = split(gqa, 4, pressure=ALL_PAIRS, **at_distance(gqa, 0)).leftover_HdK
    shrunk = split(gqa, 4, pressure=ALL_PAIRS).leftover_HdK
    turn_HP = mean_turn(moments(gqa).distance_HS, gqa.inv_freq_P)
    k_K = lively(16, seed=8)
    rest_HP = torch.complex(*(whole @ k_K).chunk(2, dim=1))
    assert relative(torch.view_as_real(turn_HP * rest_HP).transpose(1, 2).flatten(1), shrunk @ k_K) < 1e-12


def test_one_rotary_key_per_group_is_grouped_query_attention() -> None:
    """Rotary keys of all groups, each read by its own heads only, lose nothing; one key less does."""
    gqa = gqa_weights(groups=2)
    heads, head_dim, hidden = gqa.q_HdD.shape
    k_parts, q_parts = [], []
    for group, rows in enumerate((slice(0, 2), slice(2, 4))):
        found = split(replace(gqa, q_HdD=gqa.q_HdD[rows], k_GdD=gqa.k_GdD[group : group + 1]), head_dim)
        own_HeD = torch.zeros(heads, head_dim, hidden, dtype=torch.float64)
        own_HeD[rows] = found.q_rope_HeD
        k_parts.append(found.k_rope_eD)
        q_parts.append(own_HeD)

    def side_by_side(parts: list[Tensor]) -> Tensor:
        """Half-split: the real parts of all keys, then the imaginary ones."""
        halves = zip(*(part.chunk(2, dim=-2) for part in parts), strict=True)
        return torch.cat([piece for half in halves for piece in half], dim=-2)

    select_Hvr = torch.eye(2 * head_dim, dtype=torch.float64).view(2, head_dim, -1).repeat_interleave(2, 0)
    mla = MlaWeights(
        q_nope_HnD=torch.zeros(heads, 1, hidden, dtype=torch.float64),
        q_rope_HeD=side_by_side(q_parts),
        kv_down_rD=gqa.v_GdD.flatten(0, 1),
        k_rope_eD=side_by_side(k_parts),
        k_up_Hnr=torch.zeros(heads, 1, 2 * head_dim, dtype=torch.float64),
        v_up_Hvr=select_Hvr,
        o_DHv=gqa.o_DHd,
        inv_freq_M=gqa.inv_freq_P.repeat(2),
        scaling=gqa.scaling,
    )
    x_TD = inputs()
    expected = gqa_naive(x_TD, gqa)
    assert relative(mla_naive(x_TD, mla), expected) < 1e-12
    without = replace(mla, k_rope_eD=side_by_side([k_parts[0], torch.zeros_like(k_parts[1])]))
    assert relative(mla_naive(x_TD, without), expected) > 0.1


@pytest.mark.parametrize("query_weighted", [True, False])
def test_complex_component_carries_most(monkeypatch: pytest.MonkeyPatch, query_weighted: bool) -> None:
    """Of the weighted energy of a bucket, a complex direction carries at least as much as a real one."""
    gqa, carried = gqa_weights(groups=2), []
    if not query_weighted:
        not_weighted(monkeypatch)
    for is_complex in (True, False):
        if not is_complex:
            real_component(monkeypatch)
        k_rope_eD = split(gqa, 2, pressure=ALL_PAIRS).k_rope_eD
        carried.append(float((k_rope_eD @ moments(gqa).converted_DD * k_rope_eD).sum()))
    assert carried[0] > 1.01 * carried[1]
    if query_weighted:
        return
    z_BD = torch.complex(*(half.flatten(0, 1) for half in gqa.k_GdD.chunk(2, dim=1)))
    gram = z_BD @ moments(gqa).converted_DD.to(z_BD.dtype) @ z_BD.mH
    for seed in range(20):
        a_B = torch.complex(lively(8, seed=seed), lively(8, seed=100 + seed))
        assert float((a_B.conj() @ gram @ a_B).real) / float(a_B.norm()) ** 2 < carried[0]


@pytest.mark.parametrize("query_weighted", [True, False])
def test_pairs_that_would_turn_wrongly_stay_in_the_latent(
    monkeypatch: pytest.MonkeyPatch, query_weighted: bool
) -> None:
    """One target pair of frequency 1: a slow pair would turn with it over long distances, and not at distance 0."""
    gqa = gqa_weights(groups=2)
    slowest = len(gqa.inv_freq_P) - 1
    not_shrunk(monkeypatch)
    if not query_weighted:
        not_weighted(monkeypatch)

    def loses_something(found: RotarySplit) -> bool:
        """Whether the leftover of head 0 differs from its whole slowest pair."""
        own = found.leftover_HdK[0, slowest]
        return bool((own - torch.eye(len(own), dtype=own.dtype)[slowest]).abs().max() > 1e-9)

    assert loses_something(split(gqa, 2, **at_distance(gqa, 0)))
    assert not loses_something(split(gqa, 2, **at_distance(gqa, 3)))


@pytest.mark.parametrize("distance", [0, 3])
def test_keys_of_unit_size_change_no_score(distance: int) -> None:
    gqa = gqa_weights(groups=2)
    moment_DD = moments(gqa).converted_DD
    found = split(gqa, 4, **at_distance(gqa, 3))
    even = unit_keys(found, moment_DD)

    def squares(one: RotarySplit) -> Tensor:
        return (one.k_rope_eD @ moment_DD * one.k_rope_eD).sum(1).unflatten(0, (2, -1)).mean(0)

    assert squares(even) == pytest.approx(torch.ones(2)) and squares(found) != pytest.approx(torch.ones(2), rel=0.1)
    x_D, y_D = lively(gqa.q_HdD.shape[2], seed=31), lively(gqa.q_HdD.shape[2], seed=32)
    assert relative(scores(gqa, even, x_D, y_D, distance)[1], scores(gqa, found, x_D, y_D, distance)[1]) < 1e-12
    nothing = unit_keys(replace(found, k_rope_eD=0 * found.k_rope_eD), moment_DD)
    assert not nothing.k_rope_eD.any() and torch.equal(nothing.q_rope_HeD, found.q_rope_HeD)


def test_queries_decide_what_is_carried() -> None:
    """A head that matters more keeps more of its rotary score."""
    gqa = gqa_weights(groups=2)
    errors = []
    for importance in ([1.0, 1.0, 1e-3, 1e-3], [1e-3, 1e-3, 1.0, 1.0]):
        found = split(gqa, 2, importance_H=torch.tensor(importance, dtype=torch.float64))
        errors.append(float(found.leftover_HdK[0].norm()))
    assert errors[0] < errors[1]


def test_both_halves_of_a_query_pair_count() -> None:
    """Turning all queries by a quarter swaps their real and imaginary parts and changes nothing that matters."""
    gqa = gqa_weights(groups=2)
    # no imaginary parts at all, then no real ones
    real_HPD = gqa.q_HdD.chunk(2, dim=1)[0]
    carried = []
    for halves in ([real_HPD, 0 * real_HPD], [0 * real_HPD, real_HPD]):
        k_rope_eD = split(replace(gqa, q_HdD=torch.cat(halves, dim=1)), 2).k_rope_eD
        carried.append(k_rope_eD.T @ k_rope_eD)
    assert relative(carried[0], carried[1]) < 1e-9


def test_nearest_pairs_goes_by_the_logarithm() -> None:
    targets = torch.tensor([1.0, 0.01], dtype=torch.float64)
    # 0.2 is nearer to 0.01 on a linear scale, 0.09 is nearer to it on the logarithmic one
    found = nearest_pairs(torch.tensor([1.0, 0.2, 0.09, 0.001], dtype=torch.float64), targets)
    assert found.tolist() == [0, 0, 1, 1]


def test_mean_turn_is_the_sum_over_distances() -> None:
    weights_HS = lively(3, 20, seed=1).softmax(-1)
    f_P = inverse_frequencies(THETA, 8)
    found = mean_turn(weights_HS, f_P)
    direct = sum(weights_HS[:, d, None] * torch.polar(torch.ones_like(f_P), -f_P * d) for d in range(20))
    assert isinstance(direct, Tensor) and relative(torch.view_as_real(found), torch.view_as_real(direct)) < 1e-12
    assert found.abs().max() <= 1
    assert all(slower > faster for faster, slower in pairwise(found.abs().mean(0).tolist()))
    assert torch.equal(mean_turn(torch.eye(1, 20, dtype=torch.float64), f_P), torch.ones(1, 4, dtype=torch.complex128))


def test_target_pairs_without_a_source_pair_stay_empty() -> None:
    """All of a target's pairs may be faster than all but a few of the source's."""
    gqa = gqa_weights(groups=2)
    found = split(gqa, 8, theta=1.5)
    empty = [m for m in range(4) if m not in nearest_pairs(gqa.inv_freq_P, found.inv_freq_M)]
    assert empty and not found.k_rope_eD[empty].any() and not found.q_rope_HeD[:, empty].any()
    assert found.leftover_HdK.isfinite().all()


def runs_of(bucket_P: Tensor) -> list[tuple[int, ...]]:
    found = [tuple((bucket_P == m).nonzero()[:, 0].tolist()) for m in range(int(bucket_P.max()) + 1)]
    assert all(run == tuple(range(run[0], run[-1] + 1)) for run in found), "neighbours"
    return found


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("num_pairs", [1, 2, 3])
def test_chosen_frequencies_are_the_best_of_all_cuts(groups: int, num_pairs: int) -> None:
    """Against every way to cut six pairs into runs, with and without pairs left out."""
    gqa = gqa_weights(groups=groups, head_dim=12)
    seen = moments(gqa)
    z_GPD, gram_GPGP = module._as_complex(gqa.k_GdD), pair_gram(gqa.k_GdD, seen.converted_DD)
    base_GP = 0.1 + lively(groups, 6, seed=50).abs()

    def weights(turned_B: Tensor, first: int = 0) -> Tensor:
        """Less the further a pair turns from its own frequency."""
        places = slice(first, first + len(turned_B))
        return base_GP[:, places] / (1 + (turned_B.log() - gqa.inv_freq_P[places].log()).abs())

    def worth(run: tuple[int, ...]) -> float:
        own = weights(gqa.inv_freq_P)
        energy_GP = torch.einsum("GPD,DE,GPE->GP", z_GPD, seen.converted_DD.to(z_GPD.dtype), z_GPD.conj()).real
        lead = max(run, key=lambda pair: float((own.square() * energy_GP)[:, pair].sum()))
        omega_GB = weights(gqa.inv_freq_P[lead].expand(6))[:, list(run)]
        rows = (omega_GB[..., None] * z_GPD[:, list(run)]).flatten(0, 1)
        return float(torch.linalg.eigvalsh(rows @ seen.converted_DD.to(rows.dtype) @ rows.mH)[-1])

    spans = [tuple(range(start, end)) for start in range(6) for end in range(start + 1, 7)]
    longest = -(-18 // num_pairs)
    best = max(
        sum(map(worth, chosen))
        for count in range(1, num_pairs + 1)
        for chosen in combinations([span for span in spans if len(span) <= longest], count)
        if len(set(sum(chosen, ()))) == sum(map(len, chosen))
    )
    inv_freq_M, bucket_P = chosen_frequencies(gqa.inv_freq_P, gram_GPGP, weights, num_pairs)
    found = runs_of(bucket_P)
    assert sum(map(worth, found)) == pytest.approx(best)
    assert [float(f) in gqa.inv_freq_P[list(run)].tolist() for f, run in zip(inv_freq_M, found, strict=False)] == [
        True
    ] * len(found)
    assert all(faster > slower for faster, slower in pairwise(inv_freq_M[: len(found)].tolist()))


@pytest.mark.parametrize(("groups", "head_dim", "rope"), [(1, 16, 4), (2, 16, 6), (1, 32, 8)])
def test_free_frequencies_lose_no_more_than_any_theta(groups: int, head_dim: int, rope: int) -> None:
    """Of a whole layer, on the mean over a few random ones."""
    errors: dict[float | None, list[float]] = {
        theta: [] for theta in (None, THETA, THETA**0.7, THETA ** (rope / head_dim))
    }
    for seed in range(4):
        gqa, x_TD = gqa_weights(groups=groups, head_dim=head_dim, hidden=48, seed=11 * seed), inputs(20, 48, seed=seed)
        for theta, found in errors.items():
            mla = fit_layer(gqa, moments(gqa), min(48, 2 * groups * head_dim), rope, theta, ClosedForm()).mla
            found.append(relative(mla_attention(x_TD, mla) @ mla.o_DHv.T, gqa_naive(x_TD, gqa)))
    means = {theta: sum(found) / 4 for theta, found in errors.items()}
    free = means.pop(None)
    assert free < 1.001 * min(means.values()) and free < 0.95 * means[THETA]


def test_as_many_free_pairs_as_the_source_has_keep_everything() -> None:
    found = split(gqa_weights(groups=1), 8, theta=None, pressure=ALL_PAIRS)
    assert torch.equal(found.inv_freq_M, inverse_frequencies(THETA, 8)) and found.leftover_HdK.abs().max() < 1e-9
