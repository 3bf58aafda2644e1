"""A whole layer: exact where the target can hold the source, and close to it where it cannot."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.live import LiveBytes
from tests.maths.weights import THETA, fit_layer, gqa_weights, inputs, lively, moments, on, relative
from transmla.maths import refit
from transmla.maths.attention import (
    GqaWeights,
    MlaWeights,
    feature_attention,
    grouped_attention,
    inverse_frequencies,
    mla_attention,
    over_features,
    with_one,
)
from transmla.maths.closed_form import (
    ClosedForm,
    Moments,
    _constant_D,
    _seen_of_constants,
    _with_unseen,
    aim,
    fit_aimed,
)
from transmla.maths.moment import raised
from transmla.maths.reference import gqa_naive
from transmla.maths.rotary_split import rotary_split

X_TD = inputs(20)


def output_error(gqa: GqaWeights, seen: Moments, rank: int, rope: int, theta: float = THETA, **method: object) -> float:
    mla = fit_layer(gqa, seen, rank, rope, theta, ClosedForm(**method)).mla  # type: ignore[arg-type]
    return relative(mla_attention(X_TD, mla) @ mla.o_DHv.T, gqa_naive(X_TD, gqa))


def not_weighted(seen: Moments) -> Moments:
    """All tokens count alike, whatever attention they receive."""
    return replace(seen, received_DD=seen.converted_DD, attended_DD=seen.converted_DD)


@pytest.mark.parametrize("rank", [8, 11])
@pytest.mark.parametrize("weighted", [True, False])
def test_multi_query_attention_is_converted_exactly(rank: int, weighted: bool, device: torch.device) -> None:
    """One key/value head, the rotary key as wide as it, the latent as wide as the value."""
    gqa = gqa_weights(groups=1)
    seen = moments(gqa)
    seen = on(device, seen if weighted else not_weighted(seen))
    found = fit_layer(gqa.to(device=device), seen, rank, 8, THETA, ClosedForm()).mla
    assert {value.device.type for value in vars(found).values() if isinstance(value, Tensor)} == {device.type}
    found = found.to(device="cpu")
    assert relative(mla_attention(X_TD, found) @ found.o_DHv.T, gqa_naive(X_TD, gqa)) < 1e-9


@pytest.mark.parametrize(("heads", "head_dim", "rank"), [(2, 256, 256), (4, 288, 288)])
def test_sizes_of_real_models(heads: int, head_dim: int, rank: int) -> None:
    """Hidden sizes that are multiples of 256, latents of 256 and more: exact where the target holds the source."""
    gqa = gqa_weights(heads=heads, groups=1, head_dim=head_dim, hidden=256)
    x_TD = inputs(6, 256)
    wide, narrow = (
        fit_layer(gqa, moments(gqa), size, head_dim, THETA, ClosedForm()).mla for size in (min(rank, 256), 200)
    )
    expected = gqa_naive(x_TD, gqa)
    assert relative(mla_attention(x_TD, wide) @ wide.o_DHv.T, expected) < 1e-7
    assert relative(mla_attention(x_TD, narrow) @ narrow.o_DHv.T, expected) > 0.01


@pytest.mark.parametrize(("rank", "rope", "theta"), [(7, 8, THETA), (8, 6, THETA), (8, 8, 50.0)])
def test_one_size_smaller_is_not_exact(rank: int, rope: int, theta: float) -> None:
    gqa = gqa_weights(groups=1)
    assert output_error(gqa, moments(gqa), rank, rope, theta) > 0.01


@pytest.mark.parametrize("groups", [2, 4])
def test_without_positions_any_source_is_converted_exactly(groups: int) -> None:
    """Sources that hardly turn lose nothing to the latent, if that holds all keys and values."""
    gqa = replace(gqa_weights(groups=groups), inv_freq_P=torch.full((4,), 1e-13, dtype=torch.float64))
    rank = min(2 * groups * 8, 24)
    found = fit_layer(gqa, moments(gqa), rank, 2, 1e13, ClosedForm())
    still = replace(found.mla, inv_freq_M=torch.zeros(1, dtype=torch.float64))
    assert relative(mla_attention(X_TD, still) @ still.o_DHv.T, gqa_naive(X_TD, gqa)) < 1e-7


def test_loss_is_the_error_of_scores_and_values_in_the_output() -> None:
    """Per head: importance * |score error|^2 under received inputs, |Wo_i value error|^2 under attended ones."""
    gqa, method = gqa_weights(heads=6, groups=2, hidden=30), ClosedForm(key_weight=3.0, plain_share=0.25, unseen=0.0)
    seen = moments(gqa)
    found = fit_layer(gqa, seen, 9, 4, THETA, method)
    split = rotary_split(
        gqa, gqa.k_GdD, seen.converted_DD, seen.query_Hdd, seen.importance_H, seen.distance_HS, 4, THETA
    )
    attended_DD = 0.25 * seen.converted_DD + 0.75 * seen.attended_DD

    def energy(latent_share: float) -> float:
        total = 0.0
        for head in range(6):
            key_dD = split.leftover_HdK[head] @ gqa.k_GdD.flatten(0, 1)
            key_dD = key_dD - latent_share * found.mla.k_up_Hnr[head] @ found.mla.kv_down_rD
            score = (seen.query_Hdd[head] * (key_dD @ seen.received_DD @ key_dD.T)).sum() * gqa.scaling**2
            value_dD = gqa.v_GdD[head // 3] - latent_share * found.mla.v_up_Hvr[head] @ found.mla.kv_down_rD
            output_DD = gqa.o_DHd[:, 8 * head : 8 * head + 8] @ value_dD
            total += float(3.0 * seen.importance_H[head] * score + (output_DD @ attended_DD * output_DD).sum())
        return total

    assert found.latent_loss == pytest.approx(energy(1.0) / energy(0.0), rel=1e-6)
    assert 0.01 < found.latent_loss < 0.9


def test_directions_that_no_token_has_are_not_blown_up() -> None:
    """With fewer directions in the tokens than values in the latent, latents of other tokens are not huge."""
    gqa = gqa_weights(groups=2)
    basis_DD = torch.linalg.qr(lively(24, 24, seed=8)).Q
    seen_TD, unseen_TD = (lively(400, 5, seed=9 + part) @ basis_DD[5 * part : 5 * part + 5] for part in (0, 1))
    moment_DD = seen_TD.T @ seen_TD / len(seen_TD)
    same = dict.fromkeys(("converted_DD", "cross_DD", "received_DD", "attended_DD"), moment_DD)

    def sizes(**method: float) -> tuple[float, float]:
        down_rD = fit_layer(gqa, moments(gqa, **same), 12, 8, THETA, ClosedForm(**method)).mla.kv_down_rD
        return tuple(float((x_TD @ down_rD.T).square().mean().sqrt()) for x_TD in (seen_TD, unseen_TD))  # type: ignore[return-value]

    (seen, unseen), (_, unseen_before) = sizes(), sizes(unseen=0.0)
    assert 0.3 < seen < 3 and unseen < 1e3 * seen and unseen_before > 1e3 * seen, (seen, unseen, unseen_before)


@pytest.mark.parametrize("biased", [False, True])
def test_what_is_added_for_unseen_directions(biased: bool) -> None:
    """A share of the mean energy, none for the constant of a biased input, which is no direction of any token."""
    moment_DD = torch.diag(torch.tensor([4.0, 2.0, 0.0, 6.0], dtype=torch.float64))
    added_D = (_with_unseen(moment_DD, 0.5, biased) - moment_DD).diagonal()
    assert added_D.tolist() == ([1.0, 1.0, 1.0, 0.0] if biased else [1.5, 1.5, 1.5, 1.5])


def test_more_rank_loses_less() -> None:
    gqa = gqa_weights()
    losses = [fit_layer(gqa, moments(gqa), rank, 4, THETA, ClosedForm()).latent_loss for rank in (2, 6, 12, 24)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-9


def test_a_distorted_stream_is_repaired() -> None:
    """The converted stream is a linear map of the source's: the conversion undoes it."""
    gqa, clean = gqa_weights(groups=1), moments(gqa_weights(groups=1))
    distort_DD: Tensor = torch.eye(24, dtype=torch.float64) + 0.05 * lively(24, 24, seed=6)
    seen = moments(
        gqa,
        converted_DD=distort_DD @ clean.converted_DD @ distort_DD.T,
        cross_DD=clean.converted_DD @ distort_DD.T,
        received_DD=distort_DD @ clean.received_DD @ distort_DD.T,
        attended_DD=distort_DD @ clean.attended_DD @ distort_DD.T,
    )
    errors = []
    for ridge in (1e-12, 1e12):
        mla = fit_layer(gqa, seen, 8, 8, THETA, ClosedForm(stream_ridge=ridge)).mla
        errors.append(relative(mla_attention(X_TD @ distort_DD.T, mla) @ mla.o_DHv.T, gqa_naive(X_TD, gqa)))
    assert errors[0] < 1e-8 and errors[1] > 0.05


def test_the_ridge_of_the_stream_is_chosen_on_tokens_set_aside() -> None:
    """By what the other tokens alone would have given; then the estimate is fitted to all of them."""
    ridges, chosen = (1e-3, 1e-2, 1e-1, 1.0, 10.0), []
    for seed in range(12):
        x_hat_TD = lively(20, 8, seed=100 + seed)
        x_TD = x_hat_TD @ (torch.eye(8) + 0.2 * lively(8, 8, seed=200 + seed)).T + lively(20, 8, seed=300 + seed)

        def seen(part: slice, x_TD: Tensor = x_TD, x_hat_TD: Tensor = x_hat_TD) -> tuple[Tensor, Tensor]:
            x_TD, x_hat_TD = x_TD[part], x_hat_TD[part]
            return x_hat_TD.T @ x_hat_TD / len(x_TD), x_TD.T @ x_hat_TD / len(x_TD)

        (all_DD, cross_DD), (aside_DD, aside_cross_DD) = seen(slice(20)), seen(slice(12, 20))
        found = replace(
            moments(gqa_weights()), converted_DD=all_DD, cross_DD=cross_DD, aside_DD=aside_DD, aside_share=0.4,
            aside_cross_DD=aside_cross_DD, aside_energy=float(x_TD[12:].square().sum() / 8),
        )  # fmt: skip
        estimate_DD, ridge = found.estimate_DD(ridges)
        errors = [
            float((x_TD[12:] - x_hat_TD[12:] @ refit.stream_map(*seen(slice(12)), one).T).square().sum())
            for one in ridges
        ]
        last = next((n for n in range(4) if errors[n + 1] >= (1 - refit.GAIN) * errors[n]), 4)
        assert ridge == ridges[last] and relative(estimate_DD, refit.stream_map(all_DD, cross_DD, ridge)) < 1e-12
        chosen.append(ridge)
    assert len(set(chosen)) > 2
    assert ClosedForm(stream_ridge=0.5, ridge_steps=(1.0, 8.0)).ridges(0.5) == (0.5, 4.0)


def test_heads_of_a_group_share_their_values() -> None:
    gqa = gqa_weights(heads=6, groups=2)
    v_up_Hvr = fit_layer(gqa, moments(gqa), 6, 4, THETA, ClosedForm()).mla.v_up_Hvr
    assert torch.equal(v_up_Hvr[0], v_up_Hvr[2]) and not torch.equal(v_up_Hvr[2], v_up_Hvr[3])


def test_queries_of_full_rank_lose_nothing() -> None:
    gqa = gqa_weights(heads=3, groups=1)
    wide = fit_layer(gqa, moments(gqa), 8, 8, THETA, ClosedForm())
    narrow = fit_layer(gqa, moments(gqa), 8, 8, THETA, ClosedForm(), q_lora_rank=24)
    assert wide.query_loss is None and narrow.query_loss is not None and narrow.query_loss < 1e-12
    assert relative(mla_attention(X_TD, narrow.mla), mla_attention(X_TD, wide.mla)) < 1e-7


def test_query_loss_is_the_energy_of_score_errors() -> None:
    """Per head: importance * scaling^2 * E[<dq, k>^2], of unrotated keys, and of the rotary key over all turns."""
    gqa = gqa_weights(heads=6, groups=2, hidden=30)
    seen = moments(gqa)
    wide = fit_layer(gqa, seen, 9, 4, THETA, ClosedForm()).mla
    found = fit_layer(gqa, seen, 9, 4, THETA, ClosedForm(), q_lora_rank=11)
    mla = found.mla
    assert mla.q_down_qD is not None and mla.q_down_qD.shape == (11, 30)
    turns = torch.linspace(0, 2 * torch.pi, 9, dtype=torch.float64)[:-1]
    lost = energy = 0.0
    for head in range(6):
        key = wide.k_up_Hnr[head] @ wide.kv_down_rD
        weight = seen.importance_H[head] * wide.scaling**2
        for wanted, error in (
            (wide.q_nope_HnD[head], wide.q_nope_HnD[head] - mla.q_nope_HnD[head] @ mla.q_down_qD),
            (wide.q_rope_HeD[head], wide.q_rope_HeD[head] - mla.q_rope_HeD[head] @ mla.q_down_qD),
        ):
            for which, query in enumerate((wanted, error)):
                asked = query @ seen.converted_DD @ query.T
                if len(query) == 8:
                    total = weight * (asked * (key @ seen.received_DD @ key.T)).sum()
                else:  # E[q q^T] against E[k k^T] turned by every angle
                    total = torch.zeros(())
                    for turn in turns:
                        cos, sin = turn.cos() * torch.eye(2), turn.sin() * torch.eye(2)
                        rotation = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]).double()
                        turned = rotation @ wide.k_rope_eD
                        keys = (turned @ seen.converted_DD @ turned.T).diagonal()
                        total = total + weight * (asked.diagonal() * keys).sum() / len(turns)
                lost, energy = lost + which * float(total), energy + (1 - which) * float(total)
    assert found.query_loss == pytest.approx(lost / energy, rel=1e-6) and 0.01 < lost / energy < 0.9


def test_narrow_queries_beat_a_plain_svd() -> None:
    gqa = gqa_weights(heads=6, groups=2)
    seen = moments(gqa)
    wide = fit_layer(gqa, seen, 9, 4, THETA, ClosedForm()).mla
    narrow = fit_layer(gqa, seen, 9, 4, THETA, ClosedForm(), q_lora_rank=11).mla
    rows = torch.cat([wide.q_nope_HnD.flatten(0, 1), wide.q_rope_HeD.flatten(0, 1)])
    u, s, right = torch.linalg.svd(rows, full_matrices=False)
    nope, rope = (u[:, :11] * s[:11]).split([48, 24])
    plain = replace(
        wide, q_down_qD=right[:11], q_nope_HnD=nope.unflatten(0, (6, 8)), q_rope_HeD=rope.unflatten(0, (6, 4))
    )
    wanted = mla_attention(X_TD, wide)
    assert relative(mla_attention(X_TD, narrow), wanted) < relative(mla_attention(X_TD, plain), wanted)


def biased(groups: int = 1) -> GqaWeights:
    """The last of 25 inputs is a bias."""
    return replace(gqa_weights(groups=groups, hidden=25), biased=True, o_DHd=lively(24, 32, seed=3) / 5)


def moments_with_one(gqa: GqaWeights, constant: float | None = None) -> Moments:
    """constant: the first input of all tokens"""
    x_TD = with_one(of_constant(inputs(500), constant))
    weights_T = lively(500, seed=3).square()
    weights_T = weights_T / weights_T.mean()
    mean_D = (x_TD * weights_T[:, None]).mean(0)
    moment_DD = x_TD.T @ x_TD / len(x_TD)
    received_DD = (x_TD * weights_T[:, None]).T @ x_TD / len(x_TD) - torch.outer(mean_D, mean_D)
    return replace(
        moments(replace(gqa, q_HdD=gqa.q_HdD[..., :-1])),
        converted_DD=moment_DD,
        cross_DD=moment_DD,
        received_DD=received_DD,
        attended_DD=moment_DD,
        query_Hdd=gqa.q_HdD @ moment_DD @ gqa.q_HdD.transpose(1, 2),
    )


def of_constant(x_TD: Tensor, constant: float | None) -> Tensor:
    return x_TD if constant is None else torch.cat([torch.full_like(x_TD[:, :1], constant), x_TD[:, 1:]], dim=1)


def with_output_bias(mla: MlaWeights) -> Tensor:
    assert mla.o_bias_D is not None
    return mla_attention(X_TD, mla) @ mla.o_DHv.T + mla.o_bias_D


@pytest.mark.parametrize("q_rank", [None, 25])
def test_biases_are_kept_exactly(q_rank: int | None) -> None:
    """One key head, all of it rotary, and values of full rank; the latent needs no bias for it."""
    gqa = biased()
    mla = fit_layer(gqa, moments_with_one(gqa), 8, 8, THETA, ClosedForm(), q_rank).mla
    wanted = gqa_naive(X_TD, gqa)
    assert relative(with_output_bias(mla), wanted) < 1e-7
    assert mla.kv_down_rD.shape == (8, 24) and mla.k_rope_bias_e is not None
    for name in ("q_nope_bias_Hn", "q_rope_bias_He", "k_rope_bias_e", "o_bias_D"):
        changed = replace(mla, **{name: torch.zeros_like(getattr(mla, name))})
        if name != "q_nope_bias_Hn":  # nothing of the keys is left to the latent here
            assert relative(with_output_bias(changed), wanted) > 1e-2, name


@pytest.mark.parametrize("q_rank", [None, 24])
@pytest.mark.parametrize(("constant", "error"), [(3.0, 1e-6), (None, None)])
def test_biases_are_read_from_what_is_constant(constant: float | None, error: float | None, q_rank: int | None) -> None:
    """However large they are: exactly, if the input holds a constant; if it holds none, they are missed."""
    gqa, x_TD = biased(), of_constant(X_TD, constant)
    gqa = replace(gqa, k_GdD=torch.cat([gqa.k_GdD[..., :-1], 30 * gqa.k_GdD[..., -1:]], dim=-1))
    seen = moments_with_one(gqa, constant)
    # the ridge of the regression is what unseen tokens have
    mla = fit_layer(gqa, seen, 8, 8, THETA, ClosedForm(unseen=1e-12), q_rank, biases=False).mla
    assert not any(value is not None for name, value in vars(mla).items() if "_bias_" in name)
    assert mla.kv_down_rD.shape == (8, 24)
    found = relative(mla_attention(x_TD, mla) @ mla.o_DHv.T, gqa_naive(x_TD, gqa))
    assert found > 0.1 if error is None else found < error


def test_a_bias_of_keys_that_hardly_turn_is_left_out() -> None:
    """The softmax does not see it, and whatever stands for it in the input would vary from token to token."""
    gqa = biased()
    gqa = replace(
        gqa,
        q_HdD=torch.cat([gqa.q_HdD[..., :-1], torch.zeros_like(gqa.q_HdD[..., -1:])], dim=-1),
        k_GdD=torch.cat([gqa.k_GdD[..., :-1], 1000 * gqa.k_GdD[..., -1:]], dim=-1),
        v_GdD=torch.cat([gqa.v_GdD[..., :-1], torch.zeros_like(gqa.v_GdD[..., -1:])], dim=-1),
        inv_freq_P=torch.full((4,), 1e-13, dtype=torch.float64),
    )
    mla = fit_layer(gqa, moments_with_one(gqa), 16, 2, 1e13, ClosedForm(), biases=False).mla
    assert relative(mla_attention(X_TD, mla) @ mla.o_DHv.T, gqa_naive(X_TD, gqa)) < 1e-6
    # of pairs that turn, it counts
    gqa = replace(gqa, inv_freq_P=inverse_frequencies(THETA, 8))
    mla = fit_layer(gqa, moments_with_one(gqa), 16, 8, THETA, ClosedForm(), biases=False).mla
    assert relative(mla_attention(X_TD, mla) @ mla.o_DHv.T, gqa_naive(X_TD, gqa)) > 0.1


@pytest.mark.parametrize("gqa", [gqa_weights(), biased(2)], ids=["alone", "beside others"])
def test_a_bias_of_the_output_is_dropped(gqa: GqaWeights) -> None:
    gqa = replace(gqa, o_bias_D=torch.ones(24, dtype=torch.float64))
    seen = moments_with_one(gqa) if gqa.biased else moments(gqa)
    assert fit_layer(gqa, seen, 8, 8, THETA, ClosedForm()).mla.o_bias_D is not None
    assert fit_layer(gqa, seen, 8, 8, THETA, ClosedForm(), biases=False).mla.o_bias_D is None


def test_what_scores_see_of_a_constant_in_the_keys() -> None:
    gqa = gqa_weights(groups=2)
    seen = moments(gqa)
    found_GP = _seen_of_constants(gqa, seen)
    distances = torch.arange(30, dtype=torch.float64)
    for group, heads in ((0, (0, 1)), (1, (2, 3))):
        for pair, frequency in enumerate(gqa.inv_freq_P):
            turn_HS = torch.exp(-1j * frequency * distances).expand(4, -1)
            varied_H = 1 - (seen.distance_HS * turn_HS).sum(1).abs().square()
            energy_H = seen.query_Hdd[:, pair, pair] + seen.query_Hdd[:, pair + 4, pair + 4]
            weight_H = energy_H * seen.importance_H
            expected = sum(weight_H[head] * varied_H[head] for head in heads) / sum(weight_H[head] for head in heads)
            assert float(found_GP[group, pair]) == pytest.approx(float(expected), rel=1e-9)


def test_the_constant_of_an_input() -> None:
    """The regression, and what it misses on other tokens with the same moment."""
    x_TD = of_constant(inputs(500), None) + torch.linspace(1, 2, 24).double()
    one_TD = with_one(x_TD)
    a_D, missed = _constant_D(one_TD.T @ one_TD / 500 * 7, 0.0)
    assert relative(a_D, torch.linalg.lstsq(x_TD, torch.ones(500, 1).double()).solution[:, 0]) < 1e-8
    assert missed == pytest.approx(float((x_TD @ a_D - 1).square().mean()), rel=1e-6) and missed > 1e-4
    held, more = _constant_D(one_TD.T @ one_TD / 500, 0.1)
    assert held.norm() < a_D.norm() and more > missed


def test_a_bias_of_the_values_takes_no_rank() -> None:
    """However large: what all tokens share goes into the bias of the output."""
    gqa = biased()
    large = replace(gqa, v_GdD=torch.cat([gqa.v_GdD[..., :-1], 1000 * gqa.v_GdD[..., -1:]], dim=-1))
    found = [fit_layer(one, moments_with_one(one), 4, 8, THETA, ClosedForm()) for one in (gqa, large)]
    assert found[1].latent_loss == pytest.approx(found[0].latent_loss, rel=1e-3)


def test_features_are_kept_exactly() -> None:
    """Of a block whose keys and values come from elsewhere: one group of 8 + 8 features."""
    gqa = over_features(gqa_weights(groups=1), 1, 4, 8, 8)
    f_TF, q_HTd = inputs(500, 16), lively(4, 500, 8, seed=30)
    moment_FF = f_TF.T @ f_TF / 500
    seen = replace(
        moments(gqa_weights(groups=1, hidden=16)),
        converted_DD=moment_FF, cross_DD=moment_FF, received_DD=moment_FF, attended_DD=moment_FF,
        query_Hdd=q_HTd.transpose(1, 2) @ q_HTd / 500,
    )  # fmt: skip
    f_TF, q_HTd = f_TF[:12], q_HTd[:, :12]
    wanted = grouped_attention(q_HTd, f_TF[None, :, :8], f_TF[None, :, 8:], gqa)
    for rank, same in ((8, True), (7, False)):
        mla = fit_layer(gqa, seen, rank, 8, THETA, ClosedForm()).mla
        error = relative(feature_attention(q_HTd, f_TF, mla), wanted)
        assert (error < 1e-7) if same else (error > 1e-3)
    assert mla.q_rope_HeD.shape == (4, 8, 8) and torch.equal(mla.q_nope_HnD, torch.eye(8).double().expand(4, -1, -1))


def test_pairs_that_stand_are_left_to_the_latent() -> None:
    """Partial rotary embeddings: half of the pairs turn, and four rotary values hold them exactly."""
    half_P = torch.cat([inverse_frequencies(THETA, 4), torch.zeros(2, dtype=torch.float64)])
    gqa = replace(gqa_weights(groups=1), inv_freq_P=half_P)
    mla = fit_layer(gqa, moments(gqa), 16, 4, THETA, ClosedForm()).mla
    assert relative(mla_attention(X_TD, mla) @ mla.o_DHv.T, gqa_naive(X_TD, gqa)) < 1e-7


@pytest.mark.parametrize("held", [False, True])
def test_memory_of_the_size_of_the_moments(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In hidden x hidden float64 beyond the moments: both sides of a regression on some of the tokens, its factors, its
    right side and its answer. Holding on to what was factored would show."""
    hidden, method = 192, ClosedForm()
    exact = gqa_weights(heads=12, groups=1, head_dim=16, hidden=hidden)
    gqa, plain = exact.to(dtype=torch.float32), moments(exact)
    seen = replace(plain, aside_DD=plain.converted_DD.clone(), aside_cross_DD=0.9 * plain.converted_DD)
    seen = replace(seen, aside_share=0.25, aside_energy=float(plain.converted_DD.trace()))
    kept: list[Tensor] = []

    def keeping(moment_FF: Tensor, by: float) -> Tensor:
        kept.append(raised(moment_FF, by))
        return kept[-1]

    if held:
        monkeypatch.setattr(refit, "raised", keeping)
    with LiveBytes() as aiming:
        aimed = aim(gqa, seen, method)
    seen = seen.of_converted()
    with LiveBytes() as fitting:
        found = fit_aimed(aimed, seen, 24, 8, THETA, method).mla
    sizes = [live.peak / (8 * hidden**2) for live in (aiming, fitting)]
    assert (sizes[0] <= 5.1) is not held and sizes[1] <= 4.3
    assert held or aiming.now / (8 * hidden**2) <= 2.2  # queries and output projection are the largest that are kept
    assert found.q_nope_HnD is aimed.gqa.q_HdD
