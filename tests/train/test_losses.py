"""Losses against plain float64 loops, and their gradients against those of the unchunked loss."""

import math

import pytest
import torch
from torch import Tensor

from transmla.train import losses as distillation
from transmla.train.losses import (
    Objective,
    distillation_loss,
    divergence,
    divergence_top_k,
    hidden_loss,
    top_k,
)

N, D, V = 23, 6, 17
LABELS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))
LABELS[[0, 7, 22]] = -100


def lively(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(student: list[float], teacher: list[float], temperature: float) -> float:
    def softmax(logits: list[float]) -> list[float]:
        powers = [math.exp(value / temperature) for value in logits]
        return [power / sum(powers) for power in powers]

    pairs = zip(softmax(teacher), softmax(student), strict=True)
    return temperature**2 * sum(p * math.log(p / q) for p, q in pairs)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_equals_plain_loops(temperature: float) -> None:
    student, teacher = lively(N, V, seed=1), lively(N, V, seed=2)
    expected = [naive(s, t, temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert divergence(student, teacher, temperature).tolist() == pytest.approx(expected, rel=1e-4)
    kept = top_k(teacher, V, temperature)
    assert divergence_top_k(student, kept, temperature).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_fewer_kept_logits_are_a_lower_bound() -> None:
    student, teacher = lively(N, V, seed=1), lively(N, V, seed=2)
    whole = divergence(student, teacher)
    found = [divergence_top_k(student, top_k(teacher, k)) for k in (1, 4, 12)]
    for less, more in zip(found, [*found[1:], whole], strict=True):
        assert (less <= more + 1e-5).all() and less.mean() < more.mean()
    itself = divergence_top_k(teacher, top_k(teacher, 3))
    assert itself.abs().max() < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("kept", [None, 5])
def test_chunks_change_nothing(share: float, kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, wanted = lively(V, D, seed=3), lively(N, V, seed=4)
    hidden = lively(N, D, seed=6).requires_grad_()
    objective = Objective(temperature=1.5, cross_entropy=share)

    def teacher(part: slice) -> Tensor | distillation.TopK:
        return wanted[part] if kept is None else top_k(wanted[part], kept, 1.5)

    def run() -> tuple[float, float, Tensor]:
        loss, kl = distillation_loss(hidden, weight, teacher, LABELS, objective)
        (gradient,) = torch.autograd.grad(3 * loss, hidden)
        return float(loss.detach()), float(kl), gradient / 3

    whole = run()
    monkeypatch.setattr(distillation, "tokens_at_once", lambda _: 4)
    parts = run()
    assert parts[:2] == pytest.approx(whole[:2], rel=1e-5)
    assert torch.allclose(parts[2], whole[2], atol=1e-6)
    # tokens that do not count have no gradient
    assert not whole[2][[0, 7, 22]].any() and whole[2][1].any()
    logits, counted = hidden @ weight.T, LABELS != -100
    found = divergence_top_k(logits, top_k(wanted, kept, 1.5), 1.5) if kept else divergence(logits, wanted, 1.5)
    expected = (1 - share) * found[counted].mean()
    expected = expected + share * torch.nn.functional.cross_entropy(logits[counted], LABELS[counted])
    assert whole[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(whole[2], torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-5)


def test_nothing_to_learn_is_no_loss() -> None:
    hidden = lively(N, D, seed=6).requires_grad_()
    nothing = torch.full((N,), -100)
    loss, kl = distillation_loss(hidden, lively(V, D, seed=3), lambda _: lively(1, V, seed=4), nothing, Objective())
    assert float(loss.detach()) == float(kl) == 0


def test_hidden_loss_is_relative_to_the_teacher() -> None:
    teacher = lively(N, D, seed=7)
    assert float(hidden_loss(1.1 * teacher, teacher)) == pytest.approx(0.01, rel=1e-4)
    assert float(hidden_loss(1.1 * 50 * teacher, 50 * teacher)) == pytest.approx(0.01, rel=1e-4)
