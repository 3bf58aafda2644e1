"""The converted model as Trainer needs it: a transformers model whose forward returns the loss against its source.

Legend: B windows, T tokens, D hidden_size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transmla.healing.teacher import Lesson
from transmla.model.head import head_of
from transmla.text.packing import IGNORED
from transmla.train.losses import Objective, distillation_loss, stream_error, text_nats

# modules of the latent attention that get adapters
LATENT_PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

# (input ids [B, T], positions [B, T], indices of the windows [B]) -> what the source predicts for these windows
Teacher = Callable[[Tensor, Tensor, Tensor], Lesson]


class Student(PreTrainedModel):
    """A converted model whose forward takes a batch of `Windows` and returns losses against its source.

    Made by `teach`, which puts this before the class of a loaded model, in place.

    objective:     what the loss is made of
    hidden_weight: weight of the error of the residual streams; 0 leaves them out
    teacher:       gives the source's predictions; not a submodule, so it is neither trained nor saved
    """

    # Trainer must not divide by the number of tokens: the loss is a mean over windows of means over tokens, so that it
    # does not depend on how windows are distributed over steps and processes
    accepts_loss_kwargs = False
    # keeps save_pretrained from copying this file into checkpoints
    _auto_class = None

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
        """The loss, a scalar; without gradients also `divergence`, `nats` and `source_nats`, each float32 [B].

        input_ids, position_ids: int64 [B, T], positions within each document
        labels:                  int64 [B, T], the next token, or IGNORED where there is none
        index:                   int64 [B], numbers of the windows, by which a cached teacher finds its predictions

        divergence, nats (loss of the model) and source_nats (loss of the source) are means over the tokens of a window
        that have a label.
        """
        assert position_ids is not None and labels is not None and index is not None
        out = self.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, output_hidden_states=self.hidden_weight > 0
        )
        normed_BTD = out.last_hidden_state
        lesson = self.teacher(input_ids, position_ids, index)
        # the loss is the mean over windows of the mean over tokens with a label
        counted_BT = (labels != IGNORED).float()
        share_BT = counted_BT / counted_BT.sum(1, keepdim=True).clamp_min(1)
        normed_ND, labels_N, head = normed_BTD.flatten(0, 1), labels.flatten(), head_of(self)
        loss, divergence_N = distillation_loss(
            head.inputs(normed_ND), head.weight_VD, lesson.predictions, (share_BT / len(labels)).flatten(), labels_N,
            self.objective, head.softcap,
        )  # fmt: skip
        if self.hidden_weight > 0:
            pairs = zip(out.hidden_states[1:-1], lesson.streams[1:-1], strict=True)
            loss = loss + self.hidden_weight * torch.stack([stream_error(own, target) for own, target in pairs]).mean()
        if torch.is_grad_enabled():
            return {"loss": loss}

        def by_window(values_N: Tensor) -> Tensor:
            return torch.where(counted_BT > 0, values_N.view_as(share_BT) * share_BT, 0.0).sum(1)

        nats_N, spread_N = text_nats(normed_ND, head.logits, labels_N, len(head.weight_VD))
        # a state that predicts nothing is never the best one, however near to the source a flat distribution may be
        predicts = spread_N.isfinite().all() & (spread_N > 0).any() & loss.isfinite()
        return {
            "loss": torch.where(predicts, loss, torch.inf),
            "divergence": by_window(divergence_N),
            "nats": by_window(nats_N),
            "source_nats": lesson.nats(labels),
        }


def teach(model: Any, teacher: Teacher, objective: Objective, hidden_weight: float = 0.0) -> Student:
    """The same model, changed in place to a `Student`.

    model:         an unfolded model or one in the own form, as `transmla.load` returns it
    teacher:       gives the source's predictions
    objective:     what the loss is made of
    hidden_weight: weight of the error of the residual streams
    """
    student: Student = model
    if not isinstance(model, Student):
        student.__class__ = type("Student", (Student, type(model)), {})
    student.objective, student.hidden_weight = objective, hidden_weight
    # set around nn.Module, which would register a teacher that is a module as a part of the model
    object.__setattr__(student, "teacher", teacher)
    return student


def select_trained(model: Any, train: str) -> None:
    """Enable gradients for the attention, or for all but embeddings and head ("all").

    Gains of the latents are never trained: the matrices on both sides of them can express the same changes.
    """
    attention = f".{getattr(model.config, 'attention_module', 'self_attn')}."
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    fixed = {id(parameter) for module in ends for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        is_gain = name.endswith(("kv_a_layernorm.weight", "q_a_layernorm.weight"))
        chosen = attention in name or (train == "all" and id(parameter) not in fixed)
        parameter.requires_grad = chosen and not is_gain


def halve_frozen(model: nn.Module) -> None:
    """Cast frozen matrices to bfloat16, in place; autocast would multiply them in bfloat16 anyway."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(torch.bfloat16)


def with_adapters(model: Any, rank: int) -> Any:
    """The model in peft's wrapper, with adapters of rank `rank` on the projections of its latent attention."""
    from peft import LoraConfig, get_peft_model

    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LATENT_PROJECTIONS
    ]
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    with warnings.catch_warnings():
        # peft uses names that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, settings)
