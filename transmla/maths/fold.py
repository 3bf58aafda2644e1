"""Latent attention without a latent norm, written as a deepseek_v3 block that must have one. All steps are exact
but the first, whose relative error `latent_scale` bounds for every token that there can be.

1. RMSNorm(s c; eps) = s c / sqrt(eps) as long as mean((s c)^2) << eps: scale the latent rows by s and put
   sqrt(eps) / s into the norm's weight.
2. One epsilon for every implementation: the residual stream times `residual_scale` makes
   RMSNorm(a h; EPS) = RMSNorm(h; eps) (embed_tokens, o_proj, down_proj carry the factor).
3. INPUT_NORM_GAIN keeps the small rows out of the subnormal range of float16: input_layernorm.weight times it,
   everything that reads it divided by it. A power of two, so nothing rounds.
4. Rotary pairs from half-split to interleaved, softmax scale of the source folded into the queries.
5. Neither q_proj nor q_b_proj may have a bias. Queries that have one read a latent with a constant in it, [x; 1] or
   [q_down x; 1], which q_a_proj makes of the identity (or q_down) and a bias; their own is a column of q_b_proj. The
   norm of this latent is a linear map by 1., and all factors of identity and constant are powers of two.

Shape legend: see transmla/maths/__init__.py.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from transmla.maths import EPS
from transmla.maths.attention import MlaWeights

INPUT_NORM_GAIN = 2.0**-7
# Relative deviation of the latent norm from a linear map that we accept, (s rms c)^2 / (2 EPS).
MAX_NORM_DEVIATION = 1e-3
# 2^-17 = 7.6e-6: deviation 3e-5 for a latent of unit mean square
LARGEST_LATENT_SCALE = 2.0**-17
# rows of a matrix up to which its largest singular value is computed, and not only bounded
MAX_EXACT_ROWS = 2048


def residual_scale(rms_norm_eps: float) -> float:
    """a with RMSNorm(a h; EPS) = RMSNorm(h; rms_norm_eps)."""
    return math.sqrt(EPS / rms_norm_eps)


def latent_scale(max_mean_square: float) -> float:
    """The largest power of two s with s^2 * max_mean_square / (2 EPS) < MAX_NORM_DEVIATION.

    max_mean_square: the largest mean of c^2 over the latent of one token, see `largest_mean_square`
    """
    bound = math.sqrt(MAX_NORM_DEVIATION * 2 * EPS / max(max_mean_square, 1e-30))
    return min(LARGEST_LATENT_SCALE, 2.0 ** math.floor(math.log2(bound)))


def largest_mean_square(weight_rD: Tensor, gain_D: Tensor, bias_r: Tensor | None = None) -> float:
    """A bound of the mean of c^2 over c = W (g x) + b, for all x that an RMSNorm with the gain g can give: the mean of
    x^2 is at most 1, so that |c| <= sigma_max(W diag g) sqrt(D) + |b|.

    Reached by x along the singular vector. Of more than `MAX_EXACT_ROWS` rows, sigma_max^2 is bounded by the product of
    the largest sums of rows and of columns, which is exact for a diagonal.
    """
    read_rD = (weight_rD * gain_D).double()
    if min(read_rD.shape) <= MAX_EXACT_ROWS:
        gram = read_rD @ read_rD.T if read_rD.shape[0] <= read_rD.shape[1] else read_rD.T @ read_rD
        square = float(torch.linalg.eigvalsh(gram)[-1])
    else:
        square = float(read_rD.abs().sum(0).max() * read_rD.abs().sum(1).max())
    offset = 0.0 if bias_r is None else float(bias_r.double().norm())
    return (math.sqrt(max(square, 0.0) * read_rD.shape[1]) + offset) ** 2 / read_rD.shape[0]


def latent_scales(tensors: Mapping[str, Tensor], rank: int) -> tuple[float, float | None]:
    """`latent_scale` of the latent of an unfolded decoder layer, and that of its queries' latent if they have one.

    tensors: by their stock names, with "self_attn.", and the input_layernorm; as `fold_layer` takes them;  rank:
             kv_lora_rank
    """
    gain_D = tensors["input_layernorm.weight"]
    bias = tensors.get("self_attn.kv_a_proj_with_mqa.bias")
    down_rD = tensors["self_attn.kv_a_proj_with_mqa.weight"][:rank]
    scale = latent_scale(largest_mean_square(down_rD, gain_D, None if bias is None else bias[:rank]))
    query_qD = tensors.get("self_attn.q_a_proj.weight")
    if query_qD is None:
        return scale, None
    return scale, latent_scale(largest_mean_square(query_qD, gain_D, tensors.get("self_attn.q_a_proj.bias")))


def unfolded_attention(mla: MlaWeights) -> dict[str, Tensor]:
    """Tensors of a deepseek_v3 attention block by their stock names, with "self_attn.", in the dtype of `mla`: for
    `latent_scales` and `fold_layer`.

    Where `mla` has biases, so have q_a_proj (where there is one), kv_a_proj_with_mqa and o_proj.
    """
    nope = mla.q_nope_HnD.shape[1]
    rope, rank = len(mla.k_rope_eD), len(mla.kv_down_rD)
    order = interleaved_order(rope).to(mla.k_rope_eD.device)
    softmax = mla.scaling * math.sqrt(nope + rope)
    q = torch.cat([mla.q_nope_HnD, mla.q_rope_HeD[:, order]], dim=1).flatten(0, 1) * softmax
    tensors = {
        "kv_a_proj_with_mqa.weight": torch.cat([mla.kv_down_rD, mla.k_rope_eD[order]]),
        "kv_a_layernorm.weight": q.new_ones(rank),
        "kv_b_proj.weight": torch.cat([mla.k_up_Hnr, mla.v_up_Hvr], dim=1).flatten(0, 1),
        "o_proj.weight": mla.o_DHv,
    }
    last = "q_proj" if mla.q_down_qD is None else "q_b_proj"
    tensors[f"{last}.weight"] = q
    if mla.q_down_qD is not None:
        tensors |= {"q_a_proj.weight": mla.q_down_qD, "q_a_layernorm.weight": q.new_ones(len(mla.q_down_qD))}
    if mla.k_rope_bias_e is not None or mla.o_bias_D is not None:
        k_rope_bias_e = q.new_zeros(rope) if mla.k_rope_bias_e is None else mla.k_rope_bias_e[order]
        tensors["kv_a_proj_with_mqa.bias"] = torch.cat([q.new_zeros(rank), k_rope_bias_e])
        tensors["o_proj.bias"] = q.new_zeros(len(mla.o_DHv)) if mla.o_bias_D is None else mla.o_bias_D
        if mla.q_down_qD is not None:
            tensors["q_a_proj.bias"] = q.new_zeros(len(mla.q_down_qD))
    if biased := mla.q_nope_bias_Hn is not None and mla.q_rope_bias_He is not None:
        bias = torch.cat([mla.q_nope_bias_Hn, mla.q_rope_bias_He[:, order]], dim=1)
        tensors[f"{last}.bias"] = bias.flatten() * softmax
    named = {f"self_attn.{name}": tensor for name, tensor in tensors.items()}
    return constant_query(named) if biased else named


def constant_query(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bias of the queries as a column of q_b_proj that reads a constant 1; all in the scales of the unfolded form.

    tensors: by their stock names, with "self_attn." and with a q_proj.bias or a q_b_proj.bias, which no stock class has
    Queries without a latent get one of the whole input and the constant: q_a_proj is the identity. `biased_query` is
    the inverse.
    """
    others, own = _queries_apart(tensors)
    last = "q_b_proj" if "q_b_proj.weight" in own else "q_proj"
    weight, bias = own[f"{last}.weight"], own[f"{last}.bias"]
    if last == "q_proj":
        width = weight.shape[1]
        own = {
            "q_a_proj.weight": torch.eye(width, dtype=weight.dtype, device=weight.device),
            "q_a_proj.bias": weight.new_zeros(width),
            "q_a_layernorm.weight": weight.new_ones(width),
        }
    down = own["q_a_proj.weight"]
    return others | {
        "self_attn.q_a_proj.weight": torch.cat([down, torch.zeros_like(down[:1])]),
        "self_attn.q_a_proj.bias": torch.cat([own["q_a_proj.bias"], bias.new_ones(1)]),
        "self_attn.q_a_layernorm.weight": torch.cat([own["q_a_layernorm.weight"], bias.new_ones(1)]),
        "self_attn.q_b_proj.weight": torch.cat([weight, bias[:, None]], dim=1),
    }


def biased_query(tensors: Mapping[str, Tensor], latent: bool) -> dict[str, Tensor]:
    """What `constant_query` was given; latent: whether the queries had a latent of their own."""
    others, own = _queries_apart(tensors)
    weight, constant = own["q_b_proj.weight"], own["q_a_proj.bias"][-1] * own["q_a_layernorm.weight"][-1]
    last = "q_b_proj" if latent else "q_proj"
    found = {f"self_attn.{last}.weight": weight[:, :-1], f"self_attn.{last}.bias": weight[:, -1] * constant}
    if latent:
        kept = ("q_a_proj.weight", "q_a_proj.bias", "q_a_layernorm.weight")
        found |= {f"self_attn.{name}": own[name][:-1] for name in kept}
    return others | found


def _queries_apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors but those of the queries, and those without "self_attn."."""
    own = {name for name in tensors if name.startswith("self_attn.q_")}
    others = {name: tensor for name, tensor in tensors.items() if name not in own}
    return others, {name.removeprefix("self_attn."): tensors[name] for name in own}


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
    # biases are added behind the gain of the input
    bias_rows = rows[:, 0] * INPUT_NORM_GAIN
    return {
        "input_layernorm.weight": INPUT_NORM_GAIN,
        "self_attn.q_proj.weight": 1 / INPUT_NORM_GAIN,
        "self_attn.q_a_proj.weight": (query_scale or 1.0) / INPUT_NORM_GAIN,
        "self_attn.q_a_proj.bias": query_scale or 1.0,
        "self_attn.kv_a_proj_with_mqa.weight": rows,
        "self_attn.kv_a_proj_with_mqa.bias": bias_rows,
        "self_attn.o_proj.weight": residual,
        "self_attn.o_proj.bias": residual,
        "mlp.down_proj.weight": residual,
    }


def interleaved_order(dim: int) -> Tensor:
    """Index that turns half-split pairs (m, m + dim/2) into interleaved ones (2m, 2m + 1)."""
    return torch.arange(dim).view(2, -1).T.flatten()
