"""What a config and its transformers class say of a source, without a weight: sizes, tensor names, attention, rotary.

Legend: see transmla/model/layer.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from transmla.families import (
    MULTIPLIERS,
    Family,
    fixed_rotary,
    has_rotary_kinds,
    is_unrotated,
    layer_kind,
    rope_parameters,
    rotary_dim,
)
from transmla.geometry import GqaGeometry, gqa_geometry
from transmla.maths.attention import inverse_frequencies
from transmla.model.modeling_transmla import as_encoder, encode
from transmla.model.outline import Outline, filled, is_tied

# an attention function that notes what it is called with
_NOTE = "transmla_note"


def corrections(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values that transformers takes another way than they are meant: a window of -1, which is none, for a window. And
    rotary settings by which keys in the cache would have to turn when the text grows, see `fixed_rotary`."""
    window = config.get("sliding_window")
    return fixed_rotary(config) | ({"sliding_window": None} if isinstance(window, int) and window <= 0 else {})


def strays(config: Mapping[str, Any]) -> list[str]:
    """Keys of other families in a config, which its class does not look at: left over from another export."""
    known = CONFIG_MAPPING[config["model_type"]]
    return [key for key in MULTIPLIERS if key in config and not hasattr(known, key)]


def source_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config object for a parsed config.json; code from the checkpoint is never run."""
    left_out = ("auto_map", "model_type", "torch_dtype", "quantization_config", *strays(config))
    values = {key: value for key, value in config.items() if key not in left_out} | corrections(config)
    return AutoConfig.for_model(config["model_type"], **values)


def skeleton(config: PreTrainedConfig) -> Any:
    """The whole model without memory, on the meta device; the weights of its attention functions are never computed."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        # grouped products have no gradient on every device
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json with the defaults of its class and in the spelling of transformers 5."""
    found: dict[str, Any] = source_config(config).to_dict()
    return found


@dataclass(frozen=True)
class Stored:
    """A tensor of a layer, and where its values are in the checkpoint: one below the other.

    shape: in the class;  parts: names in the checkpoint
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of each part; several are matrices."""
        if len(self.parts) == 1:
            return self.shape
        return math.prod(self.shape[:-1]) // len(self.parts), self.shape[-1]

    def assembled(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor as the class wants it, with one part in memory beside it. read: name -> tensor"""
        if len(self.parts) == 1:
            return read(self.parts[0])
        first = read(self.parts[0])
        whole = first.new_empty(len(self.parts), *self.part_shape)
        whole[0] = first
        for place, name in enumerate(self.parts[1:], 1):
            whole[place] = read(name)
        return whole.view(self.shape)


def layer_tensors(family: Family, model: Any, index: int) -> dict[str, Stored]:
    """All tensors of a layer by their names inside the class; model: from `skeleton`."""
    prefix = f"{family.layers}.{index}."
    layer = model.get_submodule(family.layers)[index]
    found = {}
    for name, value in layer.state_dict().items():
        shape = tuple(value.shape)
        names = [family.renamed.get(name, name)]
        if family.experts is not None and name.startswith("mlp.experts."):
            gate, up, down = family.experts
            kinds = (gate, up) if name.endswith("gate_up_proj") else (down,)
            names = [kind.format(expert) for expert in range(shape[0]) for kind in kinds]
        found[name] = Stored(shape, tuple(prefix + one for one in names))
    return found


def checkpoint_tensors(family: Family, model: Any, tied: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a source must have; model: from `skeleton`."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {}
    for index in range(len(model.get_submodule(family.layers))):
        for one in layer_tensors(family, model, index).values():
            expected |= dict.fromkeys(one.parts, one.part_shape)
    for module in (family.embed_tokens, family.norm):
        expected |= {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] == module}
    if not tied:
        head = _head_of(model)
        heads = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] == head}
        expected |= {name.replace(head, family.lm_head): shape for name, shape in heads.items()}
    return expected


def _head_of(model: Any) -> str:
    """The name of the module that makes logits."""
    head = model.get_output_embeddings()
    return str(next(name for name, module in model.named_modules() if module is head))


def source_frequencies(
    config: PreTrainedConfig,
    geometry: GqaGeometry,
    family: Family,
    index: int,
    frequency_factors: list[float] | None = None,
) -> tuple[Tensor, float]:
    """Rotary frequencies of a layer in radians per position, float64 [d / 2], and its attention factor (YaRN,
    2309.00071, section 3.4): cosine and sine are multiplied with it. Pairs that stand have frequency 0.

    frequency_factors: divisors of the frequencies that GGUF files store (`rope_freqs`) for llama3 scaling
    """
    values = config.to_dict()
    turning = rotary_dim(values, geometry.head_dim)
    found_P = torch.zeros(geometry.head_dim // 2, dtype=torch.float64)
    if is_unrotated(family, values, index):
        return found_P, 1.0
    kind = layer_kind(values, index)
    parameters = rope_parameters(values, kind)
    plain_P = inverse_frequencies(float(parameters["rope_theta"]), turning)
    factor = 1.0
    if frequency_factors is not None:
        plain_P = plain_P / torch.tensor(frequency_factors, dtype=torch.float64)
    elif parameters["rope_type"] != "default":
        given = {"layer_type": kind} if has_rotary_kinds(values) else {}
        inv_freq_P, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), **given)
        plain_P = inv_freq_P.double()
    found_P[: turning // 2] = plain_P
    return found_P, float(factor)


@dataclass(frozen=True)
class AttentionFacts:
    """What a layer's attention does, from its module alone.

    biased:      projections of queries, keys or values have biases;  output_bias: o_proj has one
    encoded:     queries or keys go through norms, so that they are no linear map of the attention's input
    num_key_value_heads: that it attends with, whatever the config says to a class that does not ask
    scaling:     of scores, without that of the rotary embeddings;  window, softcap: see `GqaWeights`
    """

    biased: bool
    output_bias: bool
    encoded: bool
    num_key_value_heads: int
    scaling: float
    window: int | None
    softcap: float | None


def attention_facts(family: Family, model: Any, geometry: GqaGeometry, index: int = 0) -> AttentionFacts:
    """Facts of a layer; model: from `skeleton`."""
    attention: Any = copy.deepcopy(getattr(model.get_submodule(family.layers)[index], family.attention))
    output_bias = getattr(attention, family.o_proj).bias is not None
    seen: dict[str, Any] = {}

    def note(_: Any, query: Tensor, key: Tensor, *__: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.update(kwargs, groups=key.shape[1])
        return query, None

    ALL_ATTENTION_FUNCTIONS.register(_NOTE, note)
    encoder = as_encoder(attention, family.o_proj)
    encoder.config._attn_implementation = _NOTE
    turning = rotary_dim(model.config.to_dict(), geometry.head_dim)
    encode(encoder, torch.empty(1, 1, geometry.hidden_size, device="meta"), turning)
    modules = list(encoder.modules())
    return AttentionFacts(
        biased=any(isinstance(module, nn.Linear) and module.bias is not None for module in modules),
        output_bias=output_bias,
        encoded=any("norm" in type(module).__name__.lower() for module in modules),
        num_key_value_heads=seen["groups"],
        scaling=float(seen["scaling"]),
        # some configs say "no window" with -1
        window=window if (window := seen.get("sliding_window")) and window > 0 else None,
        softcap=seen.get("softcap"),
    )


def outline_of_class(config: Mapping[str, Any], family: Family, where: str) -> Outline:
    """What a plan has to know of a source, from its class. where: the config is, for messages"""
    complete, model = complete_config(config), skeleton(source_config(config))
    gqa = gqa_geometry(filled(config, complete), where)
    facts = attention_facts(family, model, gqa)
    return Outline(
        config=complete | {"num_key_value_heads": facts.num_key_value_heads},
        tensors=checkpoint_tensors(family, model, is_tied(complete)),
        head=tuple(model.get_output_embeddings().weight.shape),
        biased=facts.biased,
        output_bias=facts.output_bias,
        encoded=facts.encoded,
        facts=facts,
    )
