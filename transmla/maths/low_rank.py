"""One latent for keys and values: low rank in the metric of the attention output, not of K and V.

Minimises sum over blocks b of || M_b^(1/2) (Y_b - U_b W) C_b^(1/2) ||^2 over the shared encoder W [r, D] and the
decoders U_b (two-sided whitening, method section 3). With one common C the minimum is a truncated SVD; with a C
per block the encoder is that of their mean, and each decoder is the best for its own.

Loses: the returned loss, which for a common C is the dropped energy (tested).
Shape legend: see transmla/maths/__init__.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.maths.moment import raised


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


def joint_low_rank(keys: Block, values: Block, rank: int) -> LowRank:
    """The best rank-`rank` encoder for both blocks, in float64.

    Latent coordinates have unit mean square under the mean of the two moments.
    """
    roots = [symmetric_power(block.metric_kk, 0.5, floor=0.0) @ block.target_kD for block in (keys, values)]
    common = torch.lerp(keys.moment_DD, values.moment_DD, 0.5)
    common.diagonal().add_((_ridge(keys.moment_DD) + _ridge(values.moment_DD)) / 2)
    encoder = top_encoder(torch.cat(roots), common, rank)
    energy_r1 = (encoder @ common * encoder).sum(1, keepdim=True)
    # rows beyond what the tokens span have no energy but that of rounding, of either sign
    least_r1 = 1e-9 * common.diagonal().mean() * encoder.square().sum(1, keepdim=True)
    encoder = encoder / torch.maximum(energy_r1, least_r1.clamp_min(1e-300)).sqrt()
    del common
    decoders, lost, energy = [], 0.0, 0.0
    for block, root in zip((keys, values), roots, strict=True):
        moment = _regular(block.moment_DD)  # as large as everything else here: one at a time
        decoders.append(decode(block.target_kD, moment, encoder))
        error = root - decode(root, moment, encoder) @ encoder
        lost += float((error @ moment * error).sum())
        energy += float((root @ moment * root).sum())
        del moment
    return LowRank(encoder, tuple(decoders), lost / energy if energy else 0.0)


def top_encoder(root_kD: Tensor, moment_DD: Tensor, rank: int) -> Tensor:
    """Rows [r, D] that span what the `rank` largest singular directions of R C^(1/2) read of x; of any length.

    With R C^(1/2) = U S V^T these are V^T C^(-1/2) = S^-1 U^T R, and U are the eigenvectors of R C R^T, which is far
    smaller than C where few keys and values are made of a wide stream.
    """
    if rank <= len(root_kD) < len(moment_DD):
        values, vectors = torch.linalg.eigh(root_kD @ moment_DD @ root_kD.T)
        # below that, rows would be nothing but rounding
        if bool(values[-rank] > 1e-12 * values[-1]):
            return vectors[:, -rank:].flip(1).T @ root_kD
    # a moment of few tokens is singular, and rounding may leave it no longer positive: no Cholesky factor
    seen_kD = root_kD @ symmetric_power(moment_DD, 0.5)
    _, vectors = torch.linalg.eigh(seen_kD.T @ seen_kD)
    return vectors[:, -rank:].flip(1).T @ symmetric_power(moment_DD, -0.5)


def decode(target_kD: Tensor, moment_DD: Tensor, encoder_rD: Tensor) -> Tensor:
    """Best linear reconstruction [k, r] of target x from encoder x: Y C W^T (W C W^T)^-1."""
    projected_rD = encoder_rD @ moment_DD
    gram = projected_rD @ encoder_rD.T
    solution: Tensor = torch.linalg.solve(_regular(gram, 1e-10), projected_rD @ target_kD.T)
    return solution.T


def _regular(matrix: Tensor, relative: float = 1e-9) -> Tensor:
    """The matrix plus a multiple of the identity small against its mean diagonal."""
    return raised(matrix, _ridge(matrix, relative))


def _ridge(matrix: Tensor, relative: float = 1e-9) -> float:
    return relative * float(matrix.diagonal().mean()) + 1e-300
