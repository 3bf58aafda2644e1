"""One latent for keys and values: low rank in the metric of the attention output, not of K and V.

Minimises sum over blocks b of || M_b^(1/2) (Y_b - U_b W) C_b^(1/2) ||^2 over the shared encoder W [r, D] and the
decoders U_b (two-sided whitening, method section 3). With one common C the minimum is a truncated SVD; with a C
per block, sweeps of two exact least-squares problems go down from there.

Loses: the returned loss, which for a common C is the dropped energy (tested).
Shape legend: see transmla/maths/__init__.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Rows to reproduce: target_kD x, errors weighted by metric_kk, inputs distributed with moment_DD."""

    target_kD: Tensor
    metric_kk: Tensor
    moment_DD: Tensor


@dataclass(frozen=True)
class LowRank:
    """encoder_rD and one decoder [k, r] per block; loss as a fraction of the blocks' weighted energy."""

    encoder_rD: Tensor
    decoders: tuple[Tensor, ...]
    loss: float


def symmetric_power(matrix: Tensor, power: float, floor: float = 1e-12) -> Tensor:
    """A symmetric positive matrix to a power, eigenvalues raised to at least `floor` * the largest."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(float(values.max().clamp_min(1e-300)) * floor)
    return (vectors * values**power) @ vectors.T


def joint_low_rank(keys: Block, values: Block, rank: int, sweeps: int = 0) -> LowRank:
    """The best rank-`rank` encoder for both blocks, in float64.

    sweeps: alternating refits when the two moments differ; each can only lower the loss.
    Latent coordinates have unit mean square under the mean of the two moments.
    """
    roots = [symmetric_power(block.metric_kk, 0.5, floor=0.0) @ block.target_kD for block in (keys, values)]
    moments = [_regular(block.moment_DD) for block in (keys, values)]
    common = (moments[0] + moments[1]) / 2
    _, _, right = torch.linalg.svd(torch.cat(roots) @ symmetric_power(common, 0.5), full_matrices=False)
    encoder = right[:rank] @ symmetric_power(common, -0.5)
    for _ in range(sweeps):
        encoder = _refit_encoder(encoder, roots, moments)
    encoder = encoder / (encoder @ common * encoder).sum(1, keepdim=True).clamp_min(1e-300).sqrt()
    decoders = tuple(
        decode(block.target_kD, moment, encoder) for block, moment in zip((keys, values), moments, strict=True)
    )
    return LowRank(encoder, decoders, _relative_loss(encoder, roots, moments))


def decode(target_kD: Tensor, moment_DD: Tensor, encoder_rD: Tensor) -> Tensor:
    """Best linear reconstruction [k, r] of target x from encoder x: Y C W^T (W C W^T)^-1."""
    projected_rD = encoder_rD @ moment_DD
    gram = projected_rD @ encoder_rD.T
    solution: Tensor = torch.linalg.solve(_regular(gram, 1e-10), projected_rD @ target_kD.T)
    return solution.T


def _refit_encoder(encoder_rD: Tensor, roots: list[Tensor], moments: list[Tensor]) -> Tensor:
    """Encoder that is best for the decoders of `encoder_rD`.

    Stationarity is A_1 W C_1 + A_2 W C_2 = B with A_b = U_b^T U_b; both pairs are diagonalised at once.
    """
    decoders = [decode(root, moment, encoder_rD) for root, moment in zip(roots, moments, strict=True)]
    right_side = sum(u.T @ y @ c for u, y, c in zip(decoders, roots, moments, strict=True))
    a, left = _diagonalise(*(_regular(u.T @ u, 1e-10) for u in decoders))
    c, right = _diagonalise(*moments)
    solution: Tensor = left @ ((left.T @ right_side @ right) / (a[:, None] * c + 1)) @ right.T
    return solution


def _diagonalise(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(w, P) with P^T second P = 1 and P^T first P = diag(w)."""
    inverse = torch.linalg.inv(torch.linalg.cholesky(second))
    values, vectors = torch.linalg.eigh(inverse @ first @ inverse.T)
    return values, inverse.T @ vectors


def _relative_loss(encoder_rD: Tensor, roots: list[Tensor], moments: list[Tensor]) -> float:
    lost = energy = 0.0
    for root, moment in zip(roots, moments, strict=True):
        error = root - decode(root, moment, encoder_rD) @ encoder_rD
        lost += float((error @ moment * error).sum())
        energy += float((root @ moment * root).sum())
    return lost / energy if energy else 0.0


def _regular(matrix: Tensor, relative: float = 1e-9) -> Tensor:
    """The matrix plus a multiple of the identity small against its mean diagonal."""
    ridge = relative * float(matrix.diagonal().mean()) + 1e-300
    return matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
