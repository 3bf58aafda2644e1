"""Transform coding of a latent: a basis in which errors of the coordinates add up, and levels to round them to.

A latent may be replaced by any invertible map of it, since its inverse goes into what reads it. What an error of the
latent costs is a quadratic form, the metric; in its square root's coordinates it is the squared length, so the best
basis for rounding is the one of principal components there (Karhunen-Loeve; Goyal, IEEE SPM 18/5).

Shape legend: r values of a latent, k = r + e those cached with its rotary key, T tokens, S samples, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# share of the mean that each direction of the metric and of the covariance is given at least
RIDGE = 1e-4
LLOYD_STEPS = 300
# first tokens, which stay exact and are unlike all others
SINK = 4
# tokens of which levels are fitted, and values of these
LEVEL_TOKENS, LEVEL_VALUES = 2048, 1_000_000
MAX_BITS = 8


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


@dataclass
class Seen:
    """Means over the tokens of one layer [k, k] and [k] but for the first of a text, and what was cached [T, k].

    Of keys and of gradients of the loss with respect to them, whose second moment is what a small error costs.
    """

    square_kk: Tensor
    gradient_kk: Tensor
    sum_k: Tensor
    count: int = 0
    samples: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, width: int, device: torch.device) -> Seen:
        """Nothing yet."""
        square_kk, gradient_kk = torch.zeros(2, width, width, dtype=torch.float64, device=device)
        return cls(square_kk, gradient_kk, torch.zeros(width, dtype=torch.float64, device=device))

    def add(self, key_Tk: Tensor, gradient_Tk: Tensor) -> None:
        """One text, from its start."""
        if self.count < LEVEL_TOKENS:
            self.samples.append(key_Tk.cpu())
        key_Tk, gradient_Tk = key_Tk[SINK:].double(), gradient_Tk[SINK:].double()
        self.square_kk += key_Tk.T @ key_Tk
        self.gradient_kk += gradient_Tk.T @ gradient_Tk
        self.sum_k += key_Tk.sum(0)
        self.count += len(key_Tk)

    def finish(self) -> None:
        """Sums become means."""
        for name in ("square_kk", "gradient_kk", "sum_k"):
            setattr(self, name, getattr(self, name).cpu() / self.count)


def code_bases(
    seen: list[Seen], rank: int, basis: str, seed: int
) -> tuple[list[tuple[Tensor, Tensor]], list[dict[str, Tensor]], tuple[float, ...]]:
    """By layer: the map of the latent and its inverse; mean, deviation, importance of what is cached then; spread."""
    maps, codes, spread = [], [], []
    for layer in seen:
        mean_k = layer.sum_k
        covariance_kk = layer.square_kk - torch.outer(mean_k, mean_k)
        map_rr, inverse_rr, variances_r = coding_basis(layer.gradient_kk[:rank, :rank], covariance_kk[:rank, :rank])
        # padded coordinates and the like, which have no variance, take no bits
        own_r = torch.linalg.eigvalsh(covariance_kk[:rank, :rank])
        worth = variances_r[: int((own_r > 1e-12 * own_r.max()).sum()) or None].clamp_min(1e-30)
        spread.append(float(worth.mean() / worth.log().mean().exp()))
        if basis == "spread":
            rotation_rr = spread_basis(rank, seed)
            map_rr, inverse_rr = rotation_rr @ map_rr, inverse_rr @ rotation_rr.T
        # a latent of unit mean square, as conversion makes it
        factor = float((rank / (map_rr @ layer.square_kk[:rank, :rank] @ map_rr.T).trace()).sqrt())
        map_rr, inverse_rr = map_rr * factor, inverse_rr / factor
        full_kk = torch.block_diag(map_rr, torch.eye(len(mean_k) - rank, dtype=torch.float64))
        variance_k = (full_kk @ covariance_kk @ full_kk.T).diagonal().clamp_min(1e-20)
        back_kk = torch.block_diag(inverse_rr, torch.eye(len(mean_k) - rank, dtype=torch.float64))
        cost_k = (back_kk.T @ layer.gradient_kk @ back_kk).diagonal()
        maps.append((map_rr, inverse_rr))
        codes.append(
            {"mean": full_kk @ mean_k, "deviation": variance_k.sqrt(), "importance": (variance_k * cost_k).clamp_min(0)}
        )
    return maps, codes, tuple(spread)


def code_levels(
    seen: list[Seen], maps: list[tuple[Tensor, Tensor]], codes: list[dict[str, Tensor]]
) -> tuple[list[Tensor], list[float]]:
    """Levels for 0 to 8 bits, of all coordinates together, and the distortion that each leaves."""
    values, weights = [], []
    for layer, (map_rr, _), code in zip(seen, maps, codes, strict=True):
        rank = len(map_rr)
        x_Sk = torch.cat([x_Tk[SINK:] for x_Tk in layer.samples])[:LEVEL_TOKENS].double()
        u_Sk = torch.cat([x_Sk[:, :rank] @ map_rr.T, x_Sk[:, rank:]], dim=1)
        z_Sk = (u_Sk - code["mean"]) / code["deviation"]
        gain_S1 = z_Sk.square().mean(1, keepdim=True).sqrt().clamp_min(1e-4)
        values.append((z_Sk / gain_S1).flatten())
        weights.append(gain_S1.square().expand_as(z_Sk).flatten())
    values_S, weights_S = torch.cat(values), torch.cat(weights)
    step = max(1, len(values_S) // LEVEL_VALUES)
    found = [lloyd_max(values_S[::step], weights_S[::step], 2**bits) for bits in range(MAX_BITS + 1)]
    found[0] = torch.zeros(1), 1.0
    return [levels for levels, _ in found], [error for _, error in found]
