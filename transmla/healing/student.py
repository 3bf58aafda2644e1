"""The converted model as Trainer takes it: a transformers model whose forward is the loss against its source.

Legend: B windows, T tokens, D hidden_size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transmla.healing.teacher import Lesson
from transmla.model.modeling_transmla import UnfoldedForCausalLM
from transmla.text.packing import IGNORED
from transmla.train.losses import Objective, distillation_loss, stream_error, text_nats

# modules of the latent attention that adapters are put on
LATENT_PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

Teacher = Callable[[Tensor, Tensor, Tensor], Lesson]


class Student(UnfoldedForCausalLM):
    """`teach` an unfolded model, and its forward takes windows of healing/data.py and returns losses."""

    # a loss is the mean over windows of the mean over tokens, so that it is the same however windows are dealt out
    accepts_loss_kwargs = False
    # this file is not to be copied into checkpoints
    _auto_class = None  # type: ignore[assignment]

    objective: Objective
    hidden_weight: float
    teacher: Teacher

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """loss; in evaluation also `divergence`, `nats` of the model and `source_nats` [B]."""
        assert position_ids is not None and labels is not None and index is not None
        out = self.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, output_hidden_states=self.hidden_weight > 0
        )
        normed_BTD = out.last_hidden_state
        lesson = self.teacher(input_ids, position_ids, index)
        # a loss is the mean over windows of the mean over the tokens that count
        counted_BT = (labels != IGNORED).float()
        share_BT = counted_BT / counted_BT.sum(1, keepdim=True).clamp_min(1)
        normed_ND, labels_N = normed_BTD.flatten(0, 1), labels.flatten()
        loss, divergence_N = distillation_loss(
            normed_ND, self.lm_head.weight, lesson.predictions, (share_BT / len(labels)).flatten(), labels_N,
            self.objective,
        )  # fmt: skip
        if self.hidden_weight > 0:
            pairs = zip(out.hidden_states[1:-1], lesson.streams[1:-1], strict=True)
            loss = loss + self.hidden_weight * torch.stack([stream_error(own, wanted) for own, wanted in pairs]).mean()
        if torch.is_grad_enabled():
            return {"loss": loss}

        def by_window(found_N: Tensor) -> Tensor:
            return torch.where(counted_BT > 0, found_N.view_as(share_BT) * share_BT, 0.0).sum(1)

        nats_N, spread_N = text_nats(normed_ND, self.lm_head, labels_N, self.config.vocab_size)
        # a state that predicts nothing is never the best one, however near to the source a flat distribution may be
        predicts = spread_N.isfinite().all() & (spread_N > 0).any() & loss.isfinite()
        return {
            "loss": torch.where(predicts, loss, torch.inf),
            "divergence": by_window(divergence_N),
            "nats": by_window(nats_N),
            "source_nats": lesson.nats(labels),
        }


def teach(model: UnfoldedForCausalLM, teacher: Teacher, objective: Objective, hidden_weight: float = 0.0) -> Student:
    """The same model, in place, as a `Student`."""
    student: Student = model  # type: ignore[assignment]
    student.__class__ = Student
    student.objective, student.hidden_weight = objective, hidden_weight
    # a plain attribute even if it holds a module: the source is no part of the model
    object.__setattr__(student, "teacher", teacher)
    return student


def select_trained(model: nn.Module, train: str) -> None:
    """Leave gradients to the attention, or to "all" layers and the last norm; never to embeddings and head.

    Gains of the latents stay: the matrices on both sides of them can do all that they could.
    """
    for name, parameter in model.named_parameters():
        part = ".layers." if train == "all" else ".self_attn."
        is_gain = name.endswith(("kv_a_layernorm.weight", "q_a_layernorm.weight"))
        chosen = part in name or (train == "all" and name == "model.norm.weight")
        parameter.requires_grad = chosen and not is_gain


def halve_frozen(model: nn.Module) -> None:
    """Matrices without gradients in bfloat16, in which autocast would multiply them anyway."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(torch.bfloat16)


def with_adapters(model: Any, rank: int) -> Any:
    """The model in peft's wrapper, low-rank adapters on the projections of its latent attention."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(LATENT_PROJECTIONS))
    with warnings.catch_warnings():
        # peft asks for properties by names that transformers has changed
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, settings)
