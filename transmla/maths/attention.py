"""The two forms of attention as plain weights: what is read (GQA) and what is written (MLA).

Shape legend: see transmla/maths/__init__.py.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


class _Weights:
    """Moves every tensor field at once; other fields stay."""

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        moved = {
            field.name: value.to(dtype=dtype, device=device) if isinstance(value, Tensor) else value
            for field in fields(self)  # type: ignore[arg-type]
            for value in (getattr(self, field.name),)
        }
        return type(self)(**moved)


@dataclass(frozen=True)
class GqaWeights(_Weights):
    """One attention block of the source. Queries are scored as <Rot_t q, Rot_s k> * scaling."""

    q_HdD: Tensor
    k_GdD: Tensor
    v_GdD: Tensor
    o_DHd: Tensor
    inv_freq_P: Tensor
    scaling: float


@dataclass(frozen=True)
class MlaWeights(_Weights):
    """One attention block of the target, no norm on the latent, rotary pairs half-split.

    c = kv_down x is cached (r values) beside Rot_s k_rope x (e values);
    score = (<q_nope x_t, k_up c_s> + <Rot_t q_rope x_t, Rot_s k_rope x_s>) * scaling, value = v_up c_s.
    With q_down, queries read q_down x_t (q values) instead of x_t: q_nope is [H, n, q], q_rope [H, e, q].
    """

    q_nope_HnD: Tensor
    q_rope_HeD: Tensor
    kv_down_rD: Tensor
    k_rope_eD: Tensor
    k_up_Hnr: Tensor
    v_up_Hvr: Tensor
    o_DHv: Tensor
    inv_freq_M: Tensor
    scaling: float
    q_down_qD: Tensor | None = None


def inverse_frequencies(theta: float, dim: int) -> Tensor:
    """f_m = theta ** (-2 m / dim) in radians per position, float64 [dim / 2] (RoFormer, section 3.2.2)."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def rotate(x_T2M: Tensor, inv_freq_M: Tensor, positions_T: Tensor) -> Tensor:
    """Turn the half-split pairs of `x` [..., T, 2M] by inv_freq * position radians; positions [T] or [..., T]."""
    angle_TM = positions_T[..., None].to(inv_freq_M.dtype) * inv_freq_M
    cos_TM, sin_TM = angle_TM.cos().to(x_T2M.dtype), angle_TM.sin().to(x_T2M.dtype)
    real, imag = x_T2M.chunk(2, dim=-1)
    return torch.cat([real * cos_TM - imag * sin_TM, imag * cos_TM + real * sin_TM], dim=-1)


def gqa_projections(x_TD: Tensor, gqa: GqaWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Unrotated q [H, T, d], k [G, T, d], v [G, T, d] of one text."""
    q_HTd = torch.einsum("TD,HdD->HTd", x_TD, gqa.q_HdD)
    k_GTd = torch.einsum("TD,GdD->GTd", x_TD, gqa.k_GdD)
    v_GTd = torch.einsum("TD,GdD->GTd", x_TD, gqa.v_GdD)
    return q_HTd, k_GTd, v_GTd


def gqa_attention(x_TD: Tensor, gqa: GqaWeights, positions_T: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention of one text, heads side by side [T, H d]; no o_proj.

    positions_T: int64, ascending; None: 0..T-1
    """
    q_HTd, k_GTd, v_GTd = gqa_projections(x_TD, gqa)
    positions = torch.arange(len(x_TD), device=x_TD.device) if positions_T is None else positions_T
    out_HTd = _causal(
        rotate(q_HTd, gqa.inv_freq_P, positions), rotate(k_GTd, gqa.inv_freq_P, positions), v_GTd, gqa.scaling
    )
    return out_HTd.transpose(0, 1).flatten(1)


def mla_attention(x_BTD: Tensor, mla: MlaWeights, positions_BT: Tensor | None = None) -> Tensor:
    """Causal latent attention, heads side by side [..., T, H v]; no o_proj.

    x_BTD:        one text [T, D] or several [B, T, D]
    positions_BT: of all texts [T] or of each [B, T], int64, ascending; None: 0..T-1
    """
    heads, nope, _ = mla.q_nope_HnD.shape
    rope, rank = len(mla.k_rope_eD), len(mla.kv_down_rD)
    positions = (
        torch.arange(x_BTD.shape[-2], device=x_BTD.device) if positions_BT is None else positions_BT[..., None, :]
    )
    # few wide products instead of many narrow ones: this is the inner loop of the refinement
    queries_kD = torch.cat([mla.q_nope_HnD.flatten(0, 1), mla.q_rope_HeD.flatten(0, 1)])
    down_kD = torch.cat([queries_kD if mla.q_down_qD is None else mla.q_down_qD, mla.kv_down_rD, mla.k_rope_eD])
    up_kr = torch.cat([mla.k_up_Hnr.flatten(0, 1), mla.v_up_Hvr.flatten(0, 1)])
    projected_BTk = torch.nn.functional.linear(x_BTD, down_kD)
    q_BTk, c_BTr, k_rope = projected_BTk.split([len(down_kD) - rank - rope, rank, rope], dim=-1)
    if mla.q_down_qD is not None:
        q_BTk = torch.nn.functional.linear(q_BTk, queries_kD)
    q_nope, q_rope = q_BTk.split([heads * nope, heads * rope], dim=-1)
    k_nope, value = torch.nn.functional.linear(c_BTr, up_kr).split([heads * nope, len(up_kr) - heads * nope], dim=-1)
    q_rope_BHTe = rotate(_per_head(q_rope, heads), mla.inv_freq_M, positions)
    k_rope_BHTe = rotate(_per_head(k_rope, 1), mla.inv_freq_M, positions).expand_as(q_rope_BHTe)
    out_BHTv = _causal(
        torch.cat([_per_head(q_nope, heads), q_rope_BHTe], -1),
        torch.cat([_per_head(k_nope, heads), k_rope_BHTe], -1),
        _per_head(value, heads),
        mla.scaling,
    )
    return out_BHTv.transpose(-3, -2).flatten(-2)


def _per_head(x_BTk: Tensor, heads: int) -> Tensor:
    """[..., T, heads * k] -> [..., heads, T, k]"""
    return x_BTk.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _causal(q_BHTk: Tensor, k_BGTk: Tensor, v_BGTv: Tensor, scaling: float) -> Tensor:
    """Attention of one text [H, T, .] or several [B, H, T, .]."""
    width = v_BGTv.shape[-1]
    if q_BHTk.shape[-1] > width:
        # fused kernels on CPUs want keys and values of one width; the zeros cost less than the fallback
        v_BGTv = torch.nn.functional.pad(v_BGTv, (0, q_BHTk.shape[-1] - width))
    one = q_BHTk.dim() == 3
    q, k, v = (x[None] if one else x for x in (q_BHTk, k_BGTk, v_BGTv))  # kernels want four axes
    out_BHTv = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )[..., :width]
    return out_BHTv[0] if one else out_BHTv
