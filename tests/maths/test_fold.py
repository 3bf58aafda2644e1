"""The folded block in the stock class is latent attention without a norm."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from tests.maths.weights import THETA, inputs, lively, mla_weights, relative
from transmla.geometry import MlaGeometry
from transmla.maths import fold
from transmla.maths.attention import MlaWeights
from transmla.maths.fold import (
    EPS,
    INPUT_NORM_GAIN,
    LARGEST_LATENT_SCALE,
    MAX_NORM_DEVIATION,
    biased_query,
    constant_query,
    fold_layer,
    interleaved_order,
    largest_mean_square,
    latent_scale,
    latent_scales,
    residual_scale,
    unfold_layer,
    unfolded_attention,
)
from transmla.maths.reference import mla_naive
from transmla.targets.stock import deepseek_v3_config

SOURCE = {"vocab_size": 7, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "hidden_act": "silu"}
X_TD = inputs(10)


def fold_attention(
    mla: MlaWeights, scale: float, residual: float, query_scale: float | None = None
) -> dict[str, Tensor]:
    """The attention of a folded layer, without "self_attn."."""
    folded = fold_layer(unfolded_attention(mla), len(mla.kv_down_rD), residual, scale, query_scale)
    return {name.removeprefix("self_attn."): tensor for name, tensor in folded.items()}


def stock_output(mla: MlaWeights, tensors: dict[str, Tensor], x_TD: Tensor = X_TD) -> Tensor:
    """The stock attention, float64, on what the scaled input norm gives it."""
    heads, nope, _ = mla.q_nope_HnD.shape
    hidden = mla.kv_down_rD.shape[1]
    q_rank = None if mla.q_down_qD is None else len(mla.q_down_qD)
    sizes = MlaGeometry(
        1, hidden, heads, len(mla.kv_down_rD), len(mla.k_rope_eD), nope, mla.v_up_Hvr.shape[1], q_rank,
        attention_bias=mla.o_bias_D is not None, query_bias=mla.q_nope_bias_Hn is not None,
    )  # fmt: skip
    settings = deepseek_v3_config(SOURCE | {"num_attention_heads": heads}, sizes, THETA, 64, "float32")
    config = DeepseekV3Config(**settings)
    config._attn_implementation = "sdpa"
    block = DeepseekV3Attention(config, 0).double().eval()
    block.load_state_dict(tensors)
    angles = torch.arange(len(x_TD))[:, None] * DeepseekV3RotaryEmbedding(config).inv_freq.double()
    turns = tuple(torch.cat([part, part], -1)[None] for part in (angles.cos(), angles.sin()))
    with torch.no_grad():
        return block(INPUT_NORM_GAIN * x_TD[None], position_embeddings=turns, attention_mask=None)[0][0]


def test_stock_block_is_latent_attention() -> None:
    mla = mla_weights()
    folded = fold_attention(mla, LARGEST_LATENT_SCALE, residual=0.25)
    assert relative(stock_output(mla, folded), 0.25 * mla_naive(X_TD, mla)) < 2e-4


def test_stock_block_with_a_latent_of_queries() -> None:
    mla = mla_weights(q_rank=9)
    folded = fold_attention(mla, LARGEST_LATENT_SCALE, residual=0.25, query_scale=LARGEST_LATENT_SCALE)
    assert relative(stock_output(mla, folded), 0.25 * mla_naive(X_TD, mla)) < 2e-4
    seen = fold_attention(mla, LARGEST_LATENT_SCALE, residual=0.25, query_scale=1e-3)
    assert relative(stock_output(mla, seen), 0.25 * mla_naive(X_TD, mla)) > 0.05, "a norm that is not linear"


BIASES = {
    "q_nope_bias_Hn": lively(4, 8, seed=41),
    "q_rope_bias_He": lively(4, 6, seed=42),
    "k_rope_bias_e": lively(6, seed=43),
    "o_bias_D": lively(24, seed=44),
}


@pytest.mark.parametrize("q_rank", [None, 9])
def test_stock_block_with_biases(q_rank: int | None) -> None:
    """Queries have no bias in the stock class, but a constant in their latent."""
    mla = replace(mla_weights(q_rank=q_rank), **BIASES)
    wanted = 0.25 * mla_naive(X_TD, mla)

    def found(one: MlaWeights) -> Tensor:
        return stock_output(one, fold_attention(one, LARGEST_LATENT_SCALE, 0.25, LARGEST_LATENT_SCALE))

    assert relative(found(mla), wanted) < 5e-4
    for name in BIASES:
        assert relative(found(replace(mla, **{name: torch.zeros_like(BIASES[name])})), wanted) > 1e-2, name
    only_of_the_output = replace(mla_weights(q_rank=q_rank), o_bias_D=BIASES["o_bias_D"])
    assert relative(found(only_of_the_output), 0.25 * mla_naive(X_TD, only_of_the_output)) < 5e-4


def test_the_constant_rounds_nothing() -> None:
    """Identity and constant are powers of two, whatever the scale of the latent."""
    folded = fold_attention(replace(mla_weights(), **BIASES), 2.0**-19, 0.3, query_scale=latent_scale(50.0))
    for name in ("q_a_proj.weight", "q_a_proj.bias"):
        assert torch.equal(folded[name].bfloat16().double(), folded[name])
    assert folded["q_a_proj.weight"].count_nonzero() == 24 and folded["q_a_proj.bias"].count_nonzero() == 1
    assert folded["q_proj.weight" if "q_proj.weight" in folded else "q_b_proj.weight"].shape == (56, 25)


@pytest.mark.parametrize("q_rank", [None, 9])
def test_unfolding_is_the_inverse(q_rank: int | None) -> None:
    """Of trained weights, too, whose latent and its gains have moved; scales of two powers are exact."""
    mla = replace(mla_weights(q_rank=q_rank), **BIASES)
    named = {
        f"self_attn.{name}": value
        for name, value in fold_attention(mla, LARGEST_LATENT_SCALE, 1.0, LARGEST_LATENT_SCALE).items()
    }
    trained = biased_query(unfold_layer(named, 10, 1.0), latent=q_rank is not None)
    last = "self_attn.q_proj" if q_rank is None else "self_attn.q_b_proj"
    bias = torch.cat([BIASES["q_nope_bias_Hn"], BIASES["q_rope_bias_He"][:, interleaved_order(6)]], 1).flatten()
    assert relative(trained[f"{last}.bias"], bias * (0.4 * math.sqrt(14))) < 1e-14
    assert ("self_attn.q_a_proj.weight" in trained) == (q_rank is not None)
    for number, name in enumerate(trained):
        if not name.endswith("layernorm.weight"):
            trained[name] = trained[name] + 0.1 * lively(*trained[name].shape, seed=50 + number)
    folded = fold_layer(constant_query(trained), 10, 1.0, 2.0**-18, 2.0**-19)
    again = biased_query(unfold_layer(folded, 10, 1.0), latent=q_rank is not None)
    assert again.keys() == trained.keys()
    for name, value in trained.items():
        # the norm's weight sqrt(EPS) / scale is no power of two
        assert relative(again[name], value) < 1e-14, name


def test_error_falls_with_the_square_of_the_scale() -> None:
    """Down to the float32 in which the class keeps its frequencies and computes its norm."""
    mla = mla_weights()
    errors = [
        relative(stock_output(mla, fold_attention(mla, 2.0**-power, 1.0)), mla_naive(X_TD, mla))
        for power in (10, 12, 14, 16, 20)
    ]
    assert errors[0] > 0.1
    assert all(after < before / 3 for before, after in pairwise(errors))
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("step", ["interleave", "gain", "softmax scale", "norm weight"])
def test_every_step_is_needed(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mla = mla_weights()
    if step == "interleave":
        monkeypatch.setattr(fold, "interleaved_order", torch.arange)
    folded = fold_attention(mla, LARGEST_LATENT_SCALE, residual=1.0)
    if step == "gain":
        folded["q_proj.weight"] *= INPUT_NORM_GAIN
    if step == "softmax scale":
        folded["q_proj.weight"] /= mla.scaling * math.sqrt(8 + 6)
    if step == "norm weight":
        folded["kv_a_layernorm.weight"] *= LARGEST_LATENT_SCALE / math.sqrt(EPS)
    assert relative(stock_output(mla, folded), mla_naive(X_TD, mla)) > 0.05


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-8])
def test_residual_scale_is_exact(eps: float) -> None:
    tiny_TD = 1e-3 * X_TD  # so that epsilon matters

    def norm(x_TD: Tensor, epsilon: float) -> Tensor:
        return x_TD * (x_TD.square().mean(-1, keepdim=True) + epsilon).rsqrt()

    assert relative(norm(residual_scale(eps) * tiny_TD, EPS), norm(tiny_TD, eps)) < 1e-14
    assert eps == EPS or relative(norm(tiny_TD, EPS), norm(tiny_TD, eps)) > 0.01


@pytest.mark.parametrize("peak", [1e-6, 1.0, 7.9, 30.0, 1e3, 1e7])
def test_latent_scale(peak: float) -> None:
    """A power of two that keeps the deviation of the norm in bounds, and the largest such one below the cap."""
    scale = latent_scale(peak)
    assert math.log2(scale).is_integer()
    assert scale**2 * peak / (2 * EPS) < MAX_NORM_DEVIATION
    assert scale == LARGEST_LATENT_SCALE or (2 * scale) ** 2 * peak / (2 * EPS) >= MAX_NORM_DEVIATION


@pytest.mark.parametrize(("rows", "exact"), [(5, True), (24, True), (24, False)])
@pytest.mark.parametrize("biased", [False, True])
def test_no_token_has_a_larger_latent(rows: int, exact: bool, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a norm can give, also the one that reaches the bound; one layer's worst token is not in any text."""
    if not exact:
        monkeypatch.setattr(fold, "MAX_EXACT_ROWS", 3)
    weight_rD, gain_D = lively(rows, 16, seed=4), 1 + lively(16, seed=5)
    bias_r = lively(rows, seed=6) if biased else None
    bound = largest_mean_square(weight_rD, gain_D, bias_r)

    def size(x_D: Tensor) -> float:
        x_D = x_D / x_D.square().mean().sqrt()
        c_r = weight_rD @ (gain_D * x_D) + (0.0 if bias_r is None else bias_r)
        return float(c_r.square().mean())

    worst_D = torch.linalg.svd(weight_rD * gain_D).Vh[0]
    assert (
        max(size(lively(16, seed=seed)) for seed in range(7, 50)) < max(size(worst_D), size(-worst_D)) <= bound + 1e-9
    )
    if exact and not biased:
        assert size(worst_D) == pytest.approx(bound)
    diagonal = torch.diag(gain_D)
    assert largest_mean_square(diagonal, torch.ones(16)) == pytest.approx(float(gain_D.abs().max()) ** 2)


def test_scales_of_a_layer() -> None:
    """Of its latent and that of its queries, as they are behind the gain of the input."""
    mla = replace(mla_weights(q_rank=9), **BIASES)
    tensors = unfolded_attention(mla) | {"input_layernorm.weight": torch.full((24,), 3.0, dtype=torch.float64)}
    scale, query_scale = latent_scales(tensors, 10)
    assert scale == latent_scale(largest_mean_square(3 * mla.kv_down_rD, torch.ones(24)))
    query = largest_mean_square(
        tensors["self_attn.q_a_proj.weight"], torch.full((24,), 3.0), tensors["self_attn.q_a_proj.bias"]
    )
    assert query_scale == latent_scale(query)
    assert latent_scales(unfolded_attention(mla_weights()) | {"input_layernorm.weight": torch.ones(24)}, 10)[1] is None


@pytest.mark.parametrize("name", ["kv_a_proj_with_mqa", "q_a_proj"])
def test_scales_of_a_layer_with_large_biases(name: str) -> None:
    """As training may make them: those of the latents, and not that of the rotary key, which no norm reads."""
    mla = replace(mla_weights(q_rank=9), **BIASES)
    plain = unfolded_attention(mla) | {"input_layernorm.weight": torch.ones(24, dtype=torch.float64)}
    bias = plain[f"self_attn.{name}.bias"].clone()
    bias[10:] += 1e5
    of_rope, place = latent_scales(plain | {f"self_attn.{name}.bias": bias}, 10), int(name == "q_a_proj")
    assert of_rope == latent_scales(plain, 10)
    bias[:10] += 1e3
    found = latent_scales(plain | {f"self_attn.{name}.bias": bias}, 10)
    weight = plain[f"self_attn.{name}.weight"][:10]
    assert found[place] == latent_scale(largest_mean_square(weight, torch.ones(24), bias[:10])) < 0.1 * of_rope[place]
    assert found[1 - place] == of_rope[1 - place]


def test_latent_scale_of_nothing() -> None:
    assert latent_scale(0.0) == LARGEST_LATENT_SCALE


def test_interleaved_order() -> None:
    assert interleaved_order(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_small_rows_survive_float16() -> None:
    """The gain keeps the latent rows in the range of normal numbers."""
    mla = mla_weights()
    rows = fold_attention(mla, LARGEST_LATENT_SCALE, 1.0)["kv_a_proj_with_mqa.weight"][:10]
    assert relative(rows.half(), rows) < 5e-4
    assert relative((rows * INPUT_NORM_GAIN).half(), rows * INPUT_NORM_GAIN) > 2e-3
