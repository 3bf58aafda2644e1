"""A basis for rounding, and levels: against what theory says of normal values."""

import pytest
import torch

from tests.maths.weights import lively
from transmla.maths.coding import SINK, Seen, code_bases, code_levels, coding_basis, lloyd_max, spread_basis

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


@pytest.mark.parametrize("basis", ["coded", "spread"])
def test_a_code_is_that_of_the_tokens_behind_the_first_ones(basis: str) -> None:
    """Means, deviations and costs of the coordinates as they are cached then, and what the levels leave of them."""
    rank, width, mixing_kk = 6, 8, torch.eye(8) + 0.4 * lively(8, 8, seed=1)
    keys, gradients = ([lively(40, 8, seed=seed + text) @ mixing_kk + 0.5 for text in (0, 1)] for seed in (2, 4))
    seen = Seen.of(width, torch.device("cpu"))
    for key_Tk, gradient_Tk in zip(keys, gradients, strict=True):
        key_Tk[:SINK] *= 30
        seen.add(key_Tk, gradient_Tk)
    seen.finish()
    key_Tk, gradient_Tk = (torch.cat([text_Tk[SINK:] for text_Tk in texts]) for texts in (keys, gradients))
    assert torch.allclose(seen.square_kk, key_Tk.T @ key_Tk / 72) and torch.allclose(seen.sum_k, key_Tk.mean(0))
    assert torch.allclose(seen.gradient_kk, gradient_Tk.T @ gradient_Tk / 72)
    maps, (code,), _ = code_bases([seen], rank, basis, 3)
    ((forward_rr, back_rr),) = maps
    other_rr = code_bases([seen], rank, basis, 4)[0][0][0]
    assert torch.equal(forward_rr, other_rr) == (basis == "coded"), "the rotation is that of the seed"
    coded_Tk = torch.cat([key_Tk[:, :rank] @ forward_rr.T, key_Tk[:, rank:]], 1)
    cost_Tk = torch.cat([gradient_Tk[:, :rank] @ back_rr, gradient_Tk[:, rank:]], 1)
    variance_k = coded_Tk.var(0, correction=0)
    assert float(coded_Tk[:, :rank].square().mean()) == pytest.approx(1)
    assert torch.allclose(code["mean"], coded_Tk.mean(0)) and torch.allclose(code["deviation"].square(), variance_k)
    assert torch.allclose(code["importance"], variance_k * cost_Tk.square().mean(0))
    levels, errors = code_levels([seen], maps, [code])
    z_Tk = (coded_Tk - code["mean"]) / code["deviation"]
    gain_T1 = z_Tk.square().mean(1, keepdim=True).sqrt()
    for bits, (levels_L, error) in enumerate(zip(levels, errors, strict=True)):
        near_Tk = levels_L.double()[((z_Tk / gain_T1)[..., None] - levels_L).abs().argmin(-1)] * gain_T1
        assert len(levels_L) == 2**bits
        assert error == pytest.approx(float((z_Tk - near_Tk).square().sum() / z_Tk.square().sum()), rel=1e-6)
