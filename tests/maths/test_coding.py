"""A basis for rounding, and levels: against what theory says of normal values."""

import pytest
import torch

from transmla.maths.coding import Seen, code_bases, coding_basis, lloyd_max, spread_basis

# Max, IRE TIT 6/1, table I: error of 2, 4, 8, 16 levels for a normal distribution
MAX_ERRORS = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def uneven(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return x @ torch.diag(torch.logspace(0, -1.5, size, dtype=torch.float64)) @ x.T + 0.1 * torch.eye(size)


def test_errors_add_up_and_coordinates_are_uncorrelated() -> None:
    metric, covariance = uneven(12, 1), uneven(12, 2)
    forward, back, variances = coding_basis(metric, covariance)
    assert torch.allclose(forward @ back, torch.eye(12, dtype=torch.float64), atol=1e-8)
    assert torch.allclose(back.T @ metric @ back, torch.eye(12, dtype=torch.float64), atol=1e-2)
    assert torch.allclose(forward @ covariance @ forward.T, torch.diag(variances), atol=1e-2 * float(variances[0]))
    assert (variances.diff() <= 0).all()


def test_dealt_bits_win_what_theory_says() -> None:
    """Noise of a coordinate is as its variance over 4^bits: the gain over equal bits in the basis that the
    latent came in is that of the determinants (Goyal, IEEE SPM 18/5)."""
    metric, covariance = uneven(8, 3), uneven(8, 4)
    variances = coding_basis(metric, covariance)[2]
    worth = variances.log2() / 2
    bits = 4 + worth - worth.mean()
    loss = float((variances * 4.0**-bits).sum())
    equal = float((covariance.diagonal() * metric.diagonal()).sum()) * 4.0**-4
    assert loss < 0.5 * equal
    geometric = float((torch.logdet(metric) + torch.logdet(covariance)) / 8)
    assert loss == pytest.approx(8 * 2.718281828**geometric * 4.0**-4, rel=1e-2)


def test_a_rotation_spreads_what_is_uneven() -> None:
    rotation = spread_basis(64)
    assert torch.allclose(rotation @ rotation.T, torch.eye(64, dtype=torch.float64), atol=1e-10)
    assert torch.equal(rotation, spread_basis(64)) and not torch.equal(rotation, spread_basis(64, seed=1))
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 3] *= 50
    spread = (x @ rotation.T).square().mean(0)
    assert float(spread.max() / spread.mean()) < 12 < 40 < float(x.square().mean(0).max() / x.square().mean())


@pytest.mark.parametrize("bits", MAX_ERRORS)
def test_levels_of_a_normal_distribution(bits: int) -> None:
    normal = torch.special.ndtri((torch.arange(40000, dtype=torch.float64) + 0.5) / 40000)
    levels, error = lloyd_max(normal, torch.ones_like(normal), 2**bits)
    assert error == pytest.approx(MAX_ERRORS[bits], rel=5e-3)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-3) and (levels.diff() > 0).all()


def test_heavy_tails_and_weights_move_the_levels() -> None:
    values = torch.randn(20000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tails = values * values.abs()
    _, error = lloyd_max(tails, torch.ones_like(tails), 8)
    normal, _ = lloyd_max(values, torch.ones_like(values), 8)
    rounded = normal[(tails[:, None] - normal * tails.std()).abs().argmin(1)] * tails.std()
    assert error < 0.8 * float((tails - rounded).square().mean() / tails.square().mean())
    weights = torch.where(values > 0, 10.0, 0.1).double()
    weighted, error = lloyd_max(values, weights, 8)
    rounded = normal[(values[:, None] - normal).abs().argmin(1)]
    assert error < 0.8 * float(weights @ (values - rounded).square() / (weights @ values.square()))
    assert (weighted > 0).sum() > (normal > 0).sum()


def test_few_values_have_no_empty_levels_that_are_lost() -> None:
    levels, error = lloyd_max(torch.tensor([0.0, 1.0, 1.0, 5.0]), torch.ones(4), 8)
    assert len(levels) == 8 and levels.isfinite().all() and error < 1e-12


def test_padding_does_not_widen_the_spread() -> None:
    """Coordinates that are always zero are not worth any bits."""

    def spread(padding: int) -> float:
        metric, covariance = (torch.block_diag(uneven(8, seed), torch.zeros(padding, padding)) for seed in (3, 4))
        seen = Seen(covariance, metric, torch.zeros(8 + padding, dtype=torch.float64), 1)
        return code_bases([seen], 8 + padding, "coded", 0)[2][0]

    assert 2 < spread(0) == pytest.approx(spread(24), rel=1e-2)
