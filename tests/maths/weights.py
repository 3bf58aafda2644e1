"""Random attention blocks and the moments of random inputs, all float64. Legend: transmla/maths/__init__.py."""

from typing import Any

import torch
from torch import Tensor

from transmla.maths.attention import GqaWeights, MlaWeights, inverse_frequencies
from transmla.maths.closed_form import ClosedForm, FittedLayer, Moments, aim, fit_aimed

THETA = 1000.0


def relative(actual: Tensor, expected: Tensor) -> float:
    """Size of the difference over size of what is expected, on the CPU in float64."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm())


def lively(*shape: int, seed: int) -> Tensor:
    """Normal values of deviation 1, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gqa_weights(
    *, heads: int = 4, groups: int = 2, head_dim: int = 8, hidden: int = 24, theta: float = THETA, seed: int = 0
) -> GqaWeights:
    """Queries and keys that give scores of deviation 1 for inputs of deviation 1."""
    return GqaWeights(
        q_HdD=lively(heads, head_dim, hidden, seed=seed) / hidden**0.5,
        k_GdD=lively(groups, head_dim, hidden, seed=seed + 1) / hidden**0.5,
        v_GdD=lively(groups, head_dim, hidden, seed=seed + 2) / hidden**0.5,
        o_DHd=lively(hidden, heads * head_dim, seed=seed + 3) / hidden**0.5,
        inv_freq_P=inverse_frequencies(theta, head_dim),
        scaling=head_dim**-0.5,
    )


def mla_weights(
    *,
    heads: int = 4,
    hidden: int = 24,
    rank: int = 10,
    rope: int = 6,
    nope: int = 8,
    value: int = 5,
    q_rank: int | None = None,
    seed: int = 0,
) -> MlaWeights:
    """All sizes different, latents of unit mean square for inputs of deviation 1."""
    asking = q_rank or hidden
    return MlaWeights(
        q_nope_HnD=lively(heads, nope, asking, seed=seed) / asking**0.5,
        q_rope_HeD=lively(heads, rope, asking, seed=seed + 1) / asking**0.5,
        q_down_qD=lively(q_rank, hidden, seed=seed + 7) / hidden**0.5 if q_rank else None,
        kv_down_rD=lively(rank, hidden, seed=seed + 2) / hidden**0.5,
        k_rope_eD=lively(rope, hidden, seed=seed + 3) / hidden**0.5,
        k_up_Hnr=lively(heads, nope, rank, seed=seed + 4) / rank**0.5,
        v_up_Hvr=lively(heads, value, rank, seed=seed + 5) / rank**0.5,
        o_DHv=lively(hidden, heads * value, seed=seed + 6) / hidden**0.5,
        inv_freq_M=inverse_frequencies(THETA, rope),
        scaling=0.4,
    )


def on(device: torch.device, seen: Moments) -> Moments:
    """The same moments there."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(seen).items()}
    return Moments(**moved)


def inputs(tokens: int = 12, hidden: int = 24, seed: int = 9) -> Tensor:
    """Correlated, as the inputs of real layers are: [T, D]."""
    return lively(tokens, hidden, seed=seed) @ (torch.eye(hidden) + 0.3 * lively(hidden, hidden, seed=seed + 1))


def moments(gqa: GqaWeights, **changes: Any) -> Moments:
    """Moments of many random inputs; importance and distances are random and all different."""
    heads, _, hidden = gqa.q_HdD.shape
    x_TD = inputs(500, hidden)
    weights_T = lively(500, seed=3).square()
    moment_DD = x_TD.T @ x_TD / len(x_TD)
    made = {
        "converted_DD": moment_DD,
        "cross_DD": moment_DD,
        "received_DD": (x_TD * weights_T[:, None]).T @ x_TD / len(x_TD),
        "attended_DD": 0.3 * moment_DD + 0.1 * torch.eye(hidden, dtype=torch.float64),
        "query_Hdd": gqa.q_HdD @ moment_DD @ gqa.q_HdD.transpose(1, 2),
        "importance_H": 0.1 + lively(heads, seed=4).square(),
        "distance_HS": lively(heads, 30, seed=5).softmax(-1),
    }
    return Moments(**made | changes)


def fit_layer(
    gqa: GqaWeights,
    seen: Moments,
    rank: int,
    rope: int,
    theta: float | None,
    method: ClosedForm,
    q_lora_rank: int | None = None,
    **settings: bool,
) -> FittedLayer:
    """A whole layer as a conversion fits it."""
    aimed = aim(gqa, seen, method)
    return fit_aimed(aimed, seen.of_converted(), rank, rope, theta, method, q_lora_rank, **settings)
