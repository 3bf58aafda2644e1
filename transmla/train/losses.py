"""Losses of a student against its teacher's predictions, from the inputs of both heads: logits of few tokens at a time.

Legend: N tokens, D hidden_size, V vocabulary, K kept logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]
# logits that are in memory at once
NUM_LOGITS = 2**24


@dataclass(frozen=True)
class Objective:
    """temperature: both distributions are softened by it, the divergence scaled by its square (Hinton et al.,
    1503.02531);  cross_entropy: share of the loss that goes to the text itself, 0 to 1"""

    temperature: float = 1.0
    cross_entropy: float = 0.0


@dataclass(frozen=True)
class TopK:
    """A teacher's largest logits. probabilities_NK: of the whole vocabulary, float32;  ids_NK: int64"""

    probabilities_NK: Tensor
    ids_NK: Tensor


def top_k(logits_NV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k most likely tokens and what they have of the whole distribution."""
    probabilities = (logits_NV.float() / temperature).softmax(-1).topk(k, dim=-1)
    return TopK(probabilities.values, probabilities.indices)


def divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each token [N] in nats, times temperature^2."""
    student, teacher = ((x.float() / temperature).log_softmax(-1) for x in (student_NV, teacher_NV))
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def divergence_top_k(student_NV: Tensor, teacher: TopK, temperature: float = 1.0) -> Tensor:
    """The same against a teacher of whom only the largest logits are kept; all other tokens count as one.

    Merging tokens can only lower a divergence (data processing inequality), so this is a lower bound, and equal to
    `divergence` for K = V.
    """
    student = (student_NV.float() / temperature).log_softmax(-1).gather(-1, teacher.ids_NK)
    kept = torch.xlogy(teacher.probabilities_NK, teacher.probabilities_NK) - teacher.probabilities_NK * student
    # what is left, never quite nothing: the logarithm of a rounded 1 - 1 is no number
    rest, own = ((1 - mass).clamp_min(1e-7) for mass in (teacher.probabilities_NK.sum(-1), student.exp().sum(-1)))
    return (kept.sum(-1) + rest * (rest.log() - own.log())) * temperature**2


def tokens_at_once(vocabulary: int) -> int:
    """Tokens whose logits are in memory together."""
    return max(16, NUM_LOGITS // vocabulary)


def distillation_loss(
    student_ND: Tensor,
    head_VD: Tensor,
    teacher: Callable[[slice], Tensor | TopK],
    labels_N: Tensor,
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """(loss, divergence alone) as means over the tokens that count, float32.

    student_ND: inputs of the student's head, the only thing that gets a gradient: heads are not trained
    head_VD:    lm_head
    teacher:    tokens -> their logits [n, V] or `TopK`
    labels_N:   the next token of each, -100 where nothing is to be learned, in which case the token does not count
    Logits exist for a few tokens at a time: the gradient is computed along with the loss.
    """
    found: tuple[Tensor, Tensor] = _Loss.apply(  # type: ignore[no-untyped-call]
        student_ND, head_VD, teacher, labels_N, objective
    )
    return found


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        head_VD: Tensor,
        teacher: Callable[[slice], Tensor | TopK],
        labels_N: Tensor,
        objective: Objective,
    ) -> tuple[Tensor, Tensor]:
        wants_gradient = student_ND.requires_grad
        grad_ND = torch.zeros_like(student_ND) if wants_gradient else None
        total = student_ND.new_zeros((), dtype=torch.float32)
        diverged = torch.zeros_like(total)
        counted = labels_N != -100
        num = counted.sum().clamp_min(1)
        at_once = tokens_at_once(len(head_VD))
        for start in range(0, len(student_ND), at_once):
            part = slice(start, min(start + at_once, len(student_ND)))
            if not counted[part].any():
                continue
            logits_nV = student_ND[part] @ head_VD.T
            with torch.set_grad_enabled(wants_gradient):
                logits_nV.requires_grad_(wants_gradient)
                loss, kl = _chunk(logits_nV, teacher(part), labels_N[part], objective)
            if grad_ND is not None:
                (grad_nV,) = torch.autograd.grad(loss, logits_nV)
                grad_ND[part] = grad_nV @ head_VD
            total += loss.detach()
            diverged += kl.detach()
        ctx.save_for_backward(grad_ND / num if grad_ND is not None else None)
        diverged = diverged / num
        ctx.mark_non_differentiable(diverged)
        return total / num, diverged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0], None, None, None, None


def _chunk(student_NV: Tensor, teacher: Tensor | TopK, labels_N: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Sums over the tokens that count."""
    logits_NV = student_NV.float()
    against = divergence_top_k if isinstance(teacher, TopK) else divergence
    found_N = against(logits_NV, teacher, objective.temperature)  # type: ignore[arg-type]
    kl = torch.where(labels_N != -100, found_N, 0.0).sum()
    loss = (1 - objective.cross_entropy) * kl
    if objective.cross_entropy:
        text = torch.nn.functional.cross_entropy(logits_NV, labels_N, ignore_index=-100, reduction="sum")
        loss = loss + objective.cross_entropy * text
    return loss, kl


@torch.no_grad()
def token_nats(normed_ND: Tensor, head: Head, labels_N: Tensor, vocabulary: int) -> Tensor:
    """Mean next-token loss over the tokens that count, a float32 scalar."""
    total = torch.zeros((), dtype=torch.float32, device=normed_ND.device)
    at_once = tokens_at_once(vocabulary)
    for start in range(0, len(normed_ND), at_once):
        logits_nV = head(normed_ND[start : start + at_once]).float()
        labels_n = labels_N[start : start + at_once]
        total += torch.nn.functional.cross_entropy(logits_nV, labels_n, ignore_index=-100, reduction="sum")
    return total / (labels_N != -100).sum().clamp_min(1)


def hidden_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Squared error over the teacher's squared size, mean over tokens: what a norm behind it would see."""
    error_N = (student_ND.float() - teacher_ND.float()).square().sum(-1)
    return (error_N / teacher_ND.float().square().sum(-1).clamp_min(math.ldexp(1.0, -60))).mean()
