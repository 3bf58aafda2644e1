"""Which part of the keys keeps a position: one shared rotary key, and maps for what is left over.

Per target pair m, the source pairs (g, p) nearest in log-frequency form a bucket, or, where the target's
frequencies are free, the neighbours that are best held together; one complex component of the bucket becomes the
rotary key, weighted by what the queries gain from it. What is left over goes to the latent, where it cannot turn, so
every head multiplies it by the constant nearest to exp(-i f distance) over the distances that the head really
attends to (complex: a head that looks two tokens back keeps that phase).

Loses: everything but one complex component per bucket (its loss is part of the measured layer loss).
Exact: one key/value head and e = d with the source's own frequencies (tested to 1e-10).
Shape legend: see transmla/maths/__init__.py. K = G d, all source keys of a token, group by group.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transmla.maths.attention import GqaWeights, inverse_frequencies

RANK_PRESSURE = 0.3


@dataclass(frozen=True)
class RotarySplit:
    """k_rope_eD x is the shared rotary key, q_rope_HeD its queries; head i reads leftover_HdK[i] k of all keys k."""

    k_rope_eD: Tensor
    q_rope_HeD: Tensor
    leftover_HdK: Tensor
    inv_freq_M: Tensor


def nearest_pairs(inv_freq_P: Tensor, inv_freq_M: Tensor) -> Tensor:
    """For every source pair the target pair nearest in log-frequency, int64 [P]; the slowest for pairs that stand."""
    return (inv_freq_P.clamp_min(1e-30).log()[:, None] - inv_freq_M.log()).abs().argmin(dim=1)


def mean_turn(distance_HS: Tensor, f_P: Tensor) -> Tensor:
    """c = E[exp(-i f D)] per head and pair, complex128 [H, P]: the constant nearest to the turning, |c| <= 1.

    distance_HS: weight of distance 0, 1, .. in each head, rows sum to one, float64
    """
    positions = torch.arange(distance_HS.shape[1], dtype=torch.float64, device=distance_HS.device)
    return distance_HS.to(torch.complex128) @ torch.exp(-1j * positions[:, None] * f_P)


def rotary_split(
    gqa: GqaWeights,
    k_GdD: Tensor,
    moment_DD: Tensor,
    query_Hdd: Tensor,
    importance_H: Tensor,
    distance_HS: Tensor,
    qk_rope_head_dim: int,
    theta: float | None,
    rank_pressure: float = RANK_PRESSURE,
) -> RotarySplit:
    """The rotary half of the conversion, in float64.

    gqa:          the source's attention, float64 (queries, frequencies)
    k_GdD:        the key projection to reproduce; differs from gqa.k_GdD when the input is a repaired stream
    moment_DD:    second moment of the input, E[x x^T]
    query_Hdd:    second moment of the unrotated queries, E[q q^T]
    importance_H: how strongly a squared score error of a head reaches the output
    distance_HS:  attended distances of each head, rows sum to one
    theta:        of the target's frequencies; None: they are chosen freely, see `chosen_frequencies`
    rank_pressure: added to every pair's gain from being rotary, since whatever is not competes for rank
    """
    num_groups, head_dim, _ = k_GdD.shape
    pairs, heads_per_group = head_dim // 2, len(gqa.q_HdD) // num_groups
    still_HP = mean_turn(distance_HS, gqa.inv_freq_P)
    z_GPD, q_HPD = _as_complex(k_GdD), _as_complex(gqa.q_HdD)
    gram_GPGP = pair_gram(k_GdD, moment_DD)

    def weights(turned_B: Tensor, first: int = 0) -> Tensor:
        """Omega [G, B] of the pairs from `first` on, if they turn with these frequencies."""
        places = torch.arange(first, first + len(turned_B), device=k_GdD.device)
        own_B, both = gqa.inv_freq_P[places], torch.cat([places, places + pairs])
        mismatch_HB = 2 - 2 * mean_turn(distance_HS, own_B - turned_B).real
        # pairs that stand are held exactly by the latent
        gain_HB = (1 - still_HP[:, places].abs() ** 2 - mismatch_HB + rank_pressure) * (own_B != 0)
        return _pair_weights(query_Hdd[:, both][:, :, both], importance_H, gain_HB, num_groups)

    if theta is None:
        inv_freq_M, bucket_P = chosen_frequencies(gqa.inv_freq_P, gram_GPGP, weights, qk_rope_head_dim // 2)
    else:
        inv_freq_M = inverse_frequencies(theta, qk_rope_head_dim).to(k_GdD.device)
        bucket_P = nearest_pairs(gqa.inv_freq_P, inv_freq_M)
    omega_GP = weights(inv_freq_M[bucket_P]) * (bucket_P >= 0)
    component_GP = torch.zeros(num_groups, pairs, dtype=torch.complex128, device=k_GdD.device)
    reader_GP = torch.zeros_like(component_GP)
    k_rope_MD = torch.zeros(len(inv_freq_M), k_GdD.shape[2], dtype=torch.complex128, device=k_GdD.device)
    num_asked = gqa.q_HdD.shape[2]  # what queries read: as much as keys, or those of their own head
    q_rope_HMD = torch.zeros(len(q_HPD), len(inv_freq_M), num_asked, dtype=torch.complex128, device=k_GdD.device)
    for m in range(len(inv_freq_M)):
        bucket = (bucket_P == m).nonzero()[:, 0]
        omega_GB = omega_GP[:, bucket]
        if not bool(omega_GB.any()):
            continue
        a_GB = _top_component(gram_GPGP[:, bucket][..., bucket], omega_GB)
        reader_GP[:, bucket] = a_GB.conj() * omega_GB
        component_GP[:, bucket] = torch.where(omega_GB > 0, a_GB / omega_GB, 0)
        k_rope_MD[m] = torch.einsum("GB,GBD->D", reader_GP[:, bucket], z_GPD[:, bucket])
        a_HB = component_GP[:, bucket].repeat_interleave(heads_per_group, 0)
        q_rope_HMD[:, m] = torch.einsum("HB,HBD->HD", a_HB.conj(), q_HPD[:, bucket])
    captured = _captured(component_GP, reader_GP, bucket_P)
    leftover = torch.stack(
        [_leftover(still_P, head // heads_per_group, captured) for head, still_P in enumerate(still_HP)]
    )
    return RotarySplit(_as_real(k_rope_MD), _as_real(q_rope_HMD), leftover, inv_freq_M)


def unit_keys(split: RotarySplit, moment_DD: Tensor) -> RotarySplit:
    """The same with pairs of the rotary key that have a mean square of 1, as latents do; the queries take the factors,
    so that no score changes. Numbers of eight bits, and blocks of them that share a scale, have room for one size only.

    moment_DD: second moment of the input, E[x x^T]
    """
    square_e = torch.einsum("eD,DE,eE->e", split.k_rope_eD, moment_DD, split.k_rope_eD)
    size_e = square_e.unflatten(0, (2, -1)).mean(0).clamp_min(0).sqrt().repeat(2)
    # a pair that nothing is in, or nothing but rounding, stays so
    size_e1 = torch.where(size_e > 1e-6 * size_e.max(), size_e, 1.0)[:, None]
    return replace(split, k_rope_eD=split.k_rope_eD / size_e1, q_rope_HeD=split.q_rope_HeD * size_e1)


def pair_gram(k_GdD: Tensor, moment_DD: Tensor) -> Tensor:
    """E[z z^H] of all source pairs, complex128 [G, P, G, P], from real products alone."""
    groups, head_dim, _ = k_GdD.shape
    k_KD, parts = k_GdD.flatten(0, 1), (groups, 2, head_dim // 2)
    products = (k_KD @ moment_DD @ k_KD.T).unflatten(1, parts).unflatten(0, parts)
    (real, real_imag), (imag_real, imag) = ([products[:, i, :, :, j] for j in range(2)] for i in range(2))
    return torch.complex(real + imag, imag_real - real_imag)


def chosen_frequencies(
    inv_freq_P: Tensor,
    gram_GPGP: Tensor,
    weights: Callable[[Tensor, int], Tensor],
    num_pairs: int,
) -> tuple[Tensor, Tensor]:
    """Frequencies of the target, float64 [M], fastest first, and the bucket of each source pair, int64 [P], -1: none.

    A bucket is a run of neighbouring pairs; it turns with the frequency of the one that weighs most, and is worth the
    energy of its best component, weighted as in `rotary_split`. Of all ways to cut the pairs into so many runs, with or
    without pairs left out between them, the one that is worth most: dynamic programming over the pairs.

    gram_GPGP: E[z z^H] of the pairs, see `pair_gram`
    weights:   frequencies [B] that pairs turn with, and the first of these pairs -> Omega [G, B]
    """
    num_source, device = len(inv_freq_P), inv_freq_P.device
    energy_GP = torch.einsum("GPGP->GP", gram_GPGP).real
    leads = (weights(inv_freq_P, 0).square() * energy_GP).sum(0).tolist()
    longest = max(1, min(num_source, -(-3 * num_source // num_pairs)))
    # a pair leads no run that does not hold it
    reach = [(max(0, lead - longest + 1), min(num_source, lead + longest)) for lead in range(num_source)]
    by_lead = [weights(inv_freq_P[lead].expand(end - start), start) for lead, (start, end) in enumerate(reach)]
    worth: dict[tuple[int, int], tuple[float, int]] = {}
    for start in range(num_source):
        for end in range(start + 1, min(start + longest, num_source) + 1):
            lead = max(range(start, end), key=leads.__getitem__)
            omega_GB = by_lead[lead][:, start - reach[lead][0] : end - reach[lead][0]]
            weighted = omega_GB[..., None, None] * gram_GPGP[:, start:end, :, start:end] * omega_GB
            size = weighted.shape[0] * weighted.shape[1]
            value = torch.linalg.eigvalsh(weighted.reshape(size, size))[-1]
            worth[start, end] = float(value), lead
    best = [[0.0] * (num_source + 1) for _ in range(num_pairs + 1)]
    came: list[list[tuple[int, int] | None]] = [[None] * (num_source + 1) for _ in range(num_pairs + 1)]
    for used in range(1, num_pairs + 1):
        for end in range(1, num_source + 1):
            best[used][end], came[used][end] = best[used][end - 1], came[used][end - 1]
            for start in range(max(0, end - longest), end):
                value = best[used - 1][start] + worth[start, end][0]
                if value > best[used][end]:
                    best[used][end], came[used][end] = value, (start, end)
    bucket_P = torch.full((num_source,), -1, dtype=torch.int64, device=device)
    found, used, end = [], num_pairs, num_source
    while used > 0 and (run := came[used][end]) is not None:
        found.append(run)
        used, end = used - 1, run[0]
    # runs that nothing gains from stay empty; their pairs turn like the slowest
    slowest = float(inv_freq_P[inv_freq_P > 0].min()) if bool((inv_freq_P > 0).any()) else 1.0
    inv_freq_M = torch.full((num_pairs,), slowest, dtype=torch.float64, device=device)
    for number, run in enumerate(reversed(found)):
        inv_freq_M[number] = inv_freq_P[worth[run][1]]
        bucket_P[run[0] : run[1]] = number
    return inv_freq_M, bucket_P


def _pair_weights(query_Hdd: Tensor, importance_H: Tensor, gain_HP: Tensor, num_groups: int) -> Tensor:
    """Omega [G, P]: root of the summed importance of a pair over the heads that read it; 0 where turning with the
    target's frequency is further from the pair's own turning than standing still is."""
    energy_Hd = query_Hdd.diagonal(dim1=1, dim2=2)
    real, imag = energy_Hd.chunk(2, dim=1)
    weight_HP = importance_H[:, None] * (real + imag) * gain_HP
    return weight_HP.unflatten(0, (num_groups, -1)).sum(dim=1).clamp_min(0).sqrt()


def _top_component(gram_GBGB: Tensor, omega_GB: Tensor) -> Tensor:
    """Unit vector a [G, B] with the largest a^H S a, S = Omega W C W^H Omega (method, section 2)."""
    weighted = omega_GB[..., None, None] * gram_GBGB * omega_GB
    _, vectors = torch.linalg.eigh(weighted.flatten(2).flatten(0, 1))
    return vectors[:, -1].unflatten(0, omega_GB.shape)


def _captured(component_GP: Tensor, reader_GP: Tensor, bucket_P: Tensor) -> Tensor:
    """The map z -> (a / omega) u of all pairs of all groups, complex [G, P, G P]: what the rotary key carries."""
    same_bucket = (bucket_P[:, None] == bucket_P).to(component_GP.dtype)
    return torch.einsum("gp,hq,pq->gphq", component_GP, reader_GP, same_bucket).flatten(2)


def _leftover(still_P: Tensor, group: int, captured: Tensor) -> Tensor:
    """Real [d, K]: still * (z - captured z) of one head."""
    num_groups, pairs, _ = captured.shape
    own = torch.zeros(pairs, num_groups, pairs, dtype=captured.dtype, device=captured.device)
    own[:, group] = torch.eye(pairs, dtype=captured.dtype, device=captured.device)
    rest = (still_P[:, None] * (own.flatten(1) - captured[group])).unflatten(1, (num_groups, pairs))
    top = torch.cat([rest.real, -rest.imag], dim=2)
    bottom = torch.cat([rest.imag, rest.real], dim=2)
    return torch.cat([top, bottom]).flatten(1)


def _as_complex(x_dD: Tensor) -> Tensor:
    real, imag = x_dD.chunk(2, dim=-2)
    return torch.complex(real.contiguous(), imag.contiguous())


def _as_real(x_MD: Tensor) -> Tensor:
    return torch.cat([x_MD.real, x_MD.imag], dim=-2)
