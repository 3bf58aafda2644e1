"""One layer of the source, its attention apart.

A layer is the unchanged Hugging Face module, built from its own tensors only. Its attention is taken out of it: what
the projections and norms of that make of an input is seen by an attention function that attends to nothing
(`modeling_transmla.TAP`), and the rest of the layer runs around whatever stands in for it. So no code here knows how
a family norms, scales, adds or mixes.

Legend: B texts, T tokens, D hidden_size, V vocabulary, H query heads, G key/value heads, d head_dim, P = d / 2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from transmla.families import Family, rotary_dim
from transmla.geometry import GqaGeometry
from transmla.maths.attention import (
    GqaWeights,
    MlaWeights,
    Reading,
    feature_attention,
    features,
    grouped_attention,
    mla_attention,
    over_features,
    with_one,
)
from transmla.model.modeling_transmla import as_encoder, encode
from transmla.model.skeleton import attention_facts, source_frequencies


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
    rotary_factor: that those of queries and keys are multiplied with (YaRN)
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
    rotary_factor: float
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

        Queries and keys with the factor that a rotation would have given their turning values.

        weights: of projections and norms by name, instead of the source's own
        """
        one_BTD = x_BTD if x_BTD.dim() == 3 else x_BTD[None]
        encoder = self.encoder if weights is None else _Called(self.encoder, weights)
        encoded_BTk = encode(encoder, one_BTD, self.rotary_dim, self.rotary_factor).view(*x_BTD.shape[:-1], -1)
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

    def latent_heads(
        self, x_BTD: Tensor, mla: MlaWeights, positions_BT: Tensor | None = None, read: Reading | None = None
    ) -> Tensor:
        """Head outputs side by side of latent attention in place of the source's, no o_proj; differentiable in mla.

        positions_BT, read: see `mla_attention`
        """
        if mla.encoder is None:
            return mla_attention(x_BTD, mla, positions_BT, read)
        q, k, v = self.heads(x_BTD, mla.encoder)
        return feature_attention(q, features(k, v), mla, positions_BT, read)

    def latent_attention(
        self, x_BTD: Tensor, mla: MlaWeights, positions_BT: Tensor | None = None, read: Reading | None = None
    ) -> Tensor:
        """Output of latent attention, o_proj included."""
        heads_BTF = self.latent_heads(x_BTD, mla, positions_BT, read)
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
            scaling=facts.scaling,
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
        factor,
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
