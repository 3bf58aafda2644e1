"""Losses against the formula in float64, and their gradients against autograd."""

import pytest
import torch

from tests.maths.weights import lively, relative
from transmla.maths import losses
from transmla.maths.losses import kl_divergence, stream_error


def naive_kl(found_TD: torch.Tensor, target_TD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    target, found = ((x_TD @ head_VD.T).log_softmax(-1) for x_TD in (target_TD, found_TD))
    return (target.exp() * (target - found)).sum(-1).mean()


@pytest.mark.parametrize("chunk", [4, 128])
def test_kl_and_its_gradient_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    found_TD, target_TD, head_VD = lively(11, 6, seed=1).requires_grad_(), lively(11, 6, seed=2), lively(30, 6, seed=3)
    expected = naive_kl(found_TD, target_TD, head_VD)
    (expected_grad,) = torch.autograd.grad(3 * expected, found_TD)
    loss = kl_divergence(found_TD, target_TD, head_VD)
    (grad,) = torch.autograd.grad(3 * loss, found_TD)
    assert relative(loss.detach(), expected.detach()) < 1e-12 and relative(grad, expected_grad) < 1e-12


def test_kl_is_zero_for_equal_streams_only() -> None:
    x_TD, head_VD = lively(5, 6, seed=1), lively(30, 6, seed=3)
    assert abs(float(kl_divergence(x_TD, x_TD, head_VD))) < 1e-12
    assert float(kl_divergence(x_TD, lively(5, 6, seed=2), head_VD)) > 0.1


def test_kl_in_bfloat16_products_is_near() -> None:
    found_TD, target_TD, head_VD = lively(64, 32, seed=1), lively(64, 32, seed=2), 0.2 * lively(50, 32, seed=3)
    low = kl_divergence(found_TD.float(), target_TD.float(), head_VD.bfloat16())
    assert relative(low, naive_kl(found_TD, target_TD, head_VD)) < 0.02


def test_stream_error_counts_every_token_by_its_own_energy() -> None:
    target_TD = lively(3, 8, seed=1)
    target_TD[1] *= 1000  # a massive activation
    error_TD = lively(3, 8, seed=2)
    expected = sum(
        float(error.square().sum() / target.square().sum()) for error, target in zip(error_TD, target_TD, strict=True)
    )
    assert float(stream_error(target_TD + error_TD, target_TD)) == pytest.approx(expected / 3)
    assert float(stream_error(3 * (target_TD + error_TD), 3 * target_TD)) == pytest.approx(expected / 3)
