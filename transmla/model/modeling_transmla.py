"""Multi-head latent attention that caches the latent and attends in latent space.

This file is self-contained: it is copied into each converted folder, and `auto_map` of config.json names it. So it
is one file with several parts:

CachedLatent             attention over a cache of `kv_lora_rank + qk_rope_head_dim` values per token, nothing expanded
DeepseekV3ForCausalLM    parameters, their names and results of transformers' deepseek_v3, with that cache
UnfoldedForCausalLM      the same for training, without the folded norm
TransmlaForCausalLM ...  a source's own class, with latent attention in place of its own

Shape legend: B batch, T query tokens, S cached tokens, D hidden_size, H num_attention_heads, r kv_lora_rank,
e qk_rope_head_dim, n qk_nope_head_dim, v v_head_dim.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.utils import logging

logger = logging.get_logger(__name__)

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class FoldedRMSNorm(nn.Module):
    """RMSNorm of a latent so small that epsilon dominates: multiplies by weight / sqrt(eps).

    Not a subclass of the stock norm, because kernel libraries replace modules of that class.
    """

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, latent_BTr: torch.Tensor) -> torch.Tensor:
        """The scaled latent [B, T, r], in the dtype of the input; warns if it is called for training."""
        if self.training and torch.is_grad_enabled():
            logger.warning_once(
                "This checkpoint is for inference only: its latent norm is folded (latent_norm_folded in config.json), "
                "so the latent rows of kv_a_proj_with_mqa are about 1e-6, and an optimizer step destroys them. Train "
                "the unfolded form (transmla unfold), and fold it again afterwards (transmla fold)."
            )
        # weight / sqrt(eps) overflows float16
        wide = torch.promote_types(latent_BTr.dtype, torch.float32)
        scale_r = self.weight.to(wide) * self.variance_epsilon**-0.5
        scaled_BTr: torch.Tensor = latent_BTr.to(wide) * scale_r
        return scaled_BTr.to(latent_BTr.dtype)


class LatentGain(nn.Module):
    """What an unfolded checkpoint has in place of the latent norm: multiplies each channel by a weight."""

    weight: nn.Parameter

    def forward(self, latent_BTr: torch.Tensor) -> torch.Tensor:
        """The scaled latent [B, T, r]."""
        return latent_BTr * self.weight


class CachedLatent:
    """Attention over a cache of latents, for modules that `project` hidden states to queries and what is cached.

    There are two ways to compute the same output, `decompressed` and `absorbed`; `absorbs` picks the faster one.
    """

    config: Any
    training: bool
    layer_idx: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    scaling: float
    attention_dropout: float
    # scores are softcap * tanh(score / softcap)
    softcap: float | None = None
    kv_b_proj: Any
    o_proj: Any
    project: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output of the attention block [B, T, D], and the attention weights [B, H, T, S] where they are computed.

        hidden_states:       [B, T, D]
        position_embeddings: cosine and sine of the rotary angles, [B, T, e] each
        attention_mask:      boolean or additive [B, 1 or H, T, S], or None
        past_key_values:     a cache; its values stay empty, since they are a part of the keys
        """
        q_nope_BHTn, q_rot_BHTe, key_B1Tk = self.project(hidden_states, position_embeddings)
        key_B1Sk = key_B1Tk
        # the name that older classes give the cache
        past_key_values = kwargs.pop("layer_past", past_key_values)
        if past_key_values is not None:
            # the values are a slice of the keys, so the cache gets a tensor of zero width for them
            # static caches of older releases need to be told where to write, newer ones count themselves
            where = {"cache_position": kwargs["cache_position"]} if "cache_position" in kwargs else None
            key_B1Sk, _ = past_key_values.update(key_B1Tk, key_B1Tk[..., :0], self.layer_idx, where)

        if self.absorbs(q_nope_BHTn, key_B1Sk, attention_mask):
            out_BTHv, weights = self.absorbed(q_nope_BHTn, q_rot_BHTe, key_B1Sk, attention_mask)
        else:
            out_BTHv, weights = self.decompressed(q_nope_BHTn, q_rot_BHTe, key_B1Sk, attention_mask, **kwargs)
        return self.o_proj(out_BTHv.flatten(2)), weights

    @property
    def expanded_width(self) -> int:
        """n + v, the number of values that kv_b_proj expands the latent to for each head."""
        return self.qk_nope_head_dim + (self.v_head_dim or 0)

    def absorbs(self, q_nope_BHTn: torch.Tensor, key_B1Sk: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether `absorbed` is possible and costs less than `decompressed`.

        Multiply-adds per head and cached token:

            decompressed   r (n + v)  to expand,  T (n + e) scores,  T v values
            absorbed                              T (r + e) scores,  T r values

        so absorbing costs less when T (2r - n - v) < r (n + v). Absorbing the query and expanding the output
        take r (n + v) per query token, never more than expanding S > T cached tokens.
        """
        num_queries, num_keys = q_nope_BHTn.shape[2], key_B1Sk.shape[2]
        rank, expanded = self.kv_lora_rank, self.expanded_width
        cheaper = num_queries * (2 * rank - expanded) < rank * expanded
        if self.training or not (num_keys > num_queries and cheaper):
            return False
        if self.config._attn_implementation not in ("sdpa", "eager"):
            return False
        # several queries without a mask are the prefill of an empty static cache; the stock interface handles it
        if mask is None and num_queries > 1:
            return False
        # adapters, quantised and offloaded layers have to run their own forward
        linear = self.kv_b_proj
        return type(linear) is nn.Linear and linear.weight.device == key_B1Sk.device

    def absorbed(
        self,
        q_nope_BHTn: torch.Tensor,
        q_rot_BHTe: torch.Tensor,
        key_B1Sk: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output of the heads [B, T, H, v] by multi-query attention in latent space, and the weights if eager.

        The keys' half of kv_b_proj is applied to the queries and the values' half to the output, so that nothing is
        expanded for cached tokens (DeepSeek-V2, 2405.04434, section 2.1.2). All H * T queries attend to one key.
        """
        w_Hxr = self.kv_b_proj.weight.view(-1, self.expanded_width, self.kv_lora_rank)
        w_uk_Hnr, w_uv_Hvr = w_Hxr[:, : self.qk_nope_head_dim], w_Hxr[:, self.qk_nope_head_dim :]
        q_latent_BHTr = torch.einsum("bhtn,hnr->bhtr", q_nope_BHTn, w_uk_Hnr)
        q_BHTk = torch.cat((q_latent_BHTr, q_rot_BHTe), dim=-1)
        num_heads, num_queries = q_BHTk.shape[1:3]
        rows_B1Rk = q_BHTk.flatten(1, 2)[:, None]
        rank, scale = self.kv_lora_rank, self.scaling

        weights: torch.Tensor | None = None
        explicit = self.softcap is not None or self.config._attn_implementation == "eager"
        kernel = "products" if explicit else _kernel(q_BHTk, key_B1Sk, mask)
        if kernel == "products":
            attended_B1Rr, weights_B1RS = _products(
                rows_B1Rk, key_B1Sk, rank, _mask_of_rows(mask, num_heads), scale, self.softcap
            )
            if self.config._attn_implementation == "eager":
                weights = weights_B1RS.view(-1, num_heads, num_queries, key_B1Sk.shape[2])
        elif kernel == "heads":
            attended_B1Rr = nn.functional.scaled_dot_product_attention(
                q_BHTk, key_B1Sk, key_B1Sk, scale=scale, enable_gqa=True
            )[..., :rank]
        else:
            # the key serves as the value: fused kernels need equal widths, and they read this tensor anyway
            attended_B1Rr = nn.functional.scaled_dot_product_attention(
                rows_B1Rk, key_B1Sk, key_B1Sk, attn_mask=_mask_of_rows(mask, num_heads), scale=scale
            )[..., :rank]
        attended_BHTr = attended_B1Rr.reshape(-1, num_heads, num_queries, rank)
        return torch.einsum("bhtr,hvr->bthv", attended_BHTr, w_uv_Hvr), weights

    def decompressed(
        self,
        q_nope_BHTn: torch.Tensor,
        q_rot_BHTe: torch.Tensor,
        key_B1Sk: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output of the heads [B, T, H, v] by the attention that the config names, and the weights if it returns them.

        Keys and values of all heads are expanded from the latent first.
        """
        batch, _, num_keys, _ = key_B1Sk.shape
        latent_BSr = key_B1Sk[:, 0, :, : self.kv_lora_rank]
        expanded_BHSx = self.kv_b_proj(latent_BSr).view(batch, num_keys, -1, self.expanded_width).transpose(1, 2)
        k_rot_BHSe = key_B1Sk[..., self.kv_lora_rank :].expand(-1, expanded_BHSx.shape[1], -1, -1)
        key_BHSq = torch.cat((expanded_BHSx[..., : self.qk_nope_head_dim], k_rot_BHSe), dim=-1)
        value_BHSv = expanded_BHSx[..., self.qk_nope_head_dim :]
        query_BHTq = torch.cat((q_nope_BHTn, q_rot_BHTe), dim=-1)
        attend: Attention = stock.eager_attention_forward
        if self.config._attn_implementation == "eager":
            mask = _additive(mask, query_BHTq.dtype)
        else:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        if self.softcap is not None:
            attend = functools.partial(_capped, softcap=self.softcap)
        width, missing = value_BHSv.shape[-1], key_BHSq.shape[-1] - value_BHSv.shape[-1]
        if missing > 0 and self.config._attn_implementation == "sdpa" and value_BHSv.device.type == "cpu":
            # on CPUs the fused kernel needs equal widths; it is three times as fast as the fallback
            value_BHSv = nn.functional.pad(value_BHSv, (0, missing))
        out_BTHv, weights = attend(
            self, query_BHTq, key_BHSq, value_BHSv, mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return out_BTHv[..., :width], weights


class LatentAttention(CachedLatent, stock.DeepseekV3Attention):  # type: ignore[misc]
    """Attention with the parameters of the stock class, and the latent in the cache."""

    # with a q_lora_rank, q_proj is None; without one, the others are
    q_proj: Any
    q_a_proj: Any
    q_a_layernorm: Any
    q_b_proj: Any

    def project(
        self, hidden_BTD: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries without rotation [B, H, T, n], rotated queries [B, H, T, e], and what is cached [B, 1, T, r + e].

        The cache holds the latent (r values), followed by the rotated rotary key (e values).
        """
        if self.q_lora_rank is None:
            q_BTq = self.q_proj(hidden_BTD)
        else:
            q_BTq = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTD)))
        q_BHTq = q_BTq.view(*q_BTq.shape[:2], -1, self.qk_head_dim).transpose(1, 2)
        q_nope_BHTn, q_rot_BHTe = q_BHTq[..., : self.qk_nope_head_dim], q_BHTq[..., self.qk_nope_head_dim :]

        down_BTk = self.kv_a_proj_with_mqa(hidden_BTD)
        latent_BTr = self.kv_a_layernorm(down_BTk[..., : self.kv_lora_rank])
        k_rot_BTe = down_BTk[..., self.kv_lora_rank :]

        interleave = self.config.rope_interleave
        rotate = stock.apply_rotary_pos_emb_interleave if interleave else stock.apply_rotary_pos_emb
        q_rot_BHTe, k_rot_B1Te = rotate(q_rot_BHTe, k_rot_BTe[:, None], *position_embeddings)
        return q_nope_BHTn, q_rot_BHTe, torch.cat((latent_BTr[:, None], k_rot_B1Te), dim=-1)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask (true: attend) as a mask to add to scores; finite, so that fully masked rows do not become NaN."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _mask_of_rows(mask: torch.Tensor | None, num_heads: int) -> torch.Tensor | None:
    """A mask [B, 1 or H, T, S] as [B, 1, H * T, S]; [B, 1, 1, S] broadcasts and stays."""
    if mask is None or mask.shape[1:3] == (1, 1):
        return mask
    return mask.expand(-1, num_heads, -1, -1).flatten(1, 2)[:, None]


def _kernel(q_BHTk: torch.Tensor, key_B1Sk: torch.Tensor, mask: torch.Tensor | None) -> str:
    """How absorbed attention runs: "rows", all heads as queries of one fused call; "heads", one fused call with a
    grouped key; "products", two matrix products and a softmax.

    With one key head, the fused kernels of a GPU give all rows of a text to one of its multiprocessors. Up to a width
    of 256 the flash kernel divides the cache of a single query per head among them; above, two products do. On an H100
    at 512 + 64 and 65,536 tokens of one text: rows 6.2 ms, products 0.28 ms; at 96 + 32: rows 0.85 ms, heads 0.05 ms.
    """
    if key_B1Sk.device.type != "cuda":
        return "rows"
    batch, num_heads, num_queries, width = q_BHTk.shape
    if width <= 256 and num_queries == 1 and mask is None and q_BHTk.dtype in (torch.float16, torch.bfloat16):
        return "heads"
    # scores are in memory
    return "products" if batch * num_heads * num_queries * key_B1Sk.shape[2] <= 2**28 else "rows"


def _capped(
    module: nn.Module,
    query_BHTq: torch.Tensor,
    key_BHSq: torch.Tensor,
    value_BHSv: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float,
    softcap: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with capped scores (Gemma 2, 2408.00118, section 2), for which there is no fused kernel."""
    scores_BHTS = softcap * torch.tanh(query_BHTq @ key_BHSq.transpose(-1, -2) * (scaling / softcap))
    num_queries, num_keys = scores_BHTS.shape[-2:]
    if mask is None and num_queries > 1:
        places = torch.arange(num_keys, device=scores_BHTS.device)
        mask = places <= places[:num_queries, None] + (num_keys - num_queries)
    bias = _additive(mask, scores_BHTS.dtype)
    if bias is not None:
        scores_BHTS = scores_BHTS + bias
    wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = scores_BHTS.softmax(dim=-1, dtype=wide).to(query_BHTq.dtype)
    weights_BHTS = nn.functional.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ value_BHSv).transpose(1, 2).contiguous(), weights_BHTS


def _products(
    rows_B1Rk: torch.Tensor,
    key_B1Sk: torch.Tensor,
    rank: int,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attended latents [B, 1, R, r] and attention weights [B, 1, R, S] of R rows of queries, with a float32 softmax."""
    scores_B1RS = rows_B1Rk @ key_B1Sk.transpose(-1, -2) * scaling
    if softcap is not None:
        scores_B1RS = softcap * torch.tanh(scores_B1RS / softcap)
    bias = _additive(mask, scores_B1RS.dtype)
    if bias is not None:
        scores_B1RS = scores_B1RS + bias
    wide = torch.promote_types(scores_B1RS.dtype, torch.float32)
    weights_B1RS = scores_B1RS.softmax(dim=-1, dtype=wide).to(rows_B1Rk.dtype)
    return weights_B1RS @ key_B1Sk[..., :rank], weights_B1RS


class DeepseekV3ForCausalLM(stock.DeepseekV3ForCausalLM):
    """The stock model with `LatentAttention`.

    It has the name of the stock class on purpose: save_pretrained writes the class name to `architectures`, by which
    vLLM, SGLang and llama.cpp's converter choose their implementation.
    """

    # makes save_pretrained copy this file and write auto_map, however the model was loaded
    _auto_class = "AutoModelForCausalLM"
    # `absorbed` needs 4D masks
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        folded = getattr(config, "latent_norm_folded", False)
        for layer in self.model.layers:
            # changing the class keeps the parameters of the stock class, their initialisation and meta tensors
            layer.self_attn.__class__ = LatentAttention
            if folded:
                layer.self_attn.kv_a_layernorm.__class__ = FoldedRMSNorm
            if folded and config.q_lora_rank is not None:
                layer.self_attn.q_a_layernorm.__class__ = FoldedRMSNorm


class UnfoldedConfig(DeepseekV3Config):
    """Config of the unfolded form. Stock classes refuse its model_type; they would apply a norm to the latent."""

    model_type = "deepseek_v3_unfolded"
    _auto_class = "AutoConfig"


class UnfoldedForCausalLM(DeepseekV3ForCausalLM):
    """The form for training: weights of ordinary size, no latent norm, and biases of queries where they belong.

    `transmla fold` writes the stock form of it.
    """

    config_class = UnfoldedConfig

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.kv_a_layernorm.__class__ = LatentGain
            if config.q_lora_rank is not None:
                attention.q_a_layernorm.__class__ = LatentGain
            if getattr(config, "query_bias", False):
                last = attention.q_proj if config.q_lora_rank is None else attention.q_b_proj
                last.bias = nn.Parameter(torch.zeros_like(last.weight[:, 0]))


# An attention function that attends to nothing: queries, keys and values of each token side by side, [B, T, 1, .].
TAP = "transmla_tap"


def _tap(
    module: nn.Module, query_BHTd: torch.Tensor, key_BGTd: torch.Tensor, value_BGTv: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    parts = [x.transpose(1, 2).flatten(2) for x in (query_BHTd, key_BGTd, value_BGTv)]
    return torch.cat(parts, dim=-1)[:, :, None], None


ALL_ATTENTION_FUNCTIONS.register(TAP, _tap)


def as_encoder(attention: Any, output_projection: str) -> Any:
    """A transformers attention module, changed in place to give what it would attend with: see `encode`."""
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = TAP
    delattr(attention, output_projection)
    # no module, which would have the name that adapters are put on
    attention.__dict__[output_projection] = _unchanged
    return attention


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def encode(encoder: Any, hidden_BTD: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Unrotated queries, keys and values of a module's own projections and norms, [B, T, H d + G d + G v].

    encoder:    from `as_encoder`; it runs as it is, but for a rotation by nothing and `TAP` in place of attention
    rotary_dim: values of a head that it wants to rotate
    """
    ones = hidden_BTD.new_ones(1, 1, rotary_dim)
    angles = (ones, torch.zeros_like(ones))
    encoded: torch.Tensor = encoder(hidden_states=hidden_BTD, attention_mask=None, position_embeddings=angles)[0]
    return encoded


class TransmlaConfig(PreTrainedConfig):
    """Config of a converted model in its own form: the source's config, and the sizes of the latent attention.

    text_config:          of the source, unchanged, and of any model type that transformers has
    kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim: as in deepseek_v3
    latent_inv_freq:      frequencies of the rotary key's pairs in radians per position, for each layer
    latent_encoder:       "input": the latent is made of the hidden state; "features": of the keys and values that the
                          source's own projections and norms make of it
    softmax_scale, softcap: of the attention scores
    base_module:          name of the module that holds the layers
    attention_module, output_projection: names of the modules that are exchanged
    source_rotary_dim:    values of a head that the source rotates
    query_bias, rope_bias, output_bias: whether these projections have biases
    """

    model_type = "transmla"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    _auto_class = "AutoConfig"

    def __init__(
        self,
        text_config: Any = None,
        kv_lora_rank: int = 0,
        qk_rope_head_dim: int = 0,
        qk_nope_head_dim: int = 0,
        v_head_dim: int = 0,
        latent_inv_freq: list[list[float]] | None = None,
        latent_encoder: str = "input",
        softmax_scale: float = 1.0,
        softcap: float | None = None,
        base_module: str = "model",
        attention_module: str = "self_attn",
        output_projection: str = "o_proj",
        source_rotary_dim: int = 0,
        query_bias: bool = False,
        rope_bias: bool = False,
        output_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.qk_nope_head_dim, self.v_head_dim = qk_nope_head_dim, v_head_dim
        self.latent_inv_freq, self.latent_encoder = latent_inv_freq or [], latent_encoder
        self.softmax_scale, self.softcap = softmax_scale, softcap
        self.base_module = base_module
        self.attention_module, self.output_projection = attention_module, output_projection
        self.source_rotary_dim = source_rotary_dim
        self.query_bias, self.rope_bias, self.output_bias = query_bias, rope_bias, output_bias
        if text_config is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        """What is not set here is that of the source."""
        if name.startswith("__") or "text_config" not in self.__dict__ or self.__dict__["text_config"] is None:
            raise AttributeError(name)
        return getattr(self.__dict__["text_config"], name)


class LatentRotary(nn.Module):
    """Cosine and sine of the angles of the shared rotary key, in place of the source's; for all layers at once."""

    def __init__(self, config: TransmlaConfig) -> None:
        super().__init__()
        self.inv_freq = config.latent_inv_freq
        # no buffer, which would be cast along with the weights
        self._on_device: dict[torch.device, torch.Tensor] = {}

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """[layers, B, T, e] each, the two halves of a pair e / 2 apart, in the dtype of x."""
        if x.device not in self._on_device:
            self._on_device[x.device] = torch.tensor(self.inv_freq, dtype=torch.float32, device=x.device)
        inv_freq_LM = self._on_device[x.device]
        angles_LBTM = position_ids[..., None].float() * inv_freq_LM[:, None, None]
        angles_LBTe = torch.cat((angles_LBTM, angles_LBTM), dim=-1)
        return angles_LBTe.cos().to(x.dtype), angles_LBTe.sin().to(x.dtype)


class ConvertedAttention(CachedLatent, nn.Module):
    """Latent attention without a norm on the latent, in place of a source's attention module."""

    encoder: Any

    def __init__(self, config: TransmlaConfig, text_config: Any, index: int, attention: Any) -> None:
        super().__init__()
        # the source's config holds the attention implementation that the whole model uses
        self.config, self.layer_idx = text_config, index
        self.kv_lora_rank, self.qk_rope_head_dim = config.kv_lora_rank, config.qk_rope_head_dim
        self.qk_nope_head_dim, self.v_head_dim = config.qk_nope_head_dim, config.v_head_dim
        self.scaling, self.softcap = config.softmax_scale, config.softcap
        self.attention_dropout = float(getattr(text_config, "attention_dropout", 0.0) or 0.0)
        self.is_causal, self.num_key_value_groups = True, 1
        heads, hidden = text_config.num_attention_heads, text_config.hidden_size
        cached = self.kv_lora_rank + self.qk_rope_head_dim
        if config.latent_encoder == "features":
            self.encoder = as_encoder(attention, config.output_projection)
            self.rotary_dim, self.num_queries = config.source_rotary_dim, heads * self.qk_nope_head_dim
            groups = text_config.num_key_value_heads
            seen = groups * (self.qk_nope_head_dim + self.v_head_dim)
            self.q_rope_proj = nn.Parameter(torch.empty(heads, self.qk_rope_head_dim, self.qk_nope_head_dim))
        else:
            self.encoder, seen = None, hidden
            width = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
            self.q_proj = nn.Linear(hidden, width, bias=config.query_bias)
        self.kv_a_proj_with_mqa = nn.Linear(seen, cached, bias=config.rope_bias)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.output_bias)

    def project(
        self, hidden_BTD: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries without rotation [B, H, T, n], rotated queries [B, H, T, e], and what is cached [B, 1, T, r + e]."""
        nope = self.qk_nope_head_dim
        if self.encoder is None:
            q_BTq, seen_BTF = self.q_proj(hidden_BTD), hidden_BTD
        else:
            encoded = encode(self.encoder, hidden_BTD, self.rotary_dim)
            q_BTq, seen_BTF = encoded[..., : self.num_queries], encoded[..., self.num_queries :]
        q_BHTq = q_BTq.unflatten(-1, (-1, nope if self.encoder is not None else nope + self.qk_rope_head_dim))
        q_BHTq = q_BHTq.transpose(1, 2)
        q_nope_BHTn = q_BHTq[..., :nope]
        if self.encoder is None:
            q_rope_BHTe = q_BHTq[..., nope:]
        else:
            q_rope_BHTe = torch.einsum("bhtd,hed->bhte", q_BHTq, self.q_rope_proj)
        down_BTk = self.kv_a_proj_with_mqa(seen_BTF)
        k_rope_B1Te = down_BTk[:, None, :, self.kv_lora_rank :]
        cos_BTe, sin_BTe = (of_layers[self.layer_idx] for of_layers in position_embeddings)
        q_rope_BHTe, k_rope_B1Te = stock.apply_rotary_pos_emb(q_rope_BHTe, k_rope_B1Te, cos_BTe, sin_BTe)
        return q_nope_BHTn, q_rope_BHTe, torch.cat((down_BTk[:, None, :, : self.kv_lora_rank], k_rope_B1Te), dim=-1)


class ExchangedModel(PreTrainedModel):
    """The source's own class with its attention exchanged for latent attention; all other code is the library's.

    auto: the class of transformers that makes the source's class
    """

    config_class = TransmlaConfig
    base_model_prefix = "model"
    auto: Any
    _supports_sdpa = True
    # `absorbed` needs 4D masks
    _supports_flash_attn = False
    _supports_flex_attn = False
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True

    def __init__(self, config: TransmlaConfig) -> None:
        super().__init__(config)
        config.text_config.num_labels = config.num_labels
        # whatever attends in the source's class is about to be exchanged, so it need not support what this one does
        inner: Any = self.auto.from_config(config.text_config, attn_implementation="eager")
        inner.config._attn_implementation = config._attn_implementation
        # around nn.Module, which would register its parameters a second time
        self.__dict__["_inner"] = inner
        self.base_model_prefix = config.base_module
        self._tied_weights_keys = inner._tied_weights_keys
        base = getattr(inner, config.base_module, inner)
        for index, layer in enumerate(base.layers):
            attention = getattr(layer, config.attention_module)
            setattr(layer, config.attention_module, ConvertedAttention(config, inner.config, index, attention))
        base.rotary_emb = LatentRotary(config)
        for name, child in inner.named_children():
            setattr(self, name, child)
        self.post_init()  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        """What a forward of the source's class reads of itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_inner" or "_inner" not in self.__dict__:
                raise
            return getattr(self.__dict__["_inner"], name)

    def _init_weights(self, module: Any) -> None:
        """As the source's class: constants that are no weights are set here as well."""
        self.__dict__["_inner"]._init_weights(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's class."""
        return type(self.__dict__["_inner"]).forward(self, *args, **kwargs)


class TransmlaModel(ExchangedModel):
    """Without a head."""

    auto = AutoModel
    _auto_class = "AutoModel"


class TransmlaForCausalLM(ExchangedModel, GenerationMixin):
    """With the source's head."""

    auto = AutoModelForCausalLM
    _auto_class = "AutoModelForCausalLM"


class TransmlaForSequenceClassification(ExchangedModel):
    """With a new head, where the source's family has such a class."""

    auto = AutoModelForSequenceClassification
    _auto_class = "AutoModelForSequenceClassification"


__all__ = [
    "DeepseekV3ForCausalLM",
    "TransmlaConfig",
    "TransmlaForCausalLM",
    "TransmlaForSequenceClassification",
    "TransmlaModel",
    "UnfoldedConfig",
    "UnfoldedForCausalLM",
]
