"""The two forms of attention as plain weights: what is read (GQA) and what is written (MLA).

Shape legend: see transmla/maths/__init__.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

# What is attended to of a cache: cached values [..., T, r + e] and which tokens each token sees, bool [..., T, T], ->
# such values [..., S, r + e] and which of them each token sees, bool [..., T, S]
Reading = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _Weights:
    """Moves every tensor at once, those of mappings as well; other fields stay."""

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(dtype=dtype, device=device)
            return {name: moved(one) for name, one in value.items()} if isinstance(value, Mapping) else value

        return type(self)(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class GqaWeights(_Weights):
    """One attention block of the source. Queries are scored as <Rot_t q, Rot_s k> * scaling.

    biased:   the last column of the projections is a bias, and their inputs end in a 1: D + 1 columns
    encoded:  the projections are maps of what other projections and norms give: see `over_features`
    o_bias_D: added to the output
    window:   queries see keys less than `window` positions away; None: all
    softcap:  scores are softcap * tanh(score / softcap); None: as they are
    """

    q_HdD: Tensor
    k_GdD: Tensor
    v_GdD: Tensor
    o_DHd: Tensor
    inv_freq_P: Tensor
    scaling: float
    o_bias_D: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    biased: bool = False
    encoded: bool = False


@dataclass(frozen=True)
class MlaWeights(_Weights):
    """One attention block of the target, no norm on the latent, rotary pairs half-split.

    c = kv_down x is cached (r values) beside Rot_s k_rope x (e values);
    score = (<q_nope x_t, k_up c_s> + <Rot_t q_rope x_t, Rot_s k_rope x_s>) * scaling, value = v_up c_s.
    With q_down, queries read q_down x_t (q values) instead of x_t: q_nope is [H, n, q], q_rope [H, e, q].

    Biases: None where there are none. The latent needs none: that of the keys is the same for all of a softmax's
    scores, and that of the values adds to `o_bias_D`, since attention weights sum to one.

    encoder: None, or weights of the source's own projections and norms by name (see `over_features`); then x is what
             they make of it: kv_down and k_rope read all keys and values of a token, [., F], and q_rope the queries of
             its own head, [H, e, d]; q_nope is the identity, [H, d, d]
    window, softcap: see `GqaWeights`
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
    q_nope_bias_Hn: Tensor | None = None
    q_rope_bias_He: Tensor | None = None
    k_rope_bias_e: Tensor | None = None
    o_bias_D: Tensor | None = None
    encoder: Mapping[str, Tensor] | None = None
    window: int | None = None
    softcap: float | None = None


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


def with_one(x_BTD: Tensor) -> Tensor:
    """A 1 behind each token's values, for projections whose last column is a bias: [..., T, D + 1]."""
    return torch.nn.functional.pad(x_BTD, (0, 1), value=1.0)


def gqa_attention(x_TD: Tensor, gqa: GqaWeights, positions_T: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention of one text, heads side by side [T, H d]; no o_proj.

    positions_T: int64, ascending; None: 0..T-1
    """
    return grouped_attention(*gqa_projections(x_TD, gqa), gqa, positions_T)


def grouped_attention(
    q_BHTd: Tensor, k_BGTd: Tensor, v_BGTv: Tensor, gqa: GqaWeights, positions_BT: Tensor | None = None
) -> Tensor:
    """Causal attention of unrotated heads, side by side [..., T, H v]; of `gqa` only what is no projection counts.

    positions_BT: of all texts [T] or of each [B, T], int64, ascending; None: 0..T-1
    """
    at = torch.arange(q_BHTd.shape[-2], device=q_BHTd.device) if positions_BT is None else positions_BT
    of_heads = at if at.dim() == 1 else at[..., None, :]
    q_BHTd, k_BGTd = (rotate(x_BHTd, gqa.inv_freq_P, of_heads) for x_BHTd in (q_BHTd, k_BGTd))
    out_BHTv = causal(q_BHTd, k_BGTd, v_BGTv, gqa.scaling, visible(at, gqa.window), gqa.softcap)
    return out_BHTv.transpose(-3, -2).flatten(-2)


def mla_attention(
    x_BTD: Tensor, mla: MlaWeights, positions_BT: Tensor | None = None, read: Reading | None = None
) -> Tensor:
    """Causal latent attention, heads side by side [..., T, H v]; no o_proj.

    x_BTD:        one text [T, D] or several [B, T, D]
    positions_BT: of all texts [T] or of each [B, T], int64, ascending; None: 0..T-1
    read:         what is attended to of what is cached; None: all of it as it is
    """
    heads, nope, _ = mla.q_nope_HnD.shape
    rope, rank = len(mla.k_rope_eD), len(mla.kv_down_rD)
    # few wide products instead of many narrow ones: this is the inner loop of the refinement
    queries_kD = torch.cat([mla.q_nope_HnD.flatten(0, 1), mla.q_rope_HeD.flatten(0, 1)])
    down_kD = torch.cat([queries_kD if mla.q_down_qD is None else mla.q_down_qD, mla.kv_down_rD, mla.k_rope_eD])
    q_bias_k = _joined((mla.q_nope_bias_Hn, heads * nope), (mla.q_rope_bias_He, heads * rope))
    asked, asked_bias_k = (len(down_kD) - rank - rope, q_bias_k if mla.q_down_qD is None else None)
    bias_k = _joined((asked_bias_k, asked), (None, rank), (mla.k_rope_bias_e, rope))
    projected_BTk = torch.nn.functional.linear(x_BTD, down_kD, bias_k)
    q_BTk, c_BTr, k_rope = projected_BTk.split([len(down_kD) - rank - rope, rank, rope], dim=-1)
    if mla.q_down_qD is not None:
        q_BTk = torch.nn.functional.linear(q_BTk, queries_kD, q_bias_k)
    q_nope, q_rope = q_BTk.split([heads * nope, heads * rope], dim=-1)
    return _latent(_per_head(q_nope, heads), _per_head(q_rope, heads), c_BTr, k_rope, mla, positions_BT, read)


def feature_attention(
    q_BHTd: Tensor,
    features_BTF: Tensor,
    mla: MlaWeights,
    positions_BT: Tensor | None = None,
    read: Reading | None = None,
) -> Tensor:
    """Causal latent attention of weights with an encoder, heads side by side [..., T, H v]; no o_proj.

    q_BHTd:       queries of the encoder, unrotated;  features_BTF: its unrotated keys and its values, side by side
    positions_BT, read: see `mla_attention`
    """
    rank = len(mla.kv_down_rD)
    down_BTk = torch.nn.functional.linear(features_BTF, torch.cat([mla.kv_down_rD, mla.k_rope_eD]))
    q_rope_BHTe = torch.einsum("...HTd,Hed->...HTe", q_BHTd, mla.q_rope_HeD)
    c_BTr, k_rope_BTe = down_BTk[..., :rank], down_BTk[..., rank:]
    return _latent(q_BHTd, q_rope_BHTe, c_BTr, k_rope_BTe, mla, positions_BT, read)


def features(k_BGTd: Tensor, v_BGTv: Tensor) -> Tensor:
    """Keys of all groups, then values of all groups, of each token: [..., T, F]."""
    return torch.cat([x.transpose(-3, -2).flatten(-2) for x in (k_BGTd, v_BGTv)], dim=-1)


def over_features(gqa: GqaWeights, groups: int, heads: int, head_dim: int, value_dim: int) -> GqaWeights:
    """The same block as maps of what the source's projections and norms give: see `MlaWeights.encoder`.

    Queries are the identity on those of their own head, [H, d, d]; keys and values pick theirs among F features.
    """
    size = groups * (head_dim + value_dim)
    eye = torch.eye(size, dtype=gqa.o_DHd.dtype, device=gqa.o_DHd.device)
    return replace(
        gqa,
        q_HdD=torch.eye(head_dim).to(eye).expand(heads, -1, -1).contiguous(),
        k_GdD=eye[: groups * head_dim].unflatten(0, (groups, head_dim)),
        v_GdD=eye[groups * head_dim :].unflatten(0, (groups, value_dim)),
        encoded=True,
    )


def _joined(*parts: tuple[Tensor | None, int]) -> Tensor | None:
    """Biases of the given sizes side by side, zeros for those that are missing; None if all are."""
    given = next((bias for bias, _ in parts if bias is not None), None)
    if given is None:
        return None
    return torch.cat([given.new_zeros(size) if bias is None else bias.flatten() for bias, size in parts])


def _latent(
    q_nope_BHTn: Tensor,
    q_rope_BHTe: Tensor,
    c_BTr: Tensor,
    k_rope_BTe: Tensor,
    mla: MlaWeights,
    positions_BT: Tensor | None,
    read: Reading | None,
) -> Tensor:
    """Attention of projected queries over latents and rotary keys, heads side by side [..., T, H v]."""
    heads, nope = mla.k_up_Hnr.shape[:2]
    at = torch.arange(c_BTr.shape[-2], device=c_BTr.device) if positions_BT is None else positions_BT
    of_heads = at if at.dim() == 1 else at[..., None, :]
    q_rope_BHTe = rotate(q_rope_BHTe, mla.inv_freq_M, of_heads)
    c_BSr, k_rope_BSe = c_BTr, rotate(k_rope_BTe, mla.inv_freq_M, at)
    seen_BTS = visible(at, mla.window)
    if read is not None:
        if seen_BTS is None:
            seen_BTS = _up_to_its_own(at.shape[-1], at.device)
        key_BSk, seen_BTS = read(torch.cat([c_BSr, k_rope_BSe], -1), seen_BTS)
        c_BSr, k_rope_BSe = key_BSk.split([c_BTr.shape[-1], k_rope_BTe.shape[-1]], dim=-1)
    up_kr = torch.cat([mla.k_up_Hnr.flatten(0, 1), mla.v_up_Hvr.flatten(0, 1)])
    k_nope, value = torch.nn.functional.linear(c_BSr, up_kr).split([heads * nope, len(up_kr) - heads * nope], dim=-1)
    k_nope_BHSn = _per_head(k_nope, heads)
    k_rope_BHSe = _per_head(k_rope_BSe, 1).expand(*k_nope_BHSn.shape[:-1], -1)
    out_BHTv = causal(
        torch.cat([q_nope_BHTn, q_rope_BHTe], -1),
        torch.cat([k_nope_BHSn, k_rope_BHSe], -1),
        _per_head(value, heads),
        mla.scaling,
        seen_BTS,
        mla.softcap,
    )
    return out_BHTv.transpose(-3, -2).flatten(-2)


def _per_head(x_BTk: Tensor, heads: int) -> Tensor:
    """[..., T, heads * k] -> [..., heads, T, k]"""
    return x_BTk.unflatten(-1, (heads, -1)).transpose(-3, -2)


def visible(positions_BT: Tensor, window: int | None) -> Tensor | None:
    """Which keys a query sees, bool [..., T, T]; None if that is all up to itself."""
    if window is None or int((positions_BT[..., -1] - positions_BT[..., 0]).max()) < window:
        return None
    distance_BTT = positions_BT[..., :, None] - positions_BT[..., None, :]
    return (distance_BTT < window) & (distance_BTT >= 0)


def causal(
    q_BHTk: Tensor,
    k_BGSk: Tensor,
    v_BGSv: Tensor,
    scaling: float,
    seen_BTS: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one text [H, T, .] or several [B, H, T, .].

    seen_BTS: which keys each query sees, bool [T, S] or [B, T, S]; None: those up to its own
    """
    width = v_BGSv.shape[-1]
    one = q_BHTk.dim() == 3
    q, k, v = (x[None] if one else x for x in (q_BHTk, k_BGSk, v_BGSv))  # kernels want four axes
    if seen_BTS is not None and seen_BTS.dim() == 3:
        seen_BTS = seen_BTS[:, None]
    if softcap is not None:
        out_BHTv = _capped(q, k, v, scaling, seen_BTS, softcap)
        return out_BHTv[0] if one else out_BHTv
    if q.shape[-1] > width:
        # fused kernels on CPUs want keys and values of one width; the zeros cost less than the fallback
        v = torch.nn.functional.pad(v, (0, q.shape[-1] - width))
    if q.device.type != "cpu":
        # with a mask, or in float32, no fused kernel on GPUs takes grouped heads: what is left writes all scores down
        k, v = _one_per_query_head(k, v, q.shape[1])
    out_BHTv = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen_BTS, is_causal=seen_BTS is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )[..., :width]
    return out_BHTv[0] if one else out_BHTv


def _capped(
    q_BHTk: Tensor, k_BGSk: Tensor, v_BGSv: Tensor, scaling: float, seen_BTS: Tensor | None, softcap: float
) -> Tensor:
    """Attention with capped scores (Gemma 2, 2408.00118, section 2), for which there is no fused kernel."""
    k_BHSk, v_BHSv = _one_per_query_head(k_BGSk, v_BGSv, q_BHTk.shape[1])
    if seen_BTS is None:
        seen_BTS = _up_to_its_own(q_BHTk.shape[-2], q_BHTk.device)
    scores_BHTS = softcap * torch.tanh((q_BHTk @ k_BHSk.mT) * (scaling / softcap))
    p_BHTS = scores_BHTS.masked_fill(~seen_BTS, float("-inf")).softmax(-1).to(v_BHSv.dtype)
    return p_BHTS @ v_BHSv


def _one_per_query_head(k_BGSk: Tensor, v_BGSv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for every query head of their group."""
    repeated = heads // k_BGSk.shape[1]
    if repeated == 1:
        return k_BGSk, v_BGSv
    return k_BGSk.repeat_interleave(repeated, 1), v_BGSv.repeat_interleave(repeated, 1)


def _up_to_its_own(tokens: int, device: torch.device) -> Tensor:
    """Which tokens a token sees where nothing else is said, bool [T, T]."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
