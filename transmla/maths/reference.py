"""Slow, obvious, float64: every formula once more, one head and one token at a time. Only tests run it.

Shape legend: see transmla/maths/__init__.py.
"""

import cmath
import math

import torch
from torch import Tensor

from transmla.maths.attention import GqaWeights, MlaWeights


def gqa_naive(x_TD: Tensor, gqa: GqaWeights, positions: list[int] | None = None) -> Tensor:
    """Output of the attention block [T, D], o_proj included. positions: of the tokens; None: 0..T-1"""
    at = positions or list(range(len(x_TD)))
    if gqa.biased:
        x_TD = torch.cat([x_TD, torch.ones_like(x_TD[:, :1])], dim=1)
    heads_per_group = len(gqa.q_HdD) // len(gqa.k_GdD)
    frequencies = gqa.inv_freq_P.tolist()
    columns = []
    for head, q_dD in enumerate(gqa.q_HdD):
        k_dD, v_dD = gqa.k_GdD[head // heads_per_group], gqa.v_GdD[head // heads_per_group]
        rows = []
        for t in range(len(x_TD)):
            seen = _seen(at, t, gqa.window)
            scores = [
                gqa.scaling * _rotary_score(q_dD @ x_TD[t], k_dD @ x_TD[s], frequencies, at[t] - at[s]) for s in seen
            ]
            rows.append(_mean(scores, [v_dD @ x_TD[s] for s in seen], gqa.softcap))
        columns.append(torch.stack(rows))
    out_TD = torch.cat(columns, dim=1) @ gqa.o_DHd.T
    return out_TD if gqa.o_bias_D is None else out_TD + gqa.o_bias_D


def mla_naive(
    x_TD: Tensor, mla: MlaWeights, positions: list[int] | None = None, queries_HTd: Tensor | None = None
) -> Tensor:
    """Output of the attention block [T, D], o_proj included; keys and values rebuilt from cached values only.

    x_TD:        the input, or keys and values side by side for weights with an encoder
    positions:   of the tokens; None: 0..T-1
    queries_HTd: of the encoder, where there is one
    """
    at = positions or list(range(len(x_TD)))
    frequencies = mla.inv_freq_M.tolist()
    latents = [mla.kv_down_rD @ x_D for x_D in x_TD]
    rotary_keys = [_plus(mla.k_rope_eD @ x_D, mla.k_rope_bias_e) for x_D in x_TD]
    columns = []
    for head in range(len(mla.q_nope_HnD)):
        rows = []
        for t in range(len(x_TD)):
            if queries_HTd is not None:
                asking = queries_HTd[head, t]
            else:
                asking = x_TD[t] if mla.q_down_qD is None else mla.q_down_qD @ x_TD[t]
            q_nope = _plus(mla.q_nope_HnD[head] @ asking, _of(mla.q_nope_bias_Hn, head))
            q_rope = _plus(mla.q_rope_HeD[head] @ asking, _of(mla.q_rope_bias_He, head))
            seen = _seen(at, t, mla.window)
            scores = [
                mla.scaling
                * (
                    float(q_nope @ (mla.k_up_Hnr[head] @ latents[s]))
                    + _rotary_score(q_rope, rotary_keys[s], frequencies, at[t] - at[s])
                )
                for s in seen
            ]
            rows.append(_mean(scores, [mla.v_up_Hvr[head] @ latents[s] for s in seen], mla.softcap))
        columns.append(torch.stack(rows))
    return _plus(torch.cat(columns, dim=1) @ mla.o_DHv.T, mla.o_bias_D)


def _seen(at: list[int], t: int, window: int | None) -> list[int]:
    """Keys that query t sees."""
    return [s for s in range(t + 1) if window is None or at[t] - at[s] < window]


def _of(bias_Hk: Tensor | None, head: int) -> Tensor | None:
    return None if bias_Hk is None else bias_Hk[head]


def _plus(values: Tensor, bias: Tensor | None) -> Tensor:
    return values if bias is None else values + bias


def _rotary_score(q: Tensor, k: Tensor, frequencies: list[float], distance: int) -> float:
    """Re sum_p conj(q_p) k_p exp(-i f_p distance): what rotating both sides amounts to."""
    half = len(frequencies)
    total = 0.0
    for p, frequency in enumerate(frequencies):
        q_p = complex(float(q[p]), float(q[p + half]))
        k_p = complex(float(k[p]), float(k[p + half]))
        total += (q_p.conjugate() * k_p * cmath.exp(-1j * frequency * distance)).real
    return total


def _mean(scores: list[float], values: list[Tensor], softcap: float | None) -> Tensor:
    if softcap is not None:
        scores = [softcap * math.tanh(score / softcap) for score in scores]
    weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0)
    return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(values[0]))
