"""Rounded caches: the grid, its error, and that the model really reads it."""

import pytest
import torch

from tests.families import lively_config, lively_model
from transmla.evaluation.perplexity import perplexity
from transmla.evaluation.quantised_cache import (
    GROUP,
    bits_per_value,
    keys_by_channel,
    latents_by_token,
    rounded,
    rounding_cache,
    values_by_token,
)

IDS = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dim", [-1, -2])
def test_values_lie_on_a_grid_of_their_group(dim: int) -> None:
    x = torch.randn(2, 3, 2 * GROUP, 2 * GROUP, generator=torch.Generator().manual_seed(1))
    x[:, :, :, 5] *= 100
    found = rounded(x, 2, dim).movedim(dim, -1).unflatten(-1, (2, GROUP))
    assert max(len(group.unique()) for group in found.flatten(0, -2)) <= 4
    error = (rounded(x, 4, dim) - x).abs().movedim(dim, -1).unflatten(-1, (2, GROUP)).amax(-1)
    spread = x.movedim(dim, -1).unflatten(-1, (2, GROUP))
    step = (spread.amax(-1) - spread.amin(-1)) / 15
    assert (error <= 0.51 * step + 1e-3 * spread.abs().amax(-1)).all()


def test_more_bits_are_nearer() -> None:
    x = torch.randn(1, 1, 70, 48, generator=torch.Generator().manual_seed(2))
    errors = [float((rounded(x, bits, -1) - x).square().mean()) for bits in (2, 4, 8)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert bits_per_value(4) == 5.0


def test_constant_groups_survive() -> None:
    x = torch.full((1, 1, 40, 40), 0.25)
    assert torch.allclose(rounded(x, 2, -1), x, atol=1e-6)


def test_the_model_reads_the_rounded_values() -> None:
    model = lively_model(lively_config())

    def nats(bits: int | None) -> float:
        if bits is None:
            return perplexity(model, IDS).nats
        return perplexity(model, IDS, cache=lambda: rounding_cache(keys_by_channel(bits), values_by_token(bits))).nats

    exact = nats(None)
    assert nats(16) == pytest.approx(exact, abs=1e-3)
    assert abs(nats(2) - exact) > 10 * abs(nats(8) - exact)


def test_latents_and_rotary_keys_have_grids_of_their_own() -> None:
    x = torch.randn(1, 1, 64, 20, generator=torch.Generator().manual_seed(3))
    x[..., 12:] *= 1000
    latent, rotary = latents_by_token(4, 12)(x).split([12, 8], dim=-1)
    assert torch.equal(latent, rounded(x[..., :12], 4, -1)) and torch.equal(rotary, rounded(x[..., 12:], 4, -2))
    together = values_by_token(4)(x)
    assert (latent - x[..., :12]).norm() < 0.05 * (together[..., :12] - x[..., :12]).norm()
