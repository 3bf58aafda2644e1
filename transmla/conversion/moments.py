"""Second moments of one layer: everything the closed form needs to know of the calibration text.

Activations are seen once and summed up; nothing of the size of the text is kept.
Legend: T tokens of a window, D hidden_size, H heads, G key/value heads, R = H / G, d head_dim, S distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from transmla.conversion.streams import Streams
from transmla.maths.attention import GqaWeights, rotate, visible
from transmla.maths.closed_form import Moments
from transmla.model.layer import SourceLayer


@dataclass(frozen=True)
class _Attended:
    """Sums over one window, see `maths.closed_form.Moments`; received_T weights the window's tokens as keys."""

    query_Hdd: Tensor
    importance_H: Tensor
    distance_HS: Tensor
    received_T: Tensor
    attended_DD: Tensor


def observe(layer: SourceLayer, streams: Streams, num_attended: int) -> Moments:
    """Moments of one layer over the fitted windows, before the streams pass it.

    num_attended: windows whose attention matrices enter (quadratic in the window); the others
                  only enter the moments of the input
    """
    size, heads, head_dim = layer.gqa.k_GdD.shape[2], layer.geometry.num_attention_heads, layer.geometry.head_dim

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=streams.device)

    converted_DD, cross_DD, received_DD, attended_DD = (zeros(size, size) for _ in range(4))
    received_D, query_Hdd, importance_H = zeros(size), zeros(heads, head_dim, head_dim), zeros(heads)
    tokens, num_seen = streams.source_NTD.shape[1], zeros(1)
    distance_HS = zeros(heads, streams.last_position() + 1)
    looked_at = _spread(num_attended, streams.num_fitted_of_all)
    for place, source_TD, converted_TD in streams.windows():
        if place >= streams.num_fitted:
            break
        source_x_TD = layer.into_attention(source_TD)
        source_heads = layer.heads(source_x_TD)
        x_TD = layer.inputs(source_x_TD, source_heads)
        x_hat_TD = layer.inputs(layer.into_attention(converted_TD))
        converted_DD += (x_hat_TD.T @ x_hat_TD).double()
        cross_DD += (x_TD.T @ x_hat_TD).double()
        if streams.indices[place] not in looked_at:
            continue
        num_seen += 1
        seen = attended(source_heads, x_hat_TD, layer.gqa, streams.positions(place), streams.autocast)
        attended_DD += seen.attended_DD
        query_Hdd += seen.query_Hdd
        importance_H += seen.importance_H
        distance_HS[:, : seen.distance_HS.shape[1]] += seen.distance_HS
        # nothing is received where the output projection is zero
        received_T = (seen.received_T / seen.received_T.mean().clamp_min(1e-300)).float()
        received_D += (received_T @ x_hat_TD).double()
        received_DD += ((x_hat_TD * received_T[:, None]).T @ x_hat_TD).double()
    sums = (
        converted_DD,
        cross_DD,
        received_DD,
        attended_DD,
        received_D,
        query_Hdd,
        importance_H,
        distance_HS,
        num_seen,
    )
    streams.processes.sum_(sums)
    num_fitted_tokens, num_seen_tokens = streams.num_fitted_of_all * tokens, float(num_seen) * tokens
    mean_D = received_D / num_seen_tokens
    return Moments(
        converted_DD=converted_DD / num_fitted_tokens,
        cross_DD=cross_DD / num_fitted_tokens,
        # a key error shared by all tokens shifts every score of a row alike, and softmax does not see it
        received_DD=received_DD / num_seen_tokens - torch.outer(mean_D, mean_D),
        attended_DD=attended_DD / num_seen_tokens,
        query_Hdd=query_Hdd / num_seen_tokens,
        importance_H=importance_H / num_seen_tokens,
        distance_HS=distance_HS / distance_HS.sum(1, keepdim=True).clamp_min(1e-300),
    )


def _spread(wanted: int, available: int) -> set[int]:
    """At most `wanted` of `available` indices, evenly spread."""
    wanted = min(max(1, wanted), available)
    return {place * available // wanted for place in range(wanted)}


def attended(
    heads: tuple[Tensor, Tensor, Tensor],
    x_hat_TD: Tensor,
    gqa: GqaWeights,
    positions_T: Tensor | None = None,
    narrow: torch.dtype | None = None,
) -> _Attended:
    """What the heads of the source attend to in one window; one key/value group in memory at a time.

    heads:       unrotated queries [H, T, d], keys [G, T, d] and values [G, T, d] of the source
    x_hat_TD:    what the converted attention reads, of which the second moment under attention is wanted
    positions_T: int64, ascending; None: 0..T-1
    narrow:      dtype of the products of attention and input, the largest ones; their moments are float32 sums anyway
    """
    q_HTd, k_GTd, v_GTd = heads
    num_heads, tokens, groups = len(q_HTd), q_HTd.shape[1], len(k_GTd)
    device = q_HTd.device
    positions = torch.arange(tokens, device=device) if positions_T is None else positions_T
    q_GRTd = rotate(q_HTd, gqa.inv_freq_P, positions).unflatten(0, (groups, -1))
    k_GTd = rotate(k_GTd, gqa.inv_freq_P, positions)
    o_GRDd = gqa.o_DHd.unflatten(1, (groups, -1, v_GTd.shape[2])).permute(1, 2, 0, 3)
    seen_TT = visible(positions, gqa.window)
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1) if seen_TT is None else ~seen_TT
    narrow = narrow or x_hat_TD.dtype
    x_narrow_TD = x_hat_TD.to(narrow)
    importance, distance = [], []
    received_T = torch.zeros(tokens, dtype=torch.float64, device=device)
    attended_DD = torch.zeros(x_hat_TD.shape[1], x_hat_TD.shape[1], dtype=torch.float64, device=device)
    for group in range(groups):
        scores_RTT = (q_GRTd[group] @ k_GTd[group].T) * gqa.scaling
        if gqa.softcap is not None:
            scores_RTT = gqa.softcap * torch.tanh(scores_RTT / gqa.softcap)
        p_RTT = scores_RTT.masked_fill_(future, float("-inf")).softmax(-1)
        for p_TT in p_RTT:
            y_TD = (p_TT.to(narrow) @ x_narrow_TD).to(x_hat_TD.dtype)
            attended_DD += (y_TD.T @ y_TD).double() / num_heads
        weight_RTT = _output_sensitivity(p_RTT, v_GTd[group], o_GRDd[group])
        importance.append(weight_RTT.sum(2).double().sum(1))
        received_T += weight_RTT.sum((0, 1)).double()
        weight_RTT[:, :, 0] = 0
        distance.append(_by_distance(weight_RTT, positions))
    query_Hdd = (q_HTd.transpose(1, 2) @ q_HTd).double()
    return _Attended(query_Hdd, torch.cat(importance), torch.cat(distance), received_T, attended_DD)


def _output_sensitivity(p_RTT: Tensor, v_Td: Tensor, o_RDd: Tensor) -> Tensor:
    """p_ts^2 |o_proj (v_s - o_t)|^2 per head, in place of p: squared output change per squared score change."""
    out_RTd = p_RTT @ v_Td
    metric_Rdd = o_RDd.transpose(1, 2) @ o_RDd
    metric_v_RTd = v_Td @ metric_Rdd
    v_norm_RT = (metric_v_RTd * v_Td).sum(-1)
    out_norm_RT = (out_RTd @ metric_Rdd * out_RTd).sum(-1)
    spread_RTT = v_norm_RT[:, None] + out_norm_RT[..., None] - 2 * out_RTd @ metric_v_RTd.transpose(1, 2)
    return p_RTT.square_().mul_(spread_RTT.clamp_min_(0))


def _by_distance(weight_RTT: Tensor, positions_T: Tensor) -> Tensor:
    """Sums of lower-triangular matrices by distance 0, 1, .. of the positions, float64 [R, last position + 1]."""
    at = positions_T.tolist()
    starts = [0, *(place for place in range(1, len(at)) if at[place] - at[place - 1] > 1), len(at)]
    pieces = list(pairwise(starts))  # without a gap in them
    found = torch.zeros(len(weight_RTT), at[-1] + 1, dtype=torch.float64, device=weight_RTT.device)
    for number, (start, end) in enumerate(pieces):
        found[:, : end - start] += _by_offset(weight_RTT[:, start:end, start:end])[:, end - start - 1 :]
        for later, latest in pieces[number + 1 :]:
            sums = _by_offset(weight_RTT[:, later:latest, start:end])
            nearest = at[later] - at[end - 1]
            found[:, nearest : nearest + sums.shape[1]] += sums
    return found


def _by_offset(weight_RAB: Tensor) -> Tensor:
    """Sums along the diagonals a - b = 1 - B .. A - 1, float64 [R, A + B - 1]."""
    _, rows, columns = weight_RAB.shape
    # written with rows of A + B and read with rows of A + B - 1, row a moves right by a: column B - 1 + (a - b)
    skewed = torch.nn.functional.pad(weight_RAB.flip(2), (0, rows)).flatten(1)[:, : rows * (rows + columns - 1)]
    return skewed.unflatten(1, (rows, -1)).sum(1).double()
