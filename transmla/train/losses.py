"""What training minimises: the distance from a teacher's predictions, and from its residual streams.

Logits exist for a few tokens at a time: the gradient is computed along with the loss.
Legend: N tokens of any number of texts, D hidden_size, V vocabulary, K kept logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.text.packing import IGNORED
from transmla.train import LOGITS_OF_A_CORE, LOGITS_ON_GPU, ROWS_ON_CPU

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """temperature: both distributions are softened by it, the divergence scaled by its square (Hinton et al.,
    1503.02531);  cross_entropy: share of the loss that goes to the text itself, 0 to 1;  compiled: computed through
    torch.compile, which reads the logits less often"""

    temperature: float = 1.0
    cross_entropy: float = 0.0
    compiled: bool = False


@dataclass(frozen=True)
class TopK:
    """A teacher's largest logits. probabilities_NK: of the whole vocabulary, float32;  ids_NK: int64"""

    probabilities_NK: Tensor
    ids_NK: Tensor


# tokens -> their logits [n, V], or the largest of them
Predictions = Callable[[slice], Tensor | TopK]


def top_k(logits_NV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k most likely tokens, or all if there are fewer, and their probabilities in the whole distribution."""
    probabilities = (logits_NV.float() / temperature).softmax(-1).topk(min(k, logits_NV.shape[-1]), dim=-1)
    return TopK(probabilities.values, probabilities.indices)


def divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each token [N] in nats, times temperature^2."""
    student, teacher = ((_wide(x) / temperature).log_softmax(-1) for x in (student_NV, teacher_NV))
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def divergence_top_k(student_NV: Tensor, teacher: TopK, temperature: float = 1.0) -> Tensor:
    """The same against a teacher of whom only the largest logits are kept; all other tokens count as one.

    Merging tokens can only lower a divergence (data processing inequality), so this is a lower bound, and equal to
    `divergence` for K = V.
    """
    student = (_wide(student_NV) / temperature).log_softmax(-1).gather(-1, teacher.ids_NK)
    kept = torch.xlogy(teacher.probabilities_NK, teacher.probabilities_NK) - teacher.probabilities_NK * student
    # what is left, never quite nothing: the logarithm of a rounded 1 - 1 is not a number
    rest, own = ((1 - mass).clamp_min(1e-7) for mass in (teacher.probabilities_NK.sum(-1), student.exp().sum(-1)))
    return (kept.sum(-1) + rest * (rest.log() - own.log())) * temperature**2


def rows_at_once(device: torch.device, vocabulary: int) -> int:
    """Tokens whose logits are in memory together."""
    return ROWS_ON_CPU if device.type == "cpu" else max(16, LOGITS_ON_GPU // vocabulary)


def parts(num_tokens: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of tokens whose logits are in memory together."""
    rows = rows_at_once(device, vocabulary)
    return (slice(start, min(start + rows, num_tokens)) for start in range(0, num_tokens, rows))


def few_rows(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows of logits. On a CPU all that is made of so few stays in its caches, and in memory that is used
    again; on a GPU, these are all rows."""
    size = rows
    if device.type == "cpu":
        size = torch.get_num_threads() * max(1, LOGITS_OF_A_CORE // vocabulary)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _rows(predictions: Tensor | TopK, rows: slice) -> Tensor | TopK:
    if isinstance(predictions, Tensor):
        return predictions[rows]
    return TopK(predictions.probabilities_NK[rows], predictions.ids_NK[rows])


def predictions_of(read_ND: Tensor, head_VD: Tensor, softcap: float | None = None) -> Predictions:
    """The logits of a teacher from the inputs of its head, in the dtype of that. softcap: see `distillation_loss`"""

    def logits(part: slice) -> Tensor:
        logits_nV = read_ND[part].to(head_VD.dtype) @ head_VD.T
        return logits_nV if softcap is None else softcap * torch.tanh(logits_nV / softcap)

    return logits


def distillation_loss(
    student_ND: Tensor,
    head_VD: Tensor,
    teacher: Predictions,
    weights_N: Tensor,
    labels_N: Tensor | None = None,
    objective: Objective | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, divergence of each token [N]): float32, or float64 for a float64 head.

    student_ND: inputs of the student's head, the only thing that gets a gradient: heads are not trained
    head_VD:    lm_head; the products run in its dtype, or in that of autocast, the softmax in float32
    teacher:    tokens -> their logits [n, V] or `TopK`
    weights_N:  of each token in the loss, which is the weighted sum; 0 where nothing is to be learned
    labels_N:   the next token of each, for a cross-entropy; -100 has weight 0 there, too
    softcap:    the student's logits are softcap * tanh(logit / softcap)
    """
    found: tuple[Tensor, Tensor] = _Distillation.apply(  # type: ignore[no-untyped-call]
        student_ND, head_VD, teacher, weights_N, labels_N, objective or Objective(), softcap
    )
    return found


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        head_VD: Tensor,
        teacher: Predictions,
        weights_N: Tensor,
        labels_N: Tensor | None,
        objective: Objective,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        kind = student_ND.device.type
        products = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head_VD.dtype
        head_VD = head_VD.to(products)
        grad_ND = torch.empty_like(student_ND) if wants_gradient else None
        found_N = torch.zeros(len(student_ND), dtype=_wide(head_VD[:0]).dtype, device=student_ND.device)
        loss = found_N.new_zeros(())
        for part in parts(len(student_ND), len(head_VD), student_ND.device):
            wanted = teacher(part)
            with torch.autocast(kind, enabled=False):
                read_nV = student_ND[part].to(products) @ head_VD.T
                for few in few_rows(len(read_nV), len(head_VD), student_ND.device):
                    here = slice(part.start + few.start, part.start + few.stop)
                    logits_nV, slope_nV = _capped(_wide(read_nV[few]), softcap)
                    labels_n = None if labels_N is None else labels_N[here]
                    target = _rows(wanted, few)
                    compute = _compiled() if objective.compiled and isinstance(target, Tensor) else _with_gradient
                    loss_n, found_N[here], grad_nV = compute(logits_nV, target, labels_n, objective, wants_gradient)
                    weights_n = weights_N[here].to(loss_n.dtype)
                    # a token of weight 0 may have a loss that is not finite
                    loss += torch.where(weights_n != 0, loss_n * weights_n, 0.0).sum()
                    if grad_nV is not None:
                        grad_nV = grad_nV if slope_nV is None else grad_nV.mul_(slope_nV)
                        grad_nV.mul_(weights_n[:, None])
                        # as slow as a softmax, and seldom needed; to ask a GPU would take longer
                        if kind != "cpu" or not weights_n.all():
                            grad_nV.masked_fill_((weights_n == 0)[:, None], 0.0)
                        # the gradient takes the place of the logits
                        read_nV[few] = grad_nV
                if grad_ND is not None:
                    grad_ND[part] = (read_nV @ head_VD).to(grad_ND.dtype)
        ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(found_N)
        return loss, found_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0], None, None, None, None, None, None


def _capped(logits_NV: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Capped logits and their slope in those that were given."""
    if softcap is None:
        return logits_NV, None
    share_NV = torch.tanh(logits_NV / softcap)
    return softcap * share_NV, 1 - share_NV.square()


def _with_gradient(
    logits_NV: Tensor, teacher: Tensor | TopK, labels_N: Tensor | None, objective: Objective, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and divergence of each token, and the gradient of the loss in the logits, if it is wanted."""
    heat, text = objective.temperature, objective.cross_entropy if labels_N is not None else 0.0
    gradient = None
    if isinstance(teacher, TopK):
        with torch.set_grad_enabled(wants_gradient):
            logits_NV.requires_grad_(wants_gradient)
            diverged_N = divergence_top_k(logits_NV, teacher, heat)
            if wants_gradient:
                (gradient,) = torch.autograd.grad(diverged_N.sum(), logits_NV)
        logits_NV, diverged_N = logits_NV.detach(), diverged_N.detach()
    else:
        both = (logits_NV, _wide(teacher))
        own_NV, wanted_NV = ((x_NV if heat == 1 else x_NV / heat).log_softmax(-1) for x_NV in both)
        likely_NV = wanted_NV.exp()
        diverged_N = (likely_NV * wanted_NV.sub_(own_NV)).sum(-1) * heat**2
        if wants_gradient:
            gradient = own_NV.exp_().sub_(likely_NV)
            gradient = gradient if heat == 1 else gradient.mul_(heat)
    if not text:
        return diverged_N, diverged_N, gradient
    assert labels_N is not None
    likely_NV = logits_NV.log_softmax(-1)
    chosen_N1 = labels_N.clamp_min(0)[:, None]
    nats_N = -likely_NV.gather(-1, chosen_N1).squeeze(-1)
    if gradient is not None:
        of_text = likely_NV.exp_().scatter_add_(-1, chosen_N1, -torch.ones_like(likely_NV[:, :1]))
        gradient = gradient.mul_(1 - text).add_(of_text, alpha=text)
    return (1 - text) * diverged_N + text * nats_N, diverged_N, gradient


@functools.cache
def _compiled() -> Any:
    return torch.compile(_with_gradient)


@torch.no_grad()
def text_nats(normed_ND: Tensor, head: Head, labels_N: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Next-token loss of each token [N], float32, 0 where the label is -100; and how far its logits are spread, largest
    less smallest: 0 for a model that predicts nothing, not finite for one that is broken."""
    nats, spread = [], []
    for part in parts(len(normed_ND), vocabulary, normed_ND.device):
        read_nV, labels_n = head(normed_ND[part]), labels_N[part]
        for few in few_rows(len(read_nV), vocabulary, read_nV.device):
            logits_nV = read_nV[few].float()
            nats.append(
                torch.nn.functional.cross_entropy(logits_nV, labels_n[few], ignore_index=IGNORED, reduction="none")
            )
            spread.append(logits_nV.amax(-1) - logits_nV.amin(-1))
    return torch.cat(nats), torch.cat(spread)


def stream_error(found_TD: Tensor, target_TD: Tensor) -> Tensor:
    """Squared distance of each token's stream over the token's own energy, mean over tokens, float32 or wider.

    What reads the stream is a norm, so an error counts relative to its token; otherwise a handful of tokens with
    massive activations would own the loss.
    """
    found_TD, target_TD = _wide(found_TD), _wide(target_TD)
    return ((found_TD - target_TD).square().mean(-1) / energy(target_TD)).mean()


def energy(stream_TD: Tensor) -> Tensor:
    """Mean square of each token [T], not quite zero: a token whose embedding is zero may stay so through all layers."""
    return stream_TD.square().mean(-1).clamp_min(torch.finfo(stream_TD.dtype).tiny)


def _wide(tensor: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
