"""The converted model as Trainer needs it: a transformers model whose forward returns the loss against its source.

Legend: B windows, T tokens, D hidden_size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transmla.errors import UnsupportedError
from transmla.healing.teacher import Lesson
from transmla.model.head import head_of
from transmla.model.rounding import Rounding, round_latents
from transmla.text.packing import IGNORED
from transmla.train.losses import Objective, distillation_loss, stream_error, text_nats

# of a layer's forward that are kept; beyond that it runs uncompiled
GRAPHS = 32
# modules of the latent attention that get adapters
LATENT_PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

# (input ids [B, T], positions [B, T], indices of the windows [B]) -> what the source predicts for these windows
Teacher = Callable[[Tensor, Tensor, Tensor], Lesson]


class Student(PreTrainedModel):
    """A converted model whose forward takes a batch of `Windows` and returns losses against its source. Without labels
    it is the language model that it was.

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
    # whether every layer learns for itself, from the source's own input of it
    layerwise: bool = False
    # of latents, if the model learns for a packed cache
    rounding: Rounding | None = None
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

        divergence (at temperature 1), nats (loss of the model) and source_nats (loss of the source) are means over the
        tokens of a window that have a label.
        """
        if self.rounding is not None:
            self.rounding.begin(None if labels is None else position_ids)
        if labels is None:  # it is writing
            plain: Any = super()
            return plain.forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        assert position_ids is not None and index is not None
        if self.layerwise and torch.is_grad_enabled():
            return {"loss": self._layerwise_loss(input_ids, position_ids, self.teacher(input_ids, position_ids, index))}
        out = self.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, output_hidden_states=self.hidden_weight > 0
        )
        normed_BTD = out.last_hidden_state
        lesson = self.teacher(input_ids, position_ids, index)
        # the loss is the mean over windows of the mean over tokens with a label
        counted_BT = (labels != IGNORED).float()
        share_BT = counted_BT / counted_BT.sum(1, keepdim=True).clamp_min(1)
        normed_ND, labels_N, head = normed_BTD.flatten(0, 1), labels.flatten(), head_of(self)
        # what is measured is the divergence itself
        objective = self.objective if torch.is_grad_enabled() else replace(self.objective, temperature=1.0)
        loss, divergence_N = distillation_loss(
            head.inputs(normed_ND), head.weight_VD, lesson.predictions, (share_BT / len(labels)).flatten(), labels_N,
            objective, head.softcap,
        )  # fmt: skip
        if self.hidden_weight > 0:
            pairs = zip(out.hidden_states[1:-1], lesson.streams[1:-1], strict=True)
            errors = [stream_error(own, target) for own, target in pairs]
            if errors:  # a single layer has no streams between layers
                loss = loss + self.hidden_weight * torch.stack(errors).mean()
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

    def _layerwise_loss(self, input_ids: Tensor, position_ids: Tensor, lesson: Lesson) -> Tensor:
        """Mean error of the streams behind all layers, each of which reads what the source's layer reads.

        Gradients stay within a layer, and what the layers before have lost does not concern it (RADLADS, 2505.03005).
        """
        outputs: dict[int, Tensor] = {}

        def give(number: int) -> Callable[..., Any]:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
                stream_BTD = lesson.streams[number]
                if args:
                    return (stream_BTD.to(args[0].dtype), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": stream_BTD.to(kwargs["hidden_states"].dtype)}

            return hook

        def take(number: int) -> Callable[..., None]:
            def hook(_: Any, __: Any, output: Any) -> None:
                outputs[number] = output[0] if isinstance(output, tuple) else output

            return hook

        decoder: Any = self.get_decoder()  # type: ignore[no-untyped-call]
        layers = decoder.layers
        hooks = [layer.register_forward_pre_hook(give(n), with_kwargs=True) for n, layer in enumerate(layers)]
        hooks += [layer.register_forward_hook(take(number)) for number, layer in enumerate(layers)]
        try:
            out = self.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        finally:
            for one in hooks:
                one.remove()
        # the last stream of the source is behind its final norm
        found = [outputs[number] for number in range(len(layers) - 1)] + [out.last_hidden_state]
        pairs = zip(found, lesson.streams[1:], strict=True)
        return torch.stack([stream_error(own, target) for own, target in pairs]).mean()


def teach(
    model: Any,
    teacher: Teacher,
    objective: Objective,
    hidden_weight: float = 0.0,
    latent_bits: int | None = None,
    latent_recent: int = 64,
) -> Student:
    """The same model, changed in place to a `Student`.

    model:         an unfolded model or one in the own form, as `transmla.load` returns it
    teacher:       gives the source's predictions
    objective:     what the loss is made of
    hidden_weight: weight of the error of the residual streams
    latent_bits:   of the packed cache that it learns for; None: it learns with exact latents
    latent_recent: newest tokens that stay exact in it
    """
    student: Student = model
    if not isinstance(model, Student):
        student.__class__ = type("Student", (Student, type(model)), {})
    student.objective, student.hidden_weight = objective, hidden_weight
    if latent_bits is not None:
        student.rounding = round_latents(student, latent_bits, latent_recent)
    # set around nn.Module, which would register a teacher that is a module as a part of the model
    object.__setattr__(student, "teacher", teacher)
    return student


def plain(model: Any) -> Any:
    """The `Student` itself, without the wrapper that adapters put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attention_part(model: Any) -> str:
    """What is in the names of all parameters of the attention, and of no other."""
    return f".{getattr(getattr(model, 'config', None), 'attention_module', 'self_attn')}."


def select_trained(model: Any, train: str) -> None:
    """Enable gradients for the attention, or for all but embeddings and head ("all").

    Gains of the latents are never trained: the matrices on both sides of them can express the same changes.
    """
    attention = attention_part(model)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    fixed = {id(parameter) for module in ends for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        is_gain = name.endswith(("kv_a_layernorm.weight", "q_a_layernorm.weight"))
        chosen = attention in name or (train == "all" and id(parameter) not in fixed)
        parameter.requires_grad = chosen and not is_gain


def save_trained_alone(model: PreTrainedModel) -> None:
    """Let checkpoints of the training hold what is trained; the rest is in the folder that the training began with."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # save_pretrained leaves these out, and Trainer does not miss them when it loads
    model._keys_to_ignore_on_save = set(model.state_dict()) - trained


def halve_frozen(model: nn.Module) -> None:
    """Cast frozen matrices to bfloat16, in place; autocast would multiply them in bfloat16 anyway. And frozen experts,
    whose grouped products autocast leaves in the dtype of their weights.

    A tied head takes the embedding along, so that the residual stream is bfloat16 as well.
    """
    for module in model.modules():
        weights = list(module.parameters(recurse=False))
        is_frozen = not any(weight.requires_grad for weight in weights)
        if is_frozen and (isinstance(module, nn.Linear) or _holds_experts(module)):
            module.to(torch.bfloat16)


def _holds_experts(module: nn.Module) -> bool:
    """Whether it has the matrices of all experts as parameters of three dimensions, as in transformers."""
    return hasattr(module, "num_experts") and any(weight.dim() == 3 for weight in module.parameters(recurse=False))


def share_frozen(student: Any, source: Any) -> int:
    """Let the source use the student's own tensors of what both have alike and neither trains; returns bytes that this
    saves. Where the attention alone is trained, that is nearly the whole model."""
    frozen = {name: weight for name, weight in plain(student).named_parameters() if not weight.requires_grad}
    shared: dict[int, torch.nn.Parameter] = {}
    saved = 0
    for name, weight in list(source.named_parameters()):
        own = frozen.get(name)
        is_alike = own is not None and own.shape == weight.shape and own.dtype == weight.dtype
        if is_alike and own is not None and torch.equal(own.to(weight.device), weight):
            shared[id(weight)] = own
            saved += weight.numel() * weight.element_size()
    # every name of a tied weight, of which named_parameters gives the first
    for module in source.modules():
        for key, weight in list(module._parameters.items()):
            if weight is not None and id(weight) in shared:
                module._parameters[key] = shared[id(weight)]
    return saved


def check_compiling(device: torch.device) -> None:
    """`UnsupportedError` unless torch.compile can make something that runs on the device."""
    try:
        torch.compile(lambda x_1: 2 * x_1)(torch.ones(1, device=device))
    except Exception as error:
        raise UnsupportedError(
            "torch.compile does not work here",
            where="--compile",
            # behind the first paragraph is how to debug it
            why=" ".join(str(error).partition("\n\n")[0].split())[:300] or type(error).__name__,
            remedy="install a C++ compiler (g++), and Triton for GPUs; or leave out --compile",
        ) from error


def compile_layers(*models: Any) -> None:
    """Compile the layers of each model in place, each for itself: layers of one kind share one graph, so that it takes
    seconds and not minutes, and parameters keep their names."""
    # training and measuring, with and without gradients, a mask and a full batch: each is a graph of its own
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for model in models:
        for layer in model.get_decoder().layers:
            layer.compile()


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
