"""The source model, read in pieces: one layer at a time, embeddings, final norm and head.

A layer is built from a row of the family table and its own tensors only. Norms and MLP are the unchanged Hugging Face
modules; the attention is read as plain weights.

Legend: T tokens, D hidden_size, V vocabulary, H query heads, G key/value heads, d head_dim, P = d / 2.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from transmla.checkpoint.read import Source
from transmla.families import Family, rope_parameters
from transmla.geometry import GqaGeometry
from transmla.maths.attention import GqaWeights, inverse_frequencies


@dataclass(frozen=True)
class SourceLayer:
    """A decoder layer of the source in pieces.

    index:         number of the layer
    gqa:           weights of the attention
    input_layernorm, post_attention_layernorm, mlp: map [T, D] to [T, D] in the dtype of the layer
    other_tensors: norms and MLP by their names inside the layer; they are written unchanged
    """

    index: int
    gqa: GqaWeights
    input_layernorm: Callable[[Tensor], Tensor]
    post_attention_layernorm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    other_tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Head:
    """What turns the residual stream into logits.

    norm:      the final norm, maps [T, D] to [T, D] in float32
    weight_VD: lm_head, in the dtype in which logits are computed
    """

    norm: Callable[[Tensor], Tensor]
    weight_VD: Tensor


class SourceModel:
    """Reads pieces of the source onto `device`; nothing is kept in memory.

    source:   the opened checkpoint
    family:   its row in the table of families
    geometry: sizes of its attention
    device:   where the pieces are put

    All methods that read raise `SourceError` for tensors that are missing, damaged or not finite.
    """

    def __init__(self, source: Source, family: Family, geometry: GqaGeometry, device: torch.device) -> None:
        self.source, self.family, self.geometry, self.device = source, family, geometry, device
        self.config: Any = source_config(source.config)
        self._frequencies = source_frequencies(self.config, geometry, source.rope_frequency_factors)

    @property
    def head_name(self) -> str:
        """Name of the tensor that is used as lm_head: that of the embeddings if the two are tied."""
        has_head = self.family.lm_head in self.source.tensors and not self.source.config.get("tie_word_embeddings")
        return self.family.lm_head if has_head else self.family.embed_tokens

    @property
    def eps(self) -> float:
        """Epsilon of the RMS norms."""
        return float(self.source.config["rms_norm_eps"])

    def layer(self, index: int) -> SourceLayer:
        """Layer number `index`, in float32."""
        names = layer_tensor_names(self.family, self.config, index)
        tensors = {name: self.source.read(name, dtype=torch.float32, device=self.device) for name in names}
        return build_layer(self.family, self.config, self.geometry, index, tensors, *self._frequencies)

    def norm(self) -> Tensor:
        """Weight of the final norm, float32 [D]."""
        return self.source.read(self.family.norm, dtype=torch.float32, device=self.device)

    def head(self, dtype: torch.dtype) -> Head:
        """The final norm in float32, and lm_head in `dtype`."""
        norm_D, eps = self.norm(), self.eps
        head_VD = self.source.read(self.head_name, dtype=dtype, device=self.device)
        return Head(lambda x_TD: torch.nn.functional.rms_norm(x_TD, norm_D.shape, norm_D, eps), head_VD)

    def embed(self, ids_NT: Tensor) -> Iterator[Tensor]:
        """Embeddings of each window of token ids, float32 [T, D] on the CPU.

        Only the rows of tokens that occur are read.
        """
        ids, places_NT = ids_NT.unique(return_inverse=True)
        rows = self.source.rows(self.family.embed_tokens, ids).float()
        return (rows[places_T] for places_T in places_NT)

    def check_ends(self) -> None:
        """Read embeddings, final norm and lm_head once; raises `SourceError` if a value is not finite."""
        for name in {self.family.embed_tokens, self.head_name, self.family.norm}:
            self.source.read(name)


def source_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config object for a parsed config.json; code from the checkpoint is never run."""
    values = {key: value for key, value in config.items() if key not in ("auto_map", "model_type", "torch_dtype")}
    return AutoConfig.for_model(config["model_type"], **values)


def layer_tensor_names(family: Family, config: PreTrainedConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a layer in the checkpoint, from an instance of its class without memory."""
    with torch.device("meta"):
        module = _layer_class(family)(config, index)
    prefix = family.layer_prefix.format(index)
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}


def build_layer(
    family: Family,
    config: PreTrainedConfig,
    geometry: GqaGeometry,
    index: int,
    tensors: Mapping[str, Tensor],
    inv_freq_P: Tensor,
    attention_factor: float,
) -> SourceLayer:
    """Layer number `index`, built from its tensors.

    tensors:          every tensor of `layer_tensor_names`, in the dtype and on the device to compute with
    inv_freq_P:       rotary frequencies in radians per position, float64 [d / 2]
    attention_factor: factor of cosine and sine (YaRN, 2309.00071, section 3.4); attention scores get its square
    """
    with torch.device("meta"):
        module: nn.Module = _layer_class(family)(config, index)
    prefix = family.layer_prefix.format(index)
    module.load_state_dict({name.removeprefix(prefix): value for name, value in tensors.items()}, assign=True)
    module.requires_grad_(False).eval()
    attention: Any = module.self_attn
    gqa = GqaWeights(
        q_HdD=attention.q_proj.weight.unflatten(0, (geometry.num_attention_heads, geometry.head_dim)),
        k_GdD=attention.k_proj.weight.unflatten(0, (geometry.num_key_value_heads, geometry.head_dim)),
        v_GdD=attention.v_proj.weight.unflatten(0, (geometry.num_key_value_heads, geometry.head_dim)),
        o_DHd=attention.o_proj.weight,
        inv_freq_P=inv_freq_P.to(attention.q_proj.weight.device),
        scaling=float(attention.scaling) * attention_factor**2,
    )
    return SourceLayer(
        index,
        gqa,
        _callable(module.input_layernorm),
        _callable(module.post_attention_layernorm),
        _callable(module.mlp),
        {name: value for name, value in module.state_dict().items() if not name.startswith("self_attn.")},
    )


def source_frequencies(
    config: PreTrainedConfig, geometry: GqaGeometry, frequency_factors: list[float] | None = None
) -> tuple[Tensor, float]:
    """Rotary frequencies of the source in radians per position, float64 [d / 2], and its attention factor.

    frequency_factors: divisors of the frequencies that GGUF files store (`rope_freqs`) for llama3 scaling
    """
    parameters = rope_parameters(config.to_dict())
    plain_P = inverse_frequencies(float(parameters["rope_theta"]), geometry.head_dim)
    if frequency_factors is not None:
        return plain_P / torch.tensor(frequency_factors, dtype=torch.float64), 1.0
    if parameters["rope_type"] == "default":
        return plain_P, 1.0
    inv_freq_P, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    return inv_freq_P.double(), float(attention_factor)


def _layer_class(family: Family) -> type[nn.Module]:
    module, _, name = family.layer_class.partition(":")
    layer_class: type[nn.Module] = getattr(importlib.import_module(module), name)
    return layer_class


def _callable(module: Any) -> Callable[[Tensor], Tensor]:
    call: Callable[[Tensor], Tensor] = module
    return call
