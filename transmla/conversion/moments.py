"""Second moments of one layer: everything the closed form needs to know of the calibration text.

Activations are seen once and summed up; nothing of the size of the text is kept.
Legend: B windows, N tokens of all of them, T of one, D hidden_size, H heads, G key/value heads, R = H / G, d head_dim,
S distances or keys, A rows of queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from transmla.conversion.streams import Streams
from transmla.maths.attention import GqaWeights, rotate, visible
from transmla.maths.closed_form import Moments
from transmla.maths.moment import second_moment
from transmla.model.layer import SourceLayer

# rows of attention at once: what is computed of them stays in a cache
ROWS = 128


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

    converted_DD, cross_DD, aside_DD, aside_cross_DD, received_DD, attended_DD = (zeros(size, size) for _ in range(6))
    received_D, query_Hdd, importance_H = zeros(size), zeros(heads, head_dim, head_dim), zeros(heads)
    aside_energy = zeros(1)
    tokens, num_seen = streams.source_NTD.shape[1], 0
    distance_HS = zeros(heads, streams.last_position() + 1)
    looked_at = _spread(num_attended, streams.num_fitted_of_all)
    for places, source_BTD, converted_BTD in streams.batches():
        if places.start >= streams.num_fitted:
            break
        source_x_BTD = layer.into_attention(source_BTD)
        source_heads = layer.heads(source_x_BTD) if layer.gqa.encoded else None
        x_BTD = layer.inputs(source_x_BTD, source_heads)
        x_hat_BTD = layer.inputs(layer.into_attention(converted_BTD))
        x_ND, x_hat_ND, aside = x_BTD.flatten(0, 1), x_hat_BTD.flatten(0, 1), places.start >= streams.first_aside
        _add(second_moment(x_hat_ND), converted_DD, aside_DD if aside else None)
        _add(x_ND.T @ x_hat_ND, cross_DD, aside_cross_DD if aside else None)
        if aside:
            aside_energy += x_ND.square().sum(dtype=torch.float64)
        for number, place in enumerate(range(places.start, places.stop)):
            if streams.indices[place] not in looked_at:
                continue
            num_seen += 1
            x_hat_TD, source_x_TD = x_hat_BTD[number], source_x_BTD[number]
            seen = attended(layer.heads(source_x_TD), x_hat_TD, layer.gqa, streams.positions(place), streams.autocast)
            attended_DD += seen.attended_DD
            query_Hdd += seen.query_Hdd
            importance_H += seen.importance_H
            distance_HS[:, : seen.distance_HS.shape[1]] += seen.distance_HS
            received_T = seen.received_T
            del seen
            # nothing is received where the output projection is zero
            received_T = (received_T / received_T.mean().clamp_min(1e-300)).float()
            received_D += (received_T @ x_hat_TD).double()
            received_DD += second_moment(x_hat_TD * received_T.sqrt()[:, None])
    counted = zeros(1) + num_seen
    sums = (
        converted_DD,
        cross_DD,
        aside_DD,
        aside_cross_DD,
        aside_energy,
        received_DD,
        attended_DD,
        received_D,
        query_Hdd,
        importance_H,
        distance_HS,
        counted,
    )
    streams.processes.sum_(sums)
    num_fitted_tokens, num_seen_tokens = streams.num_fitted_of_all * tokens, float(counted) * tokens
    mean_D, num_aside_tokens = received_D / num_seen_tokens, streams.num_aside * tokens
    # in place: at the width of a large model one of these is half a gigabyte
    return Moments(
        converted_DD=converted_DD.div_(num_fitted_tokens),
        cross_DD=cross_DD.div_(num_fitted_tokens),
        # a key error shared by all tokens shifts every score of a row alike, and softmax does not see it
        received_DD=received_DD.div_(num_seen_tokens).addr_(mean_D, mean_D, alpha=-1),
        attended_DD=attended_DD.div_(num_seen_tokens),
        query_Hdd=query_Hdd / num_seen_tokens,
        importance_H=importance_H / num_seen_tokens,
        distance_HS=distance_HS / distance_HS.sum(1, keepdim=True).clamp_min(1e-300),
        aside_DD=aside_DD.div_(num_aside_tokens) if num_aside_tokens else None,
        aside_cross_DD=aside_cross_DD.div_(num_aside_tokens) if num_aside_tokens else None,
        aside_share=streams.num_aside / streams.num_fitted_of_all,
        aside_energy=float(aside_energy) / max(1, num_aside_tokens),
    )


def _add(product_DD: Tensor, *sums: Tensor | None) -> None:
    for sum_DD in sums:
        if sum_DD is not None:
            sum_DD += product_DD


def _spread(wanted: int, available: int) -> set[int]:
    """At most `wanted` of `available` indices, evenly spread, and over the processes, which take every n-th index."""
    if not available:
        return set()
    wanted = min(max(1, wanted), available)
    apart = available // wanted
    return {place * available // wanted + (place + place // apart) % apart for place in range(wanted)}


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
    at = positions.tolist()
    q_GRTd = rotate(q_HTd, gqa.inv_freq_P, positions).unflatten(0, (groups, -1)) * gqa.scaling
    k_GTd = rotate(k_GTd, gqa.inv_freq_P, positions)
    o_GRDd = gqa.o_DHd.unflatten(1, (groups, -1, v_GTd.shape[2])).permute(1, 2, 0, 3)
    seen_TT = visible(positions, gqa.window)
    narrow = narrow or x_hat_TD.dtype
    x_narrow_TD = x_hat_TD.to(narrow)
    importance_GR, distance_GRS = (
        torch.zeros(groups, num_heads // groups, *size, dtype=torch.float64, device=device)
        for size in ((), (at[-1] + 1,))
    )
    received_T = torch.zeros(tokens, dtype=torch.float64, device=device)
    # sum of (P x)^T P x over heads, in the order that costs less: of the attended inputs, or x^T (sum of P^T P) x
    of_tokens, size = tokens < x_hat_TD.shape[1], min(tokens, x_hat_TD.shape[1])
    attended_kk = torch.zeros(size, size, dtype=torch.float64, device=device)
    for group in range(groups):
        v_Td, metric_Rdd = v_GTd[group], o_GRDd[group].transpose(1, 2) @ o_GRDd[group]
        metric_v_RTd = v_Td @ metric_Rdd
        v_norm_RT = (metric_v_RTd * v_Td).sum(-1)
        for start in range(0, tokens, ROWS):
            # rows of queries [A] and the keys that they may see [S]
            end = min(start + ROWS, tokens)
            scores_RAS = q_GRTd[group, :, start:end] @ k_GTd[group, :end].T
            if gqa.softcap is not None:
                scores_RAS = gqa.softcap * torch.tanh(scores_RAS / gqa.softcap)
            if seen_TT is None:
                hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=device).triu(1)
                scores_RAS[:, :, start:].masked_fill_(hidden, float("-inf"))
            else:
                scores_RAS.masked_fill_(~seen_TT[start:end, :end], float("-inf"))
            p_RAS = scores_RAS.softmax(-1)
            if of_tokens:
                attended_kk[:end, :end] += second_moment(p_RAS.flatten(0, 1))
            else:
                y_RAD = (p_RAS.to(narrow) @ x_narrow_TD[:end]).to(x_hat_TD.dtype)
                attended_kk += second_moment(y_RAD.flatten(0, 1))
            weight_RAS = _output_sensitivity(p_RAS, v_Td[:end], metric_Rdd, metric_v_RTd[:, :end], v_norm_RT[:, :end])
            importance_GR[group] += weight_RAS.sum((1, 2), dtype=torch.float64)
            received_T[:end] += weight_RAS.sum((0, 1), dtype=torch.float64)
            weight_RAS[:, :, 0] = 0
            _add_by_distance(distance_GRS[group], weight_RAS, at[start:end], at[:end])
    query_Hdd = (q_HTd.transpose(1, 2) @ q_HTd).double()
    attended_DD = attended_kk
    if of_tokens:
        x_hat_TD = x_hat_TD.double()
        attended_DD = x_hat_TD.T @ (attended_kk @ x_hat_TD)
    attended_DD = attended_DD.div_(num_heads)
    return _Attended(query_Hdd, importance_GR.flatten(), distance_GRS.flatten(0, 1), received_T, attended_DD)


def _output_sensitivity(
    p_RAS: Tensor, v_Sd: Tensor, metric_Rdd: Tensor, metric_v_RSd: Tensor, v_norm_RS: Tensor
) -> Tensor:
    """p_ts^2 |o_proj (v_s - o_t)|^2 per head, in place of p: squared output change per squared score change.

    metric_Rdd: o_proj^T o_proj of each head;  metric_v_RSd: metric v;  v_norm_RS: v^T metric v
    """
    out_RAd = p_RAS @ v_Sd
    out_norm_RA = (out_RAd @ metric_Rdd * out_RAd).sum(-1)
    spread_RAS = torch.baddbmm(v_norm_RS[:, None], out_RAd, metric_v_RSd.transpose(1, 2), alpha=-2)
    return p_RAS.square_().mul_(spread_RAS.add_(out_norm_RA[..., None]).clamp_min_(0))


def _add_by_distance(sums_RS: Tensor, weight_RAB: Tensor, rows: list[int], keys: list[int]) -> None:
    """Add weights to the sums, float64 [R, S], of their distances: positions of the rows minus those of the keys.

    Positions are ascending; weights of keys behind their row are zero and go nowhere.
    """
    for row_start, row_end in _without_gap(rows):
        for key_start, key_end in _without_gap(keys):
            offset_RD = _by_offset(weight_RAB[:, row_start:row_end, key_start:key_end])
            nearest = rows[row_start] - keys[key_end - 1]  # of the first diagonal
            before = max(0, -nearest)
            if before < offset_RD.shape[1]:
                first = nearest + before
                sums_RS[:, first : first + offset_RD.shape[1] - before] += offset_RD[:, before:]


def _without_gap(at: list[int]) -> list[tuple[int, int]]:
    """Starts and ends of the pieces in which positions follow each other."""
    starts = [0, *(place for place in range(1, len(at)) if at[place] - at[place - 1] > 1), len(at)]
    return list(pairwise(starts))


def _by_offset(weight_RAB: Tensor) -> Tensor:
    """Sums along the diagonals a - b = 1 - B .. A - 1, float64 [R, A + B - 1]."""
    _, rows, columns = weight_RAB.shape
    # written with rows of A + B and read with rows of A + B - 1, row a moves right by a: column B - 1 + (a - b)
    skewed = torch.nn.functional.pad(weight_RAB.flip(2), (0, rows)).flatten(1)[:, : rows * (rows + columns - 1)]
    return skewed.unflatten(1, (rows, -1)).sum(1, dtype=torch.float64)
