"""Ridge regressions from moments: both ends of the ridge, and which one is chosen."""

from functools import partial

import torch

from tests.maths.weights import inputs, lively, relative
from transmla.maths.refit import chosen_ridge, refit, stream_map

FEATURES_TF = inputs(60, 10)
EXACT_KF = lively(7, 10, seed=1)
OLD_KF = EXACT_KF + 0.5 * lively(7, 10, seed=2)
GRAM_FF = FEATURES_TF.T @ FEATURES_TF
WANTED_FK = FEATURES_TF.T @ (FEATURES_TF @ EXACT_KF.T)


def test_without_a_ridge_the_weights_are_found() -> None:
    assert relative(refit(OLD_KF, GRAM_FF, WANTED_FK, 0.0), EXACT_KF) < 1e-10


def test_a_large_ridge_keeps_the_weights() -> None:
    assert relative(refit(OLD_KF, GRAM_FF, WANTED_FK, 1e9), OLD_KF) < 1e-6


def test_between_them_the_weights_move_towards_the_exact_ones() -> None:
    errors = [relative(refit(OLD_KF, GRAM_FF, WANTED_FK, ridge), EXACT_KF) for ridge in (0.01, 0.1, 1.0)]
    assert 0 < errors[0] < errors[1] < errors[2] < relative(OLD_KF, EXACT_KF)


def test_stream_map() -> None:
    """Between the identity and E[x x_hat^T] E[x_hat x_hat^T]^-1."""
    converted_DD, cross_DD = GRAM_FF / 60, GRAM_FF / 60 + 0.1 * lively(10, 10, seed=3)
    exact_DD = cross_DD @ torch.linalg.inv(converted_DD)
    assert relative(stream_map(converted_DD, cross_DD, 1e-14), exact_DD) < 1e-9
    assert relative(stream_map(converted_DD, cross_DD, 1e9), torch.eye(10)) < 1e-6
    assert relative(exact_DD, torch.eye(10)) > 0.05
    assert relative(stream_map(converted_DD, converted_DD, 0.1), torch.eye(10)) < 1e-12


def test_few_noisy_tokens_choose_a_larger_ridge() -> None:
    """It is chosen on other tokens, and better than the smallest on a third set."""
    ridges = (1e-3, 1e-2, 1e-1, 1.0)

    def sums(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        features_TF = lively(tokens, 10, seed=seed)
        wanted_TK = features_TF @ EXACT_KF.T + 2 * lively(tokens, 7, seed=seed + 1)
        return features_TF.T @ features_TF, features_TF.T @ wanted_TK, float(wanted_TK.square().sum())

    chosen = {}
    for tokens in (12, 20000):
        fit = partial(refit, OLD_KF, *sums(tokens, 20)[:2])
        chosen[tokens] = chosen_ridge(ridges, fit, *sums(tokens, 40))
        found, smallest = (relative(fit(ridge), EXACT_KF) for ridge in (chosen[tokens], ridges[0]))
        assert found <= smallest
    assert chosen[20000] == 1e-3 < chosen[12]
