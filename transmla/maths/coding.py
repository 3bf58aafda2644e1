"""Transform coding of a latent: a basis in which errors of the coordinates add up, and levels to round them to.

A latent may be replaced by any invertible map of it, since its inverse goes into what reads it. What an error of the
latent costs is a quadratic form, the metric; in its square root's coordinates it is the squared length, so the best
basis for rounding is the one of principal components there (Karhunen-Loeve; Goyal, IEEE SPM 18/5).

Shape legend: r values of a latent, S samples, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

# share of the mean that each direction of the metric and of the covariance is given at least
RIDGE = 1e-4
LLOYD_STEPS = 300


def coding_basis(metric_rr: Tensor, covariance_rr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map M [r, r] of a latent c to its coordinates u = M c, its inverse, and the variances of u, falling.

    The metric of c becomes one unit for every coordinate of u, and these are uncorrelated: what rounding costs is the
    sum of the squared errors.
    """
    root_rr, inverse_root_rr = _roots(metric_rr)
    covariance_rr = _ridged(covariance_rr)
    variances_r, basis_rr = torch.linalg.eigh(root_rr @ covariance_rr @ root_rr)
    order = variances_r.argsort(descending=True)
    basis_rr = basis_rr[:, order]
    return basis_rr.T @ root_rr, inverse_root_rr @ basis_rr, variances_r[order].clamp_min(0)


def spread_basis(size: int, seed: int = 0) -> Tensor:
    """A random rotation [r, r]: after it all coordinates have about the same variance, and no outliers (QuaRot,
    2404.00456, section 3; TurboQuant, 2504.19874)."""
    generator = torch.Generator().manual_seed(seed)
    rotation_rr, triangular_rr = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return rotation_rr * triangular_rr.diagonal().sign()


def _ridged(matrix_rr: Tensor) -> Tensor:
    matrix_rr = (matrix_rr + matrix_rr.T) / 2
    return matrix_rr + torch.eye(len(matrix_rr), dtype=matrix_rr.dtype) * (RIDGE * matrix_rr.diagonal().mean() + 1e-30)


def _roots(matrix_rr: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root and its inverse."""
    values_r, vectors_rr = torch.linalg.eigh(_ridged(matrix_rr))
    root_r = values_r.clamp_min(float(values_r.max()) * 1e-12).sqrt()
    return (vectors_rr * root_r) @ vectors_rr.T, (vectors_rr / root_r) @ vectors_rr.T


def lloyd_max(values_S: Tensor, weights_S: Tensor, count: int) -> tuple[Tensor, float]:
    """Ascending levels [L] for values with the least weighted squared error, and that error over the weighted square.

    count: of levels (Lloyd, IEEE TIT 28/2; Max, IRE TIT 6/1)
    """
    values_S, order = values_S.double().sort()
    weights_S = weights_S.double()[order]
    zero = values_S.new_zeros(1)
    mass, moment = (torch.cat([zero, part.cumsum(0)]) for part in (weights_S, weights_S * values_S))
    # between equal shares of the mass and equal steps: the tails have levels from the start
    shares_L = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    places = torch.searchsorted(mass[1:] / mass[-1], shares_L)
    even_L = torch.linspace(float(values_S[0]), float(values_S[-1]), count, dtype=torch.float64)
    levels_L = (0.8 * values_S[places.clamp_max(len(values_S) - 1)] + 0.2 * even_L).sort().values
    for _ in range(LLOYD_STEPS):
        ends = torch.searchsorted(values_S, (levels_L[1:] + levels_L[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_tensor([len(values_S)])])
        mass_L, moment_L = mass[ends].diff(), moment[ends].diff()
        moved_L = torch.where(mass_L > 0, moment_L / mass_L.clamp_min(1e-300), levels_L)
        if float((moved_L - levels_L).abs().max()) < 1e-7:
            break
        levels_L = moved_L
    nearest_S = levels_L[torch.bucketize(values_S, (levels_L[1:] + levels_L[:-1]) / 2)]
    error = weights_S @ (values_S - nearest_S).square() / (weights_S @ values_S.square()).clamp_min(1e-300)
    return levels_L, float(error)
