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


def inverse_frequencies(theta: float, dim: int) -> Tensor:
    """f_m = theta ** (-2 m / dim) in radians per position, float64 [dim / 2] (RoFormer, section 3.2.2)."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def rotate(x_T2M: Tensor, inv_freq_M: Tensor, positions_T: Tensor) -> Tensor:
    """Turn the half-split pairs of `x` [..., T, 2M] by inv_freq * position radians."""
    angle_TM = positions_T[:, None].to(inv_freq_M.dtype) * inv_freq_M
    cos_TM, sin_TM = angle_TM.cos().to(x_T2M.dtype), angle_TM.sin().to(x_T2M.dtype)
    real, imag = x_T2M.chunk(2, dim=-1)
    return torch.cat([real * cos_TM - imag * sin_TM, imag * cos_TM + real * sin_TM], dim=-1)


def gqa_projections(x_TD: Tensor, gqa: GqaWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Unrotated q [H, T, d], k [G, T, d], v [G, T, d] of one text."""
    q_HTd = torch.einsum("TD,HdD->HTd", x_TD, gqa.q_HdD)
    k_GTd = torch.einsum("TD,GdD->GTd", x_TD, gqa.k_GdD)
    v_GTd = torch.einsum("TD,GdD->GTd", x_TD, gqa.v_GdD)
    return q_HTd, k_GTd, v_GTd


def gqa_attention(x_TD: Tensor, gqa: GqaWeights) -> Tensor:
    """Causal grouped-query attention of one text at positions 0..T-1, heads side by side [T, H d]; no o_proj."""
    q_HTd, k_GTd, v_GTd = gqa_projections(x_TD, gqa)
    positions = torch.arange(len(x_TD), device=x_TD.device)
    out_HTd = _causal(
        rotate(q_HTd, gqa.inv_freq_P, positions), rotate(k_GTd, gqa.inv_freq_P, positions), v_GTd, gqa.scaling
    )
    return out_HTd.transpose(0, 1).flatten(1)


def mla_attention(x_TD: Tensor, mla: MlaWeights) -> Tensor:
    """Causal latent attention of one text at positions 0..T-1, heads side by side [T, H v]; no o_proj."""
    positions = torch.arange(len(x_TD), device=x_TD.device)
    c_Tr = x_TD @ mla.kv_down_rD.T
    k_rope_Te = rotate(x_TD @ mla.k_rope_eD.T, mla.inv_freq_M, positions)
    q_rope_HTe = rotate(torch.einsum("TD,HeD->HTe", x_TD, mla.q_rope_HeD), mla.inv_freq_M, positions)
    q_nope_HTn = torch.einsum("TD,HnD->HTn", x_TD, mla.q_nope_HnD)
    k_nope_HTn = torch.einsum("Tr,Hnr->HTn", c_Tr, mla.k_up_Hnr)
    v_HTv = torch.einsum("Tr,Hvr->HTv", c_Tr, mla.v_up_Hvr)
    k_rope_HTe = k_rope_Te.expand(len(q_rope_HTe), -1, -1)
    out_HTv = _causal(
        torch.cat([q_nope_HTn, q_rope_HTe], -1), torch.cat([k_nope_HTn, k_rope_HTe], -1), v_HTv, mla.scaling
    )
    return out_HTv.transpose(0, 1).flatten(1)


def _causal(q_HTk: Tensor, k_GTk: Tensor, v_GTv: Tensor, scaling: float) -> Tensor:
    width = v_GTv.shape[-1]
    if q_HTk.shape[-1] > width:
        # fused kernels on CPUs want keys and values of one width; the zeros cost less than the fallback
        v_GTv = torch.nn.functional.pad(v_GTv, (0, q_HTk.shape[-1] - width))
    out = torch.nn.functional.scaled_dot_product_attention(
        q_HTk[None], k_GTk[None], v_GTv[None], is_causal=True, scale=scaling, enable_gqa=len(q_HTk) != len(k_GTk)
    )
    return out[0, ..., :width]
