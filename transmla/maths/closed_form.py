"""One layer from grouped-query to latent attention, without a gradient: aim, split, then factor.

Shape legend: see transmla/maths/__init__.py. K = G d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transmla.maths.attention import GqaWeights, MlaWeights
from transmla.maths.low_rank import Block, joint_low_rank
from transmla.maths.moment import raised
from transmla.maths.refit import chosen_ridge, stream_map
from transmla.maths.rotary_split import RANK_PRESSURE, RotarySplit, mean_turn, rotary_split, unit_keys


@dataclass(frozen=True)
class Moments:
    """What the calibration text says about one layer. All float64, means per token; x is the layer's normed input in
    the source, x_hat in the converted stream.

    converted_DD:   E[x_hat x_hat^T];  cross_DD: E[x x_hat^T], which with all that is set aside only `aim` needs
    aside_DD, aside_cross_DD: the same over tokens that ridges are chosen on, a share `aside_share` of all; None where
                    there are too few windows for that
    aside_energy:   E[|x|^2] over them
    received_DD:    covariance of x_hat, tokens weighted by how much attention error they cause as keys
    attended_DD:    E[y y^T] with y = sum_s p_ts x_hat_s, mean over heads: what value errors add up to in the output
    query_Hdd:      E[q q^T] of unrotated source queries
    importance_H:   E[sum_s p_ts^2 |o_proj (v_s - o_t)|^2]: output energy per unit of squared score error
    distance_HS:    the same weights by distance t - s, rows sum to one; without the first token, an attention sink
                    that is seen from everywhere and says nothing about distances
    """

    converted_DD: Tensor
    cross_DD: Tensor | None
    received_DD: Tensor
    attended_DD: Tensor
    query_Hdd: Tensor
    importance_H: Tensor
    distance_HS: Tensor
    aside_DD: Tensor | None = None
    aside_cross_DD: Tensor | None = None
    aside_share: float = 0.0
    aside_energy: float = 0.0

    def of_converted(self) -> Moments:
        """What is wanted when the aim is known."""
        return replace(self, cross_DD=None, aside_DD=None, aside_cross_DD=None)

    def estimate_DD(self, ridges: Sequence[float]) -> tuple[Tensor, float]:
        """Linear estimate of x from x_hat, and the ridge, relative to the input's energy, that it is held back by."""
        if self.cross_DD is None:
            raise ValueError("these are moments of the converted stream alone")
        ridge = self._chosen_ridge(self.cross_DD, ridges)
        return stream_map(self.converted_DD, self.cross_DD, ridge), ridge

    def _chosen_ridge(self, cross_DD: Tensor, ridges: Sequence[float]) -> float:
        if self.aside_DD is None or self.aside_cross_DD is None or len(ridges) == 1:
            return ridges[0]
        # what is left without the tokens set aside
        share = self.aside_share
        gram_DD = torch.sub(self.converted_DD, self.aside_DD, alpha=share).div_(1 - share)
        rest_DD = torch.sub(cross_DD, self.aside_cross_DD, alpha=share).div_(1 - share)
        return chosen_ridge(
            ridges,
            lambda one: stream_map(gram_DD, rest_DD, one),
            self.aside_DD,
            self.aside_cross_DD.T,
            self.aside_energy,
        )


@dataclass(frozen=True)
class ClosedForm:
    """The numbers that the closed form is tuned by; measured in benchmarks/variants.md.

    rank_pressure: see `rotary_split`
    key_weight:    of key errors against value errors; above 1 because errors of attended keys add up, too
    plain_share:   share of the plain moment in the attended one, against noise in few windows
    unseen:        energy that every direction of the input has beside that of the calibration tokens, as a share of
                   their mean: other tokens have some of what these lack, and a latent fitted to nothing there is huge
    stream_ridge:  pull of the stream estimate towards the identity, relative to the mean input energy
    output_ridge:  pull of the refitted o_proj towards the source's, relative to the mean head energy
    ridge_steps:   times these, ascending: the first behind which windows that are set aside err more, layer by layer
    """

    rank_pressure: float = RANK_PRESSURE
    key_weight: float = 8.0
    plain_share: float = 0.3
    unseen: float = 1e-3
    stream_ridge: float = 1e-3
    output_ridge: float = 1e-2
    ridge_steps: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)

    def ridges(self, least: float) -> tuple[float, ...]:
        """All that are tried, ascending."""
        return tuple(least * step for step in self.ridge_steps)


@dataclass(frozen=True)
class Aim:
    """What the latent attention of a layer is to stand in for: the source's, float64, with queries, keys and values as
    they are best told from the converted stream. stream_ridge: what that estimate is held back by"""

    gqa: GqaWeights
    stream_ridge: float


@dataclass(frozen=True)
class FittedLayer:
    """Converted weights (float64, o_proj still the source's), the share of weighted energy that the ranks drop (of the
    latent, and of the queries where they have a rank), and the ridge of the stream estimate."""

    mla: MlaWeights
    latent_loss: float
    stream_ridge: float
    query_loss: float | None = None


def aim(gqa: GqaWeights, moments: Moments, method: ClosedForm) -> Aim:
    """The source's queries, keys and values, read from the converted stream, which makes up for earlier layers.

    Where `gqa` is biased, the inputs that `moments` are of end in a 1; where it is encoded, they are features.
    """
    estimate_DD, stream_ridge = moments.estimate_DD(method.ridges(method.stream_ridge))
    gqa = gqa.to(dtype=torch.float64)
    gqa = replace(gqa, k_GdD=gqa.k_GdD @ estimate_DD, v_GdD=gqa.v_GdD @ estimate_DD)
    if not gqa.encoded:  # else queries read other features than keys and values
        gqa = replace(gqa, q_HdD=gqa.q_HdD @ estimate_DD)
    return Aim(gqa, stream_ridge)


def fit_aimed(
    aimed: Aim,
    moments: Moments,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    theta: float | None,
    method: ClosedForm,
    q_lora_rank: int | None = None,
    *,
    biases: bool = True,
) -> FittedLayer:
    """Latent attention of the given sizes.

    moments: those `of_converted` are enough
    theta:   of the rotary frequencies; None: every layer gets those that suit it best
    biases:  False: the result has none, whatever `gqa` has; see `without_biases`
    """
    gqa = aimed.gqa
    # what all tokens share of unrotated keys, a softmax does not see: only biases that turn count
    content_GdD = gqa.k_GdD
    if gqa.biased and not biases:
        content_GdD = content_GdD[..., :-1]
        gqa, moments = without_biases(gqa, moments, method)
    k_GdD, v_GdD, groups = gqa.k_GdD, gqa.v_GdD, len(gqa.k_GdD)
    split = rotary_split(
        gqa,
        k_GdD,
        moments.converted_DD,
        moments.query_Hdd,
        moments.importance_H,
        moments.distance_HS,
        qk_rope_head_dim,
        theta,
        method.rank_pressure,
    )
    split = unit_keys(split, moments.converted_DD)
    # key errors count by the attention that tokens receive, value errors by what they add up to under attention
    attended_DD = torch.lerp(moments.attended_DD, moments.converted_DD, method.plain_share)
    if gqa.biased:
        attended_DD = attended_DD / attended_DD[-1, -1]  # attention sums to one, but for rounding
    mean_D = attended_DD[-1].clone()  # not a view: it would hold all of it
    if gqa.biased:  # what all tokens share is left to the bias of the output
        attended_DD = attended_DD - torch.outer(mean_D, mean_D)
    received_DD, attended_DD = (
        _with_unseen(moment_DD, method.unseen, gqa.biased) for moment_DD in (moments.received_DD, attended_DD)
    )
    low = joint_low_rank(
        Block(content_GdD.flatten(0, 1), method.key_weight * _key_metric(split, moments, gqa.scaling), received_DD),
        Block(v_GdD.flatten(0, 1), _value_metric(gqa.o_DHd, groups, v_GdD.shape[1]), attended_DD),
        kv_lora_rank,
    )
    keys_Kr, values_Kr = low.decoders
    v_up_Gdr = values_Kr.unflatten(0, v_GdD.shape[:2])
    mla = MlaWeights(
        q_nope_HnD=gqa.q_HdD,
        q_rope_HeD=split.q_rope_HeD,
        kv_down_rD=low.encoder_rD,
        k_rope_eD=split.k_rope_eD,
        k_up_Hnr=split.leftover_HdK @ keys_Kr,
        v_up_Hvr=v_up_Gdr.repeat_interleave(len(gqa.q_HdD) // groups, 0),
        o_DHv=gqa.o_DHd,
        inv_freq_M=split.inv_freq_M,
        scaling=gqa.scaling,
        o_bias_D=gqa.o_bias_D if biases else None,  # for the refit to make up for
        window=gqa.window,
        softcap=gqa.softcap,
    )
    query_loss = None
    if q_lora_rank is not None:
        mla, query_loss = narrow_queries(mla, moments, q_lora_rank)
    if gqa.biased:
        mean_value_Hv = (v_GdD @ mean_D).repeat_interleave(len(gqa.q_HdD) // groups, 0)
        mla = _with_biases(mla, mean_D, mean_value_Hv)
    return FittedLayer(mla, low.loss, aimed.stream_ridge, query_loss)


def without_biases(gqa: GqaWeights, moments: Moments, method: ClosedForm) -> tuple[GqaWeights, Moments]:
    """Projections that read their biases from the input, and the moments of that input alone.

    Behind an RMS norm, one direction a of the input has nearly the same product with every token, so W x + b is nearly
    (W + b a^T) x: a is the regression of the 1 that biased inputs end in on the rest of them. Keys and values take the
    one that suits the tokens that are attended to. Biases of keys are largest in pairs that hardly turn, where nobody
    sees them, and anything read from the input would vary: see `_seen_of_constants`.
    """
    seen_DD = torch.lerp(moments.attended_DD, moments.converted_DD, method.plain_share)
    (asking_D, _), (seen_D, missed) = (
        _constant_D(moment_DD, method.unseen) for moment_DD in (moments.converted_DD, seen_DD)
    )

    def read(weight_XdD: Tensor, constant_D: Tensor, share: Tensor | float = 1.0) -> Tensor:
        return weight_XdD[..., :-1] + share * weight_XdD[..., -1:] * constant_D

    turning_GP = _seen_of_constants(gqa, moments)
    # the share of a bias with the smallest error: what is left out turns, what is read varies
    share_GP = turning_GP / (turning_GP + missed).clamp_min(1e-300)
    gqa = replace(
        gqa,
        q_HdD=read(gqa.q_HdD, asking_D),
        k_GdD=read(gqa.k_GdD, seen_D, share_GP.repeat(1, 2)[..., None]),
        v_GdD=read(gqa.v_GdD, seen_D),
        biased=False,
    )
    inner = {name: getattr(moments, name)[:-1, :-1] for name in ("converted_DD", "received_DD", "attended_DD")}
    return gqa, replace(moments.of_converted(), **inner)


def _constant_D(moment_DD: Tensor, unseen: float) -> tuple[Tensor, float]:
    """The a for which a^T x is nearest to 1, of inputs [x; 1] with this second moment, and E[(a^T x - 1)^2].

    unseen: see `ClosedForm`
    """
    moment_DD = moment_DD / moment_DD[-1, -1]
    inner_DD, mean_D = moment_DD[:-1, :-1], moment_DD[:-1, -1]
    a_D = torch.linalg.solve(raised(inner_DD, unseen * float(inner_DD.diagonal().mean())), mean_D)
    return a_D, max(0.0, float(1 - 2 * a_D @ mean_D + a_D @ inner_DD @ a_D))


def _seen_of_constants(gqa: GqaWeights, moments: Moments) -> Tensor:
    """The share of the energy of a constant in a pair of the keys that scores vary by, [G, P]: 1 - |E[exp(-i f D)]|^2
    over attended distances D, mean over the heads of a group by what their queries bring of the pair to the output."""
    still_HP = mean_turn(moments.distance_HS, gqa.inv_freq_P)
    energy_HP = moments.query_Hdd.diagonal(dim1=1, dim2=2).unflatten(1, (2, -1)).sum(1) * moments.importance_H[:, None]
    weight_GRP, varied_GRP = (x_HP.unflatten(0, (len(gqa.k_GdD), -1)) for x_HP in (energy_HP, 1 - still_HP.abs() ** 2))
    total_GP = weight_GRP.sum(1).clamp_min(1e-300)
    return ((weight_GRP * varied_GRP).sum(1) / total_GP).clamp_min(0)


def _with_unseen(moment_DD: Tensor, share: float, biased: bool) -> Tensor:
    """The moment with a share of its mean energy in every direction, but for the constant of biased inputs."""
    energy_D = moment_DD.diagonal().mean().expand(len(moment_DD)).clone()
    if biased:
        energy_D = energy_D.fill_(float(moment_DD.diagonal()[:-1].mean()))
        energy_D[-1] = 0
    return raised(moment_DD, share * energy_D)


def _with_biases(mla: MlaWeights, mean_D: Tensor, mean_value_Hv: Tensor) -> MlaWeights:
    """The last columns as biases. The latent gets none: see `MlaWeights`.

    mean_D: mean input of the values, weighted by attention;  mean_value_Hv: of the source's values under it
    """
    latent_mean_r = mla.kv_down_rD[:, :-1] @ mean_D[:-1]
    missing_Hv = mean_value_Hv - mla.v_up_Hvr @ latent_mean_r
    o_bias_D = mla.o_DHv @ missing_Hv.flatten()
    queries = {"q_nope_HnD": mla.q_nope_HnD, "q_rope_HeD": mla.q_rope_HeD}
    changes: dict[str, Tensor | None] = {name: weight[..., :-1] for name, weight in queries.items()}
    changes |= {"q_nope_bias_Hn": mla.q_nope_HnD[..., -1], "q_rope_bias_He": mla.q_rope_HeD[..., -1]}
    if mla.q_down_qD is not None:
        # queries read their latent, whose bias they multiply
        bias_q = mla.q_down_qD[:, -1]
        changes = {"q_down_qD": mla.q_down_qD[:, :-1]}
        changes |= {"q_nope_bias_Hn": mla.q_nope_HnD @ bias_q, "q_rope_bias_He": mla.q_rope_HeD @ bias_q}
    return replace(
        mla,
        **changes,  # type: ignore[arg-type]
        kv_down_rD=mla.kv_down_rD[:, :-1],
        k_rope_eD=mla.k_rope_eD[:, :-1],
        k_rope_bias_e=mla.k_rope_eD[:, -1],
        o_bias_D=o_bias_D if mla.o_bias_D is None else mla.o_bias_D + o_bias_D,
    )


def narrow_queries(mla: MlaWeights, moments: Moments, rank: int) -> tuple[MlaWeights, float]:
    """Queries through a latent of `rank` values, and the share of weighted energy that it drops.

    The same two-sided whitening as for keys and values: an error dq of head i costs
    importance_i scaling^2 E[<dq, k>^2], with the second moments of the unrotated keys and of the rotary key. The
    rotary key counts by the mean over all turns, in which the two halves of a pair are alike.
    """
    weight_H = moments.importance_H * mla.scaling**2
    latent_rr = mla.kv_down_rD @ moments.received_DD @ mla.kv_down_rD.T
    nope_Hnn = torch.einsum("H,Hnr,rs,Hms->Hnm", weight_H, mla.k_up_Hnr, latent_rr, mla.k_up_Hnr)
    size_e = torch.einsum("eD,DE,eE->e", mla.k_rope_eD, moments.converted_DD, mla.k_rope_eD)
    size_e = size_e.unflatten(0, (2, -1)).mean(0).repeat(2)
    low = joint_low_rank(
        Block(mla.q_nope_HnD.flatten(0, 1), torch.block_diag(*nope_Hnn), moments.converted_DD),
        Block(mla.q_rope_HeD.flatten(0, 1), torch.outer(weight_H, size_e).flatten().diag(), moments.converted_DD),
        rank,
    )
    nope_q, rope_q = low.decoders
    heads = len(mla.q_nope_HnD)
    narrow = replace(
        mla,
        q_down_qD=low.encoder_rD,
        q_nope_HnD=nope_q.unflatten(0, (heads, -1)),
        q_rope_HeD=rope_q.unflatten(0, (heads, -1)),
    )
    return narrow, low.loss


def _key_metric(split: RotarySplit, moments: Moments, scaling: float) -> Tensor:
    """M_K [K, K] = scaling^2 sum_i importance_i T_i^T E[q_i q_i^T] T_i, T_i what head i reads of the keys."""
    weight_H = moments.importance_H * scaling**2
    return torch.einsum("H,HdK,Hde,HeL->KL", weight_H, split.leftover_HdK, moments.query_Hdd, split.leftover_HdK)


def _value_metric(o_DHd: Tensor, groups: int, head_dim: int) -> Tensor:
    """M_V [K, K], block diagonal: sum over the heads of a group of Wo_i^T Wo_i."""
    o_GRDd = o_DHd.unflatten(1, (groups, -1, head_dim)).permute(1, 2, 0, 3)
    return torch.block_diag(*torch.einsum("GRDd,GRDe->Gde", o_GRDd, o_GRDd))
