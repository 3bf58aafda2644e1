"""Losses against plain float64 loops, and their gradients against those of the unchunked loss."""

import math

import pytest
import torch
from torch import Tensor

from tests.maths.weights import lively as wide
from tests.maths.weights import relative
from transmla.train import losses
from transmla.train.losses import (
    Objective,
    distillation_loss,
    divergence,
    divergence_top_k,
    few_rows,
    parts,
    predictions_of,
    stream_error,
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
def test_divergence_equals_plain_loops(temperature: float, device: torch.device) -> None:
    student, teacher = lively(N, V, seed=1), lively(N, V, seed=2)
    expected = [naive(s, t, temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    student, teacher = student.to(device), teacher.to(device)
    assert divergence(student, teacher, temperature).tolist() == pytest.approx(expected, rel=1e-4)
    kept = top_k(teacher, V, temperature)
    assert divergence_top_k(student, kept, temperature).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_fewer_kept_logits_are_a_lower_bound() -> None:
    student, teacher = lively(N, V, seed=1), lively(N, V, seed=2)
    whole = divergence(student, teacher)
    found = [divergence_top_k(student, top_k(teacher, k)) for k in (1, 4, 12)]
    for less, more in zip(found, [*found[1:], whole], strict=True):
        assert (less <= more + 1e-5).all() and less.mean() < more.mean()
    every = divergence_top_k(student, top_k(teacher, V + 1))
    assert torch.equal(every, divergence_top_k(student, top_k(teacher, V))), "no more than there are"
    itself = divergence_top_k(teacher, top_k(teacher, 3))
    assert itself.abs().max() < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("kept", [None, 5])
def test_chunks_change_nothing(share: float, kept: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, wanted = lively(V, D, seed=3), lively(N, V, seed=4)
    hidden = lively(N, D, seed=6).requires_grad_()
    objective = Objective(temperature=1.5, cross_entropy=share)

    def teacher(part: slice) -> Tensor | losses.TopK:
        return wanted[part] if kept is None else top_k(wanted[part], kept, 1.5)

    counted_N = (LABELS != -100).float()
    weights_N = counted_N / counted_N.sum()

    def run() -> tuple[float, Tensor, Tensor]:
        loss, found_N = distillation_loss(hidden, weight, teacher, weights_N, LABELS, objective)
        (gradient,) = torch.autograd.grad(3 * loss, hidden)
        return float(loss.detach()), found_N, gradient / 3

    whole = run()
    monkeypatch.setattr(losses, "ROWS_ON_CPU", 4)
    assert [part.stop - part.start for part in parts(N, V, torch.device("cpu"))] == [4, 4, 4, 4, 4, 3]
    monkeypatch.setattr(losses, "LOGITS_OF_A_CORE", V)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert [few.stop - few.start for few in few_rows(4, V, torch.device("cpu"))] == [3, 1]
    chunked = run()
    assert chunked[0] == pytest.approx(whole[0], rel=1e-5)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(chunked[1:], whole[1:], strict=True))
    # tokens that do not count have no gradient
    assert not whole[2][[0, 7, 22]].any() and whole[2][1].any()
    logits, counted = hidden @ weight.T, LABELS != -100
    found = divergence_top_k(logits, top_k(wanted, kept, 1.5), 1.5) if kept else divergence(logits, wanted, 1.5)
    assert torch.allclose(whole[1], found.detach(), atol=1e-5)
    expected = (1 - share) * found[counted].mean()
    expected = expected + share * torch.nn.functional.cross_entropy(logits[counted], LABELS[counted])
    assert whole[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(whole[2], torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-5)


def test_tokens_of_no_weight_are_no_loss_even_if_theirs_is_not_finite() -> None:
    hidden = lively(N, D, seed=6).requires_grad_()
    wanted = lively(N, V, seed=4)
    wanted[3] = float("nan")
    weights_N = torch.ones(N)
    weights_N[3] = 0
    loss, _ = distillation_loss(hidden, lively(V, D, seed=3), lambda part: wanted[part], weights_N)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite() and gradient.isfinite().all() and not gradient[3].any()
    nothing, _ = distillation_loss(hidden, lively(V, D, seed=3), lambda part: wanted[part], torch.zeros(N))
    assert float(nothing.detach()) == 0


def test_stream_error_is_relative_to_the_target() -> None:
    teacher = lively(N, D, seed=7)
    assert float(stream_error(1.1 * teacher, teacher)) == pytest.approx(0.01, rel=1e-4)
    assert float(stream_error(1.1 * 50 * teacher, 50 * teacher)) == pytest.approx(0.01, rel=1e-4)
    halved = (1.1 * teacher).bfloat16()
    assert stream_error(halved, teacher.bfloat16()).dtype == torch.float32


def naive_kl(found_TD: Tensor, target_TD: Tensor, head_VD: Tensor) -> Tensor:
    target, found = ((x_TD @ head_VD.T).log_softmax(-1) for x_TD in (target_TD, found_TD))
    return (target.exp() * (target - found)).sum(-1).mean()


def kl(found_TD: Tensor, target_TD: Tensor, head_VD: Tensor) -> Tensor:
    weights_T = torch.full((len(found_TD),), 1 / len(found_TD), dtype=torch.float64, device=found_TD.device)
    return distillation_loss(found_TD, head_VD, predictions_of(target_TD, head_VD), weights_T)[0]


@pytest.mark.parametrize("rows", [4, 128])
def test_kl_and_its_gradient_are_those_of_the_formula_in_float64(
    monkeypatch: pytest.MonkeyPatch, rows: int, device: torch.device
) -> None:
    monkeypatch.setattr(losses, "ROWS_ON_CPU", rows)
    monkeypatch.setattr(losses, "LOGITS_ON_GPU", 30 * rows)
    monkeypatch.setattr(losses, "LOGITS_OF_A_CORE", 30 * rows // 4)
    found_TD, target_TD, head_VD = wide(11, 6, seed=1).requires_grad_(), wide(11, 6, seed=2), wide(30, 6, seed=3)
    expected = naive_kl(found_TD, target_TD, head_VD)
    (expected_grad,) = torch.autograd.grad(3 * expected, found_TD)
    loss = kl(found_TD.to(device), target_TD.to(device), head_VD.to(device)).cpu()
    (grad,) = torch.autograd.grad(3 * loss, found_TD)
    assert relative(loss.detach(), expected.detach()) < 1e-12 and relative(grad, expected_grad) < 1e-12


@pytest.mark.parametrize("kept", [None, 12])
def test_gradients_of_capped_logits(kept: int | None, device: torch.device) -> None:
    """As Gemma 2 has them: the slope of the cap is a part of the gradient."""
    cap, labels_T = 1.5, torch.randint(30, (11,), generator=torch.Generator().manual_seed(4))
    found_TD, target_TD, head_VD = wide(11, 6, seed=1).requires_grad_(), wide(11, 6, seed=2), wide(30, 6, seed=3)
    target_TV = cap * torch.tanh(target_TD @ head_VD.T / cap)
    weights_T = torch.linspace(0.5, 1.5, 11, dtype=torch.float64)
    capped_TV = cap * torch.tanh(found_TD @ head_VD.T / cap)
    own = divergence(capped_TV, target_TV) if kept is None else divergence_top_k(capped_TV, top_k(target_TV, kept))
    text_T = torch.nn.functional.cross_entropy(capped_TV, labels_T, reduction="none")
    expected = (weights_T * (0.7 * own + 0.3 * text_T)).sum()
    (expected_grad,) = torch.autograd.grad(expected, found_TD)

    def teacher(part: slice) -> Tensor | losses.TopK:
        some_TV = target_TV[part].to(device)
        return some_TV if kept is None else top_k(some_TV, kept)

    loss, _ = distillation_loss(
        found_TD.to(device), head_VD.to(device), teacher, weights_T.to(device), labels_T.to(device),
        Objective(cross_entropy=0.3), softcap=cap,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, found_TD)
    assert relative(loss.detach().cpu(), expected.detach()) < 1e-6 and relative(grad, expected_grad) < 1e-6


def test_kl_is_zero_for_equal_streams_only() -> None:
    x_TD, head_VD = wide(5, 6, seed=1), wide(30, 6, seed=3)
    assert abs(float(kl(x_TD, x_TD, head_VD))) < 1e-12
    assert float(kl(x_TD, wide(5, 6, seed=2), head_VD)) > 0.1


def test_kl_in_bfloat16_products_is_near() -> None:
    found_TD, target_TD, head_VD = wide(64, 32, seed=1), wide(64, 32, seed=2), 0.2 * wide(50, 32, seed=3)
    low = kl(found_TD.float(), target_TD.float(), head_VD.bfloat16())
    assert relative(low, naive_kl(found_TD, target_TD, head_VD)) < 0.02


def test_stream_error_counts_every_token_by_its_own_energy() -> None:
    target_TD = wide(3, 8, seed=1)
    target_TD[1] *= 1000  # a massive activation
    error_TD = wide(3, 8, seed=2)
    expected = sum(
        float(error.square().sum() / target.square().sum()) for error, target in zip(error_TD, target_TD, strict=True)
    )
    assert float(stream_error(target_TD + error_TD, target_TD)) == pytest.approx(expected / 3)
    assert float(stream_error(3 * (target_TD + error_TD), 3 * target_TD)) == pytest.approx(expected / 3)
