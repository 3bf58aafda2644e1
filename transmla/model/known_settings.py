"""Settings of a config.json whose meaning is known without the class that reads them, and their usual values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

# what each rope type needs beside its base, and what else it may have
_ROTARY: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": ({"factor", "original_max_position_embeddings"}, {"beta_fast", "beta_slow", "attention_factor"}),
}


def is_known(settings: Mapping[str, Any]) -> bool:
    """Whether all settings are known, with values that are."""
    return all(key in SETTINGS and SETTINGS[key](value) for key, value in settings.items())


def is_usual_rotary(settings: Any, partly: bool) -> bool:
    """Whether rotary settings, of all layers or of one kind, are complete and as usual. partly: only some values of a
    head may turn"""
    if not isinstance(settings, Mapping):
        return False
    names = {"rope_type", "type", "rope_theta"} | ({"partial_rotary_factor"} if partly else set())
    kind = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROTARY or settings.get("type", kind) != kind:
        return False
    needed, optional = _ROTARY[kind]
    given = set(settings) - names
    return (
        needed <= given <= needed | optional
        and all(_is_positive(settings[key]) for key in given)
        and _is_positive(settings.get("rope_theta", 1.0))
        and _is_share(settings.get("partial_rotary_factor", 1.0))
        and settings.get("factor", 1) >= 1
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_share(value: Any) -> bool:
    return type(value) is float and 0 <= value <= 1


def _is_float(value: Any) -> bool:
    return type(value) is float and 0 < value < math.inf


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    return value is None or _is_whole(value)


def _one_of(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(one) and value == one for one in allowed)


def _or_none(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(test(one) for one in value)


# not given to the class, see `skeleton.source_config`
IGNORED = frozenset({"auto_map", "quantization_config"})
# "gelu" means something else in one class
_ACTIVATIONS = ("silu", "gelu_new", "gelu_pytorch_tanh", "relu")
# setting -> whether a value is one whose meaning is known here; whatever else a config may say is left to the class
SETTINGS: dict[str, Callable[[Any], bool]] = {
    "model_type": _is_text,
    "architectures": _or_none(_list_of(_is_text)),
    "transformers_version": _is_text,
    "_name_or_path": _is_text,
    "_model_name_or_path": _is_text,
    "torch_dtype": _one_of("bfloat16", "float16", "float32"),
    "dtype": _one_of("bfloat16", "float16", "float32"),
    # sizes
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _is_count),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"), _is_count),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"), _is_count),
    "original_max_position_embeddings": _is_count,
    # what the attention does
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_qk_norm"), _is_flag),
    "use_sliding_window": _one_of(False),
    "sliding_window": _or_none(_is_count),
    "max_window_layers": _is_whole,
    "sliding_window_pattern": _is_count,
    "_sliding_window_pattern": _is_count,
    "layer_types": _or_none(_list_of(_is_text)),
    "use_bidirectional_attention": _one_of(False, None),
    "qk_layernorm": _one_of(False),
    **dict.fromkeys(("use_bias", "use_qkv_bias", "qkv_bias", "use_parallel_residual"), _is_flag),
    "query_pre_attn_scalar": _is_count,
    "attn_logit_softcapping": _or_none(_is_float),
    "final_logit_softcapping": _or_none(_is_float),
    # rotary embeddings
    "rope_theta": _is_positive,
    "rope_local_base_freq": _is_positive,
    "rope_scaling": _or_none(lambda value: isinstance(value, dict)),
    "rope_parameters": _or_none(lambda value: isinstance(value, dict)),
    "rope_interleaved": _one_of(False),
    "rotary_emb_base": _is_positive,
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), _is_share),
    "no_rope_layers": _or_none(_list_of(_one_of(0, 1))),
    "no_rope_layer_interval": _is_count,
    # layers
    "hidden_act": _one_of(*_ACTIVATIONS),
    "hidden_activation": _one_of(*_ACTIVATIONS),
    "rms_norm_eps": _is_float,
    "layer_norm_eps": _is_float,
    "norm_epsilon": _is_float,
    "shared_expert_intermediate_size": _is_whole,
    "decoder_sparse_step": _one_of(1),
    "mlp_only_layers": _one_of([]),
    "norm_topk_prob": _is_flag,
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), _is_float),
    **dict.fromkeys(("attention_multiplier", "logit_scale"), _is_float),
    # tokens, and what only training and generation read
    **dict.fromkeys(("bos_token_id", "pad_token_id", "unk_token_id"), _is_token),
    "eos_token_id": lambda value: _is_token(value) or _list_of(_is_whole)(value),
    "initializer_range": _is_share,
    "attention_dropout": _is_share,
    "router_aux_loss_coef": _is_share,
    "router_jitter_noise": _is_share,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "classifier_dropout", "hidden_dropout"), _is_share),
    **dict.fromkeys(("residual_dropout", "embedding_dropout"), _is_share),
    "output_router_logits": _is_flag,
    "use_cache": _is_flag,
    "pretraining_tp": _is_count,
    "use_mrope": _one_of(False),
    **dict.fromkeys(("is_decoder", "is_llama_config"), _is_flag),
}
