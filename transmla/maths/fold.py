"""Latent attention without a latent norm, written as a deepseek_v3 block that must have one. All steps are exact
but the first, whose relative error is bounded by `latent_scale`.

1. RMSNorm(s c; eps) = s c / sqrt(eps) as long as mean((s c)^2) << eps: scale the latent rows by s and put
   sqrt(eps) / s into the norm's weight.
2. One epsilon for every implementation: the residual stream times `residual_scale` makes
   RMSNorm(a h; EPS) = RMSNorm(h; eps) (embed_tokens, o_proj, down_proj carry the factor).
3. INPUT_NORM_GAIN keeps the small rows out of the subnormal range of float16: input_layernorm.weight times it,
   everything that reads it divided by it. A power of two, so nothing rounds.
4. Rotary pairs from half-split to interleaved, softmax scale of the source folded into the queries.

Shape legend: see transmla/maths/__init__.py.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from transmla.maths.attention import MlaWeights

# The one epsilon: transformers and MLX fix it on the latent norm, the others read it from the config.
EPS = 1e-6
INPUT_NORM_GAIN = 2.0**-7
# Relative deviation of the latent norm from a linear map that we accept, (s rms c)^2 / (2 EPS).
MAX_NORM_DEVIATION = 1e-3
# 2^-17 = 7.6e-6: deviation 3e-5 for a latent of unit mean square
LARGEST_LATENT_SCALE = 2.0**-17


def residual_scale(rms_norm_eps: float) -> float:
    """a with RMSNorm(a h; EPS) = RMSNorm(h; rms_norm_eps)."""
    return math.sqrt(EPS / rms_norm_eps)


def latent_scale(max_mean_square: float) -> float:
    """The largest power of two s with s^2 * max_mean_square / (2 EPS) < MAX_NORM_DEVIATION.

    max_mean_square: the largest mean of c^2 over the latent of one token, seen in calibration
    """
    bound = math.sqrt(MAX_NORM_DEVIATION * 2 * EPS / max(max_mean_square, 1e-30))
    return min(LARGEST_LATENT_SCALE, 2.0 ** math.floor(math.log2(bound)))


def fold_attention(
    mla: MlaWeights, scale: float, residual: float, query_scale: float | None = None
) -> dict[str, Tensor]:
    """Tensors of a deepseek_v3 attention block by their stock names, in the dtype of `mla`.

    scale:    from `latent_scale`; residual: from `residual_scale`
    query_scale: the scale of the queries' latent where they have one, which has a norm as well
    """
    nope = mla.q_nope_HnD.shape[1]
    rope, rank = len(mla.k_rope_eD), len(mla.kv_down_rD)
    order = interleaved_order(rope).to(mla.k_rope_eD.device)
    softmax = mla.scaling * math.sqrt(nope + rope)
    q = torch.cat([mla.q_nope_HnD, mla.q_rope_HeD[:, order]], dim=1).flatten(0, 1) * softmax
    if mla.q_down_qD is None:
        queries = {"q_proj.weight": q / INPUT_NORM_GAIN}
    else:
        assert query_scale is not None
        queries = {
            "q_a_proj.weight": mla.q_down_qD * (query_scale / INPUT_NORM_GAIN),
            "q_a_layernorm.weight": torch.full((len(mla.q_down_qD),), math.sqrt(EPS) / query_scale).to(q),
            "q_b_proj.weight": q,
        }
    kv_a = torch.cat([mla.kv_down_rD * scale, mla.k_rope_eD[order]]) / INPUT_NORM_GAIN
    kv_b = torch.cat([mla.k_up_Hnr, mla.v_up_Hvr], dim=1)
    return queries | {
        "kv_a_proj_with_mqa.weight": kv_a,
        "kv_a_layernorm.weight": torch.full((rank,), math.sqrt(EPS) / scale).to(kv_a),
        "kv_b_proj.weight": kv_b.flatten(0, 1),
        "o_proj.weight": mla.o_DHv * residual,
    }


def unfold_layer(tensors: Mapping[str, Tensor], rank: int, residual: float) -> dict[str, Tensor]:
    """A folded decoder layer in ordinary scales, for a class whose latent norms are linear.

    tensors:  by their stock names, with "self_attn." and "mlp.";  rank: kv_lora_rank;  residual: from `residual_scale`
    Rotary layout and softmax scale stay. `fold_layer` is the inverse.
    """
    scale = math.sqrt(EPS) / float(tensors["self_attn.kv_a_layernorm.weight"][0])
    query_norm = tensors.get("self_attn.q_a_layernorm.weight")
    query_scale = None if query_norm is None else math.sqrt(EPS) / float(query_norm[0])
    factors = _layer_factors(tensors, rank, residual, scale, query_scale)
    unfolded = {name: tensor / factors.get(name, 1.0) for name, tensor in tensors.items()}
    for name in ("self_attn.kv_a_layernorm.weight", "self_attn.q_a_layernorm.weight"):
        if name in tensors:
            unfolded[name] = tensors[name] / tensors[name][0]
    return unfolded


def fold_layer(
    tensors: Mapping[str, Tensor], rank: int, residual: float, scale: float, query_scale: float | None
) -> dict[str, Tensor]:
    """An unfolded decoder layer for stock classes, whose latent norms are real.

    scale, query_scale: from `latent_scale`, of latents as their linear norms give them
    """
    factors = _layer_factors(tensors, rank, residual, scale, query_scale)
    folded = {name: tensor * factors.get(name, 1.0) for name, tensor in tensors.items()}
    for name, one in (("self_attn.kv_a_layernorm.weight", scale), ("self_attn.q_a_layernorm.weight", query_scale)):
        if name in tensors:
            assert one is not None
            folded[name] = tensors[name] * (math.sqrt(EPS) / one)
    return folded


def _layer_factors(
    tensors: Mapping[str, Tensor], rank: int, residual: float, scale: float, query_scale: float | None
) -> dict[str, Tensor | float]:
    """What folding multiplies each tensor of a layer with, but for the latent norms."""
    down = tensors["self_attn.kv_a_proj_with_mqa.weight"]
    rows = torch.full((len(down), 1), 1 / INPUT_NORM_GAIN, dtype=down.dtype, device=down.device)
    rows[:rank] *= scale
    return {
        "input_layernorm.weight": INPUT_NORM_GAIN,
        "self_attn.q_proj.weight": 1 / INPUT_NORM_GAIN,
        "self_attn.q_a_proj.weight": (query_scale or 1.0) / INPUT_NORM_GAIN,
        "self_attn.kv_a_proj_with_mqa.weight": rows,
        "self_attn.o_proj.weight": residual,
        "mlp.down_proj.weight": residual,
    }


def interleaved_order(dim: int) -> Tensor:
    """Index that turns half-split pairs (m, m + dim/2) into interleaved ones (2m, 2m + 1)."""
    return torch.arange(dim).view(2, -1).T.flatten()
