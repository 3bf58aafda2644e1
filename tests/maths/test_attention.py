"""The fast attention of both forms is the slow obvious one, and rotation is what gives it positions."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.maths.weights import THETA, gqa_weights, inputs, lively, mla_weights, relative
from transmla.maths.attention import (
    feature_attention,
    features,
    gqa_attention,
    inverse_frequencies,
    mla_attention,
    rotate,
)
from transmla.maths.reference import gqa_naive, mla_naive

X_TD = inputs()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gqa_is_the_naive_one(groups: int, device: torch.device) -> None:
    gqa = gqa_weights(groups=groups)
    there = gqa.to(device=device)
    assert relative(gqa_attention(X_TD.to(device), there) @ there.o_DHd.T, gqa_naive(X_TD, gqa)) < 1e-12


@pytest.mark.parametrize(("rope", "value"), [(6, 5), (2, 20), (8, 14)])
def test_mla_is_the_naive_one(rope: int, value: int, device: torch.device) -> None:
    """Values narrower and wider than keys, and as wide."""
    mla = mla_weights(rope=rope, value=value)
    there = mla.to(device=device)
    assert relative(mla_attention(X_TD.to(device), there) @ there.o_DHv.T, mla_naive(X_TD, mla)) < 1e-12


def test_sizes_of_real_models() -> None:
    """A hidden size that is a multiple of 256, a latent wider than that, heads of 64: nothing depends on being tiny."""
    gqa = gqa_weights(heads=8, groups=2, head_dim=64, hidden=512)
    mla = mla_weights(heads=8, hidden=512, rank=320, rope=32, nope=64, value=64, q_rank=288)
    x_TD = lively(5, 512, seed=9)
    assert relative(gqa_attention(x_TD, gqa) @ gqa.o_DHd.T, gqa_naive(x_TD, gqa)) < 1e-12
    assert relative(mla_attention(x_TD, mla) @ mla.o_DHv.T, mla_naive(x_TD, mla)) < 1e-12


def test_positions_with_a_gap() -> None:
    positions_T = torch.arange(len(X_TD))
    positions_T[3:] += 50
    gqa, mla = gqa_weights(), mla_weights()
    found = gqa_attention(X_TD, gqa, positions_T) @ gqa.o_DHd.T, mla_attention(X_TD, mla, positions_T) @ mla.o_DHv.T
    expected = gqa_naive(X_TD, gqa, positions_T.tolist()), mla_naive(X_TD, mla, positions_T.tolist())
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-12
    assert relative(found[0], gqa_naive(X_TD, gqa)) > 0.01 and relative(found[1], mla_naive(X_TD, mla)) > 0.01


def test_texts_at_positions_of_their_own() -> None:
    positions_BT = torch.arange(len(X_TD)).repeat(2, 1)
    positions_BT[1, 4:] += 9
    mla = mla_weights()
    together_BTk = mla_attention(torch.stack([X_TD, X_TD]), mla, positions_BT)
    for found_Tk, positions_T in zip(together_BTk, positions_BT, strict=True):
        assert relative(found_Tk, mla_attention(X_TD, mla, positions_T)) < 1e-12


def test_without_rotation_the_output_is_another() -> None:
    gqa, mla = gqa_weights(), mla_weights()
    still = gqa_attention(X_TD, replace(gqa, inv_freq_P=torch.zeros(4))) @ gqa.o_DHd.T
    assert relative(still, gqa_naive(X_TD, gqa)) > 0.1
    still = mla_attention(X_TD, replace(mla, inv_freq_M=torch.zeros(3))) @ mla.o_DHv.T
    assert relative(still, mla_naive(X_TD, mla)) > 0.1


def test_queries_through_a_latent() -> None:
    mla = mla_weights(q_rank=9)
    assert relative(mla_attention(X_TD, mla) @ mla.o_DHv.T, mla_naive(X_TD, mla)) < 1e-12


def test_every_weight_matters() -> None:
    mla = mla_weights(q_rank=9)
    expected = mla_naive(X_TD, mla)
    for name in ("q_down_qD", "q_nope_HnD", "q_rope_HeD", "kv_down_rD", "k_rope_eD", "k_up_Hnr", "v_up_Hvr"):
        without = replace(mla, **{name: torch.zeros_like(getattr(mla, name))})
        assert relative(mla_attention(X_TD, without) @ mla.o_DHv.T, expected) > 0.1, name


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = lively(1, 8, seed=1), lively(1, 8, seed=2)
    frequencies = inverse_frequencies(THETA, 8)

    def score(t: int, s: int) -> float:
        return float((rotate(q, frequencies, torch.tensor([t])) * rotate(k, frequencies, torch.tensor([s]))).sum())

    assert abs(score(7, 4) - score(1007, 1004)) < 1e-10
    assert abs(score(7, 4) - score(7, 5)) > 0.1
    assert abs(score(7, 4) - score(4, 7)) > 0.01


def test_rotation_and_frequencies_are_those_of_transformers() -> None:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": THETA}
    )
    rotary = LlamaRotaryEmbedding(config)
    frequencies = inverse_frequencies(THETA, 8)
    assert relative(frequencies, rotary.inv_freq) < 1e-6
    positions = torch.arange(5)
    x_TD = lively(5, 8, seed=3).float()
    expected, _ = apply_rotary_pos_emb(x_TD[None, None], x_TD[None, None], *rotary(x_TD, positions[None]))
    assert relative(rotate(x_TD, frequencies, positions), expected[0, 0]) < 1e-6


def test_to_moves_every_tensor_and_nothing_else() -> None:
    moved = mla_weights().to(dtype=torch.bfloat16)
    assert {value.dtype for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {torch.bfloat16}
    assert moved.scaling == mla_weights().scaling


ODD = {
    "window": {"window": 4},
    "capped": {"softcap": 0.7},
    "both": {"window": 5, "softcap": 0.7},
    "output bias": {"o_bias_D": lively(24, seed=40)},
}
GAP = [0, 1, 2, 3, 7, 8, 9, 20, 21, 22, 23, 24]


@pytest.mark.parametrize("positions", [None, GAP], ids=["", "gap"])
@pytest.mark.parametrize("odd", ODD)
def test_what_some_families_add(odd: str, positions: list[int] | None) -> None:
    at = None if positions is None else torch.tensor(positions)
    gqa, mla = replace(gqa_weights(), **ODD[odd]), replace(mla_weights(), **ODD[odd])
    for weights, found, naive in (
        (gqa, gqa_attention(X_TD, gqa, at) @ gqa.o_DHd.T, gqa_naive),
        (mla, mla_attention(X_TD, mla, at) @ mla.o_DHv.T, mla_naive),
    ):
        bias = 0.0 if weights.o_bias_D is None else weights.o_bias_D
        assert relative(found + bias, naive(X_TD, weights, positions)) < 1e-12
        plain = replace(weights, window=None, softcap=None, o_bias_D=None)
        assert relative(naive(X_TD, plain, positions), naive(X_TD, weights, positions)) > 1e-2


def test_windows_of_several_texts() -> None:
    mla = replace(mla_weights(), window=4)
    positions_BT = torch.stack([torch.arange(12), torch.tensor(GAP)])
    together_BTk = mla_attention(torch.stack([X_TD, X_TD]), mla, positions_BT)
    for found_Tk, positions_T in zip(together_BTk, positions_BT, strict=True):
        assert relative(found_Tk, mla_attention(X_TD, mla, positions_T)) < 1e-12


@pytest.mark.parametrize("q_rank", [None, 7])
@pytest.mark.parametrize("missing", [None, "q_nope_bias_Hn", "q_rope_bias_He", "k_rope_bias_e"])
def test_biases_of_projections(q_rank: int | None, missing: str | None) -> None:
    biases = {
        "q_nope_bias_Hn": lively(4, 8, seed=41),
        "q_rope_bias_He": lively(4, 6, seed=42),
        "k_rope_bias_e": lively(6, seed=43),
    }
    mla = replace(mla_weights(q_rank=q_rank), **biases)
    wanted = mla_naive(X_TD, mla)
    if missing is not None:
        mla = replace(mla, **{missing: None})
        assert relative(mla_naive(X_TD, mla), wanted) > 1e-2
    assert relative(mla_attention(X_TD, mla) @ mla.o_DHv.T, mla_naive(X_TD, mla)) < 1e-12


def test_attention_over_features_is_the_naive_one() -> None:
    """Two groups of keys of 8 and values of 5 are 26 features; queries read those of their own head."""
    q_HTd, k_GTd, v_GTv = (lively(*shape, seed=44) for shape in ((4, 12, 8), (2, 12, 8), (2, 12, 5)))
    mla = replace(
        mla_weights(hidden=26),
        q_nope_HnD=torch.eye(8).double().expand(4, -1, -1),
        q_rope_HeD=lively(4, 6, 8, seed=45),
        encoder={},
    )
    seen_TF = features(k_GTd, v_GTv)
    assert torch.equal(seen_TF[:, 8:16], k_GTd[1]) and torch.equal(seen_TF[:, 21:], v_GTv[1])
    found = feature_attention(q_HTd, seen_TF, mla) @ mla.o_DHv.T
    assert relative(found, mla_naive(seen_TF, mla, queries_HTd=q_HTd)) < 1e-12
    assert relative(found, mla_naive(seen_TF, mla, queries_HTd=q_HTd.flip(0))) > 0.1
