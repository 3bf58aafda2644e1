"""The source model, read in pieces: one layer at a time, embeddings, final norm and head.

A layer is the unchanged Hugging Face module, built from its own tensors only. Its attention is taken out of it: what
the projections and norms of that make of an input is seen by an attention function that attends to nothing
(`modeling_transmla.TAP`), and the rest of the layer runs around whatever stands in for it. So no code here knows how
a family norms, scales, adds or mixes.

Legend: B texts, T tokens, D hidden_size, V vocabulary, H query heads, G key/value heads, d head_dim, P = d / 2.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transmla.checkpoint.read import Source
from transmla.families import Family, has_rotary_kinds, is_unrotated, layer_kind, rope_parameters, rotary_dim
from transmla.geometry import GqaGeometry
from transmla.maths.attention import (
    GqaWeights,
    MlaWeights,
    feature_attention,
    features,
    grouped_attention,
    inverse_frequencies,
    mla_attention,
    over_features,
    with_one,
)
from transmla.model.head import Head, logit_scale
from transmla.model.modeling_transmla import as_encoder, encode

# an attention function that notes what it is called with
_NOTE = "transmla_note"


class _Exchange(nn.Module):
    """Stands where a layer's attention was, and gives what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.give: Callable[[Tensor], Tensor] = _refuse

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.give(hidden_states), None


class _Arrived(Exception):
    """Carries the input of the attention out of a layer."""

    def __init__(self, x_BTD: Tensor) -> None:
        super().__init__()
        self.x_BTD = x_BTD


def _refuse(_: Tensor) -> Tensor:
    raise AssertionError("a layer ran before anything stood in for its attention")


def _arrive(x_BTD: Tensor) -> Tensor:
    raise _Arrived(x_BTD)


@dataclass(frozen=True)
class SourceLayer:
    """A decoder layer of the source, its attention apart.

    index:    number of the layer
    gqa:      its attention as plain weights, float32: see `GqaWeights` for `biased` and `encoded`
    body:     the Hugging Face module with an `_Exchange` in place of its attention
    encoder:  that attention, as `modeling_transmla.encode` wants it
    o_proj:   its output projection
    rotary_dim: values of a head that turn, the first ones
    order_d:  places of the values of a head, so that the halves of rotary pairs are d / 2 apart
    residual_multiplier: of what the attention adds to the stream
    """

    index: int
    gqa: GqaWeights
    family: Family
    geometry: GqaGeometry
    body: nn.Module
    encoder: Any
    o_proj: nn.Linear
    rotary_dim: int
    order_d: Tensor
    residual_multiplier: float

    def into_attention(self, stream_BTD: Tensor) -> Tensor:
        """Input of the attention, in the shape of the stream."""
        try:
            self._run(stream_BTD, _arrive)
        except _Arrived as arrived:
            return arrived.x_BTD.view_as(stream_BTD)
        raise AssertionError("the layer never ran its attention")

    def through(self, stream_BTD: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """Stream behind the layer, with `attention` (input -> output, o_proj included) in place of its own; float32."""
        shape = stream_BTD.shape

        def attend(x_BTD: Tensor) -> Tensor:
            return attention(x_BTD.view(shape)).view_as(x_BTD)

        return self._run(stream_BTD, attend).view(shape).float()

    def past_attention(self, stream_BTD: Tensor, out_BTD: Tensor) -> Tensor:
        """Stream behind the layer, if its attention gives `out_BTD`."""
        return self.through(stream_BTD, lambda _: out_BTD)

    def heads(self, x_BTD: Tensor, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Unrotated queries [..., H, T, d], keys [..., G, T, d] and values [..., G, T, v] of the attention's input.

        weights: of projections and norms by name, instead of the source's own
        """
        one_BTD = x_BTD if x_BTD.dim() == 3 else x_BTD[None]
        if weights is None:
            encoded_BTk = encode(self.encoder, one_BTD, self.rotary_dim)
        else:
            encoded_BTk = encode(_Called(self.encoder, weights), one_BTD, self.rotary_dim)
        encoded_BTk = encoded_BTk.view(*x_BTD.shape[:-1], -1)
        sizes = self.geometry
        heads, groups, head_dim = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        parts = encoded_BTk.split([heads * head_dim, groups * head_dim, groups * head_dim], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, head_dim)).transpose(-3, -2) for part in parts)
        return q[..., self.order_d], k[..., self.order_d], v

    def inputs(self, x_BTD: Tensor, heads: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """What `gqa` reads: x itself, with a 1 behind it if there are biases; or keys and values side by side.

        heads: what `heads` gives for x, where that is known
        """
        if self.gqa.encoded:
            _, k, v = self.heads(x_BTD) if heads is None else heads
            return features(k, v)
        return with_one(x_BTD) if self.gqa.biased else x_BTD

    def attention(
        self, x_BTD: Tensor, positions_BT: Tensor | None = None, heads: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        """Output of the source's attention, o_proj included, for its input. Positions: see `grouped_attention`."""
        heads = self.heads(x_BTD) if heads is None else heads
        out: Tensor = self.o_proj(grouped_attention(*heads, self.gqa, positions_BT))
        return out

    @property
    def output_norm(self) -> Callable[[Tensor], Tensor] | None:
        """The norm between the attention's output and the residual stream, if there is one."""
        name = self.family.output_norm
        return None if name is None else self.body.get_submodule(name)

    def latent_heads(self, x_BTD: Tensor, mla: MlaWeights, positions_BT: Tensor | None = None) -> Tensor:
        """Head outputs side by side of latent attention in place of the source's, no o_proj; differentiable in mla."""
        if mla.encoder is None:
            return mla_attention(x_BTD, mla, positions_BT)
        q, k, v = self.heads(x_BTD, mla.encoder)
        return feature_attention(q, features(k, v), mla, positions_BT)

    def latent_attention(self, x_BTD: Tensor, mla: MlaWeights, positions_BT: Tensor | None = None) -> Tensor:
        """Output of latent attention, o_proj included."""
        heads_BTF = self.latent_heads(x_BTD, mla, positions_BT)
        return nn.functional.linear(heads_BTF, mla.o_DHv, mla.o_bias_D)

    def complete(self, mla: MlaWeights) -> MlaWeights:
        """Fitted weights with the source's projections and norms, if they read what these give."""
        return replace(mla, encoder=self.encoder_weights) if self.gqa.encoded else mla

    @property
    def encoder_weights(self) -> dict[str, Tensor]:
        """Weights of the projections and norms by their names inside the attention."""
        return dict(self.encoder.named_parameters())

    @property
    def other_tensors(self) -> dict[str, Tensor]:
        """Everything but the attention, by names inside the layer; it is written unchanged."""
        return dict(self.body.state_dict())

    def narrowed(self, dtype: torch.dtype) -> SourceLayer:
        """The same layer, changed in place: matrices that are not of the attention in `dtype`."""
        for module in self.body.modules():
            if not isinstance(module, _Exchange):
                for name, weight in module.named_parameters(recurse=False):
                    if weight.dim() > 1:
                        setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
        return self

    def _run(self, stream_BTD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        exchange = getattr(self.body, self.family.attention)
        exchange.give = attend
        try:
            out = self.body(
                stream_BTD if stream_BTD.dim() == 3 else stream_BTD[None], attention_mask=None, position_embeddings=None
            )
        finally:
            exchange.give = _refuse
        return out if isinstance(out, Tensor) else out[0]


class _Called:
    """A module with other weights, called like itself."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._module, self._weights = module, weights

    def __call__(self, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._module, dict(self._weights), (), kwargs)


@dataclass(frozen=True)
class Ends:
    """What turns the residual stream into logits.

    norm: the final norm, float32;  head: lm_head
    """

    norm: Callable[[Tensor], Tensor]
    head: Head

    def inputs(self, stream_TD: Tensor) -> Tensor:
        """What the matrix of the head is multiplied with, float32."""
        return self.head.inputs(self.norm(stream_TD))

    def logits(self, stream_TD: Tensor) -> Tensor:
        """[T, V], in the dtype of the head."""
        return self.head.logits(self.norm(stream_TD))


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
        self.skeleton = skeleton(self.config)

    @functools.cached_property
    def tied(self) -> bool:
        """Whether lm_head is the embeddings: as the config says, unless the checkpoint has a head of other values.

        So does transformers (`PreTrainedModel.tie_weights`).
        """
        head, embeddings = (f"{name}.weight" for name in (self.family.lm_head, self.family.embed_tokens))
        if not is_tied(self.config.to_dict()):
            return False
        return head not in self.source.tensors or torch.equal(self.source.read(head), self.source.read(embeddings))

    @property
    def head_name(self) -> str:
        """Name of the tensor that is used as lm_head."""
        return f"{self.family.embed_tokens if self.tied else self.family.lm_head}.weight"

    @property
    def eps(self) -> float:
        """Epsilon of the RMS norms."""
        return float(self.config.rms_norm_eps)

    def layer(self, index: int) -> SourceLayer:
        """Layer number `index`, in float32."""

        def read(name: str) -> Tensor:
            return self.source.read(name, dtype=torch.float32, device=self.device)

        stored = layer_tensors(self.family, self.skeleton, index)
        tensors = {name: one.assembled(read) for name, one in stored.items()}
        factors = self.source.rope_frequency_factors
        return build_layer(self.family, self.skeleton, self.geometry, index, tensors, factors)

    def final_norm(self) -> nn.Module:
        """The final norm, float32."""
        norm = copy.deepcopy(self.skeleton.get_submodule(self.family.norm))
        tensors = {
            name: self.source.read(f"{self.family.norm}.{name}", dtype=torch.float32, device=self.device)
            for name in norm.state_dict()
        }
        norm.load_state_dict(tensors, assign=True)
        return norm.requires_grad_(False)

    def ends(self, dtype: torch.dtype, rows_K: Tensor | None = None) -> Ends:
        """The final norm in float32, and lm_head in `dtype`; rows_K: ids of the tokens whose rows are wanted, or all"""
        bias = f"{self.family.lm_head}.bias"

        def read(name: str) -> Tensor:
            if rows_K is None:
                return self.source.read(name, dtype=dtype, device=self.device)
            return self.source.rows(name, rows_K).to(self.device, dtype)

        weight_VD, biased = read(self.head_name), bias in self.source.tensors
        if biased:
            weight_VD = torch.cat([weight_VD, read(bias)[:, None]], dim=1)
        config = self.source.config
        head = Head(weight_VD, logit_scale(config), config.get("final_logit_softcapping"), biased)
        return Ends(self.final_norm(), head)

    def embed(self, ids_NT: Tensor) -> Iterator[Tensor]:
        """Embeddings of each window of token ids, float32 [T, D] on the CPU.

        Only the rows of tokens that occur are read.
        """
        ids, places_NT = ids_NT.unique(return_inverse=True)
        scale = embedding_scale(self.family, self.source.config)
        rows = self.source.rows(f"{self.family.embed_tokens}.weight", ids).float() * scale
        return (rows[places_T] for places_T in places_NT)

    def check_ends(self) -> None:
        """Read embeddings, final norm and lm_head once; raises `SourceError` if a value is not finite."""
        for name in {f"{self.family.embed_tokens}.weight", self.head_name, f"{self.family.norm}.weight"}:
            self.source.read(name)


def embedding_scale(family: Family, config: Mapping[str, Any]) -> float:
    """What embeddings are multiplied with before the first layer."""
    if family.embedding_scale == "sqrt":
        return float(config["hidden_size"]) ** 0.5
    return float(config.get("embedding_multiplier") or 1.0)


def corrections(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values that transformers takes another way than they are meant: a window of -1, which is none, for a window."""
    window = config.get("sliding_window")
    return {"sliding_window": None} if isinstance(window, int) and window <= 0 else {}


def source_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config object for a parsed config.json; code from the checkpoint is never run."""
    left_out = ("auto_map", "model_type", "torch_dtype", "quantization_config")
    values = {key: value for key, value in config.items() if key not in left_out} | corrections(config)
    return AutoConfig.for_model(config["model_type"], **values)


def skeleton(config: PreTrainedConfig) -> Any:
    """The whole model without memory, on the meta device; the weights of its attention functions are never computed."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        # grouped products have no gradient on every device
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a complete config says that lm_head is the embeddings; the default differs between families."""
    return bool(config.get("tie_word_embeddings"))


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


def build_layer(
    family: Family,
    model: Any,
    geometry: GqaGeometry,
    index: int,
    tensors: Mapping[str, Tensor],
    frequency_factors: list[float] | None = None,
) -> SourceLayer:
    """Layer number `index`, built from its tensors.

    model:             from `skeleton`
    tensors:           every tensor of `layer_tensors`, in the dtype and on the device to compute with
    frequency_factors: see `source_frequencies`
    """
    body: Any = copy.deepcopy(model.get_submodule(family.layers)[index])
    turning, facts = (
        rotary_dim(model.config.to_dict(), geometry.head_dim),
        attention_facts(family, model, geometry, index),
    )
    body.load_state_dict(dict(tensors), assign=True)
    body.requires_grad_(False).eval()
    attention: Any = getattr(body, family.attention)
    o_proj: nn.Linear = getattr(attention, family.o_proj)
    encoder = as_encoder(attention, family.o_proj)
    setattr(body, family.attention, _Exchange())
    device = o_proj.weight.device
    order_d = half_split_order(geometry.head_dim, turning, family.rotary).to(device)
    inv_freq_P, factor = source_frequencies(model.config, geometry, family, index, frequency_factors)
    layer = SourceLayer(
        index,
        GqaWeights(
            q_HdD=torch.empty(0),
            k_GdD=torch.empty(0),
            v_GdD=torch.empty(0),
            o_DHd=o_proj.weight,
            inv_freq_P=inv_freq_P.to(device),
            scaling=facts.scaling * factor**2,
            o_bias_D=o_proj.bias,
            window=facts.window,
            softcap=facts.softcap,
            biased=facts.biased and not facts.encoded,
            encoded=facts.encoded,
        ),
        family,
        geometry,
        body,
        encoder,
        o_proj,
        turning,
        order_d,
        float(getattr(model.config, "residual_multiplier", None) or 1.0),
    )
    return replace(layer, gqa=_plain(layer))


def half_split_order(head_dim: int, turning: int, layout: str) -> Tensor:
    """Places of the values of a head so that the halves of rotary pairs are head_dim / 2 apart, int64 [d].

    turning: values that turn, the first ones; values that stand pair up behind them
    layout:  "half": pairs (m, m + turning / 2); "interleaved": pairs (2m, 2m + 1)
    """
    places = torch.arange(turning)
    pairs = places.view(2, -1).T if layout == "half" else places.view(-1, 2)
    standing = torch.arange(turning, head_dim).view(2, -1).T
    return torch.cat([pairs, standing]).T.flatten()


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
    scaling:     of scores, without that of the rotary embeddings;  window, softcap: see `GqaWeights`
    """

    biased: bool
    output_bias: bool
    encoded: bool
    scaling: float
    window: int | None
    softcap: float | None


def attention_facts(family: Family, model: Any, geometry: GqaGeometry, index: int = 0) -> AttentionFacts:
    """Facts of a layer; model: from `skeleton`."""
    attention: Any = copy.deepcopy(getattr(model.get_submodule(family.layers)[index], family.attention))
    output_bias = getattr(attention, family.o_proj).bias is not None
    seen: dict[str, Any] = {}

    def note(_: Any, query: Tensor, *__: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.update(kwargs)
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
        scaling=float(seen["scaling"]),
        # some configs say "no window" with -1
        window=window if (window := seen.get("sliding_window")) and window > 0 else None,
        softcap=seen.get("softcap"),
    )


def _plain(layer: SourceLayer) -> GqaWeights:
    """The attention as plain weights: maps of its input, or of keys and values where these went through a norm."""
    sizes, gqa = layer.geometry, layer.gqa
    heads, groups, head_dim = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
    if gqa.encoded:
        return over_features(gqa, groups, heads, head_dim, head_dim)
    weights = layer.encoder_weights
    still = {name: torch.zeros_like(value) for name, value in weights.items() if name.endswith("bias")}
    # rows of the identity give columns of the projections, without rounding
    eye_DD = torch.eye(sizes.hidden_size, dtype=gqa.o_DHd.dtype, device=gqa.o_DHd.device)
    parts = [part.transpose(-2, -1) for part in layer.heads(eye_DD, weights | still)]
    if gqa.biased:
        biases = [part.transpose(-2, -1) for part in layer.heads(torch.zeros_like(eye_DD[:1]))]
        parts = [torch.cat(pair, dim=-1) for pair in zip(parts, biases, strict=True)]
    q_HdD, k_GdD, v_GdD = parts
    return replace(gqa, q_HdD=q_HdD, k_GdD=k_GdD, v_GdD=v_GdD)
