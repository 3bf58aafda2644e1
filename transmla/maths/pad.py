"""A folded deepseek_v3 attention block in a larger geometry, filled with zeros: the same function, exactly.

    latent   zero rows of kv_a, zero columns of kv_b. Its norm is a linear map (maths/fold.py), so more zeros change
             nothing but the deviation, which gets smaller
    rotary   pair i turns with theta^(-2i/e). With e' = m e, pair m i has the same frequency: it moves there
    heads    zero rows of q and kv_b, zero columns of o_proj; queries make up for the softmax scale 1 / sqrt(n + e)

Shape legend: see transmla/maths/__init__.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Widths:
    """Of one attention block: H num_attention_heads, r kv_lora_rank, e qk_rope_head_dim, n qk_nope_head_dim,
    v v_head_dim."""

    heads: int
    rank: int
    rope: int
    nope: int
    value: int


def pad_attention(tensors: Mapping[str, Tensor], old: Widths, new: Widths) -> dict[str, Tensor]:
    """Tensors of a block by their stock names, of widths `old`, in widths `new`.

    No width may shrink, and new.rope must be a multiple of old.rope; ValueError otherwise.
    """
    grown = (new.rank - old.rank, new.rope - old.rope, new.nope - old.nope, new.value - old.value)
    if min(grown) < 0 or new.rope % old.rope or new.heads != old.heads:
        raise ValueError(f"{old} cannot be padded to {new}")
    softmax = math.sqrt((new.nope + new.rope) / (old.nope + old.rope))
    query = "q_b_proj.weight" if "q_b_proj.weight" in tensors else "q_proj.weight"
    q_Hxd = tensors[query].unflatten(0, (old.heads, old.nope + old.rope)) * softmax
    q_nope, q_rope = q_Hxd.split([old.nope, old.rope], dim=1)
    padded_q = torch.cat([grow(q_nope, 1, new.nope), _spread(q_rope, 1, new.rope)], dim=1)
    latent, k_rope = tensors["kv_a_proj_with_mqa.weight"].split([old.rank, old.rope])
    kv_b = tensors["kv_b_proj.weight"].unflatten(0, (old.heads, old.nope + old.value))
    k_up, v_up = grow(kv_b, 2, new.rank).split([old.nope, old.value], dim=1)
    o_DHv = tensors["o_proj.weight"].unflatten(1, (old.heads, old.value))
    norm_r = tensors["kv_a_layernorm.weight"]
    return dict(tensors) | {
        query: padded_q.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([grow(latent, 0, new.rank), _spread(k_rope, 0, new.rope)]),
        # the zeros behind it may be multiplied with anything
        "kv_a_layernorm.weight": torch.cat([norm_r, norm_r[-1:].expand(new.rank - old.rank)]),
        "kv_b_proj.weight": torch.cat([grow(k_up, 1, new.nope), grow(v_up, 1, new.value)], dim=1).flatten(0, 1),
        "o_proj.weight": grow(o_DHv, 2, new.value).flatten(1),
    }


def grow(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind, up to `size` along `dim`."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _spread(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Interleaved rotary pairs moved to where their frequency is, zeros between them."""
    pairs = tensor.unflatten(dim, (-1, 2))
    every = size // tensor.shape[dim]
    shape = list(pairs.shape)
    shape[dim] *= every
    spread = pairs.new_zeros(shape)
    spread.index_copy_(dim, torch.arange(0, shape[dim], every, device=tensor.device), pairs)
    return spread.flatten(dim, dim + 1)
