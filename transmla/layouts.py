"""What the transformers classes make of a config, as data: the modules of a layer, and the defaults of settings.

With the layout of a family and the headers of the weight files, `transmla plan` answers without torch and transformers.
A layout is never the last word: a config that says more than it knows, and files that are not as it says, are judged by
the class itself, and so is everything that `convert` does. Tests compare the two. See transmla/model/outline.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Layout:
    """One class.

    layer:    modules of a layer by their names in the checkpoint, with the sizes of their weights, one letter each:
              D hidden_size, I intermediate_size, N the number of experts, d head_dim, H heads, G key/value heads,
              Q, K, A values of all queries, of all keys, and of queries, keys and values, U both inputs of a gated MLP
    biases:   setting -> modules that have a bias if it is set, "": always; "norm" and "lm_head" are those of the model
    norms:    setting -> more of a layer if it is set, as in `layer`
    experts:  settings with number and width of the experts, whose names are in the row of the family
    windows:  layers that have a window where the config gives one: "all", or 4: all but every 4th; "off": none unless
              use_sliding_window is set; None: none
    kinds:    whether the class says which these are, in layer_types
    rotary_kinds: whether these turn differently;  scaled: whether the class knows any rope scaling
    needed:   settings that the class cannot do without
    defaults: of settings that a plan depends on, where the config is silent; None: what follows from the others
    """

    layer: Mapping[str, str]
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norms: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    experts: tuple[str, str] | None = None
    windows: str | int | None = None
    kinds: bool = False
    rotary_kinds: bool = False
    scaled: bool = True
    needed: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKVO = (*_QKV, "self_attn.o_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ATTENTION = dict(zip(_QKVO, ("QD", "KD", "KD", "DQ"), strict=True))
_MLP = dict(zip(_GATED, ("ID", "ID", "DI"), strict=True))
_NORMS = {"input_layernorm": "D", "post_attention_layernorm": "D"}
_BEHIND = {"post_attention_layernorm": "D", "post_feedforward_layernorm": "D"}
_SANDWICH = _NORMS | {"pre_feedforward_layernorm": "D", "post_feedforward_layernorm": "D"}
_NORM_OF_HEADS = {"self_attn.q_norm": "d", "self_attn.k_norm": "d"}
_NORM_OF_ALL = {"self_attn.q_norm": "Q", "self_attn.k_norm": "K"}
_LLAMA = _ATTENTION | _MLP | _NORMS

# of most classes
_BARE: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0}
_USUAL = _BARE | {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6}
_MISTRAL = _USUAL | {
    "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "sliding_window": 4096,
}  # fmt: skip
_QWEN = _USUAL | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "intermediate_size": 9216, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
}  # fmt: skip
_OLMO = _USUAL | {
    "vocab_size": 50304, "intermediate_size": 11008, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip

_COHERE = _BARE | {
    "vocab_size": 256000, "intermediate_size": 22528, "num_key_value_heads": None, "head_dim": None,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "logit_scale": 0.0625,
}  # fmt: skip
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_PHI = {"self_attn.dense": "DQ", "mlp.fc1": "ID", "mlp.fc2": "DI", "input_layernorm": "D"}
_NEOX_ATTENTION = {"attention.query_key_value": "AD", "attention.dense": "DQ"}
_NEOX_MLP = {"mlp.dense_h_to_4h": "ID", "mlp.dense_4h_to_h": "DI"}

# by model_type
LAYOUTS: dict[str, Layout] = {
    "llama": Layout(
        _LLAMA, {"attention_bias": _QKVO, "mlp_bias": _GATED},
        defaults=_USUAL | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    ),
    "mistral": Layout(_LLAMA, windows="all", defaults=_MISTRAL),
    "ministral": Layout(_LLAMA, windows="all", kinds=True, needed=("head_dim",), defaults=_MISTRAL),
    "qwen2": Layout(_LLAMA, {"": _QKV}, windows="off", kinds=True, defaults=_QWEN),
    "qwen3": Layout(
        _LLAMA | _NORM_OF_HEADS, {"attention_bias": _QKVO}, windows="off", kinds=True,
        defaults=_QWEN | {"head_dim": 128},
    ),
    "qwen3_moe": Layout(
        _ATTENTION | _NORMS | _NORM_OF_HEADS | {"mlp.gate": "ND"}, {"attention_bias": _QKVO},
        experts=("num_local_experts", "moe_intermediate_size"), windows="off",
        defaults=_QWEN | {
            "intermediate_size": 6144, "num_key_value_heads": 4, "num_local_experts": 128, "moe_intermediate_size": 768,
        },
    ),
    "mixtral": Layout(
        _ATTENTION | _NORMS | {"block_sparse_moe.gate": "ND"},
        experts=("num_local_experts", "intermediate_size"), windows="all", scaled=False,
        defaults=_MISTRAL | {
            "rms_norm_eps": 1e-5, "num_local_experts": 8, "sliding_window": None, "rope_theta": 1000000.0,
        },
    ),
    "phi3": Layout(
        _NORMS
        | {"self_attn.qkv_proj": "AD", "self_attn.o_proj": "DQ", "mlp.gate_up_proj": "UD", "mlp.down_proj": "DI"},
        windows="all", scaled=False,
        defaults=_USUAL | {
            "vocab_size": 32064, "intermediate_size": 8192, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "sliding_window": None, "pad_token_id": 32000, "partial_rotary_factor": 1.0,
        },
    ),
    "granite": Layout(
        _LLAMA, {"attention_bias": _QKVO, "mlp_bias": _GATED},
        defaults=_USUAL | {
            "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048,
            "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
        },
    ),
    "smollm3": Layout(
        _LLAMA, {"attention_bias": _QKVO, "mlp_bias": _GATED}, kinds=True,
        defaults=_USUAL | {
            "vocab_size": 128256, "intermediate_size": 11008, "num_key_value_heads": 4,
            "max_position_embeddings": 32768, "tie_word_embeddings": True, "pad_token_id": 128004,
            "rope_theta": 2000000.0,
        },
    ),
    "gemma": Layout(
        _LLAMA, {"attention_bias": _QKVO},
        defaults=_GEMMA | {
            "intermediate_size": 24576, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "gemma2": Layout(
        _ATTENTION | _MLP | _SANDWICH, {"attention_bias": _QKVO}, windows=2, kinds=True,
        defaults=_GEMMA2 | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "gemma3_text": Layout(
        _ATTENTION | _MLP | _SANDWICH | _NORM_OF_HEADS, {"attention_bias": _QKVO},
        windows=6, kinds=True, rotary_kinds=True,
        defaults=_GEMMA2 | {"vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1000000.0},
    ),
    "olmo2": Layout(_BEHIND | _ATTENTION | _MLP | _NORM_OF_ALL, {"attention_bias": _QKVO}, defaults=_OLMO),
    "olmo3": Layout(
        _BEHIND | _ATTENTION | _MLP | _NORM_OF_ALL, {"attention_bias": _QKVO}, windows=4, kinds=True, rotary_kinds=True,
        defaults=_OLMO | {"sliding_window": 4096, "rope_theta": 500000.0},
    ),
    "glm4": Layout(
        _ATTENTION | _NORMS
        | {
            "post_self_attn_layernorm": "D", "post_mlp_layernorm": "D", "mlp.gate_up_proj": "UD", "mlp.down_proj": "DI",
        },
        {"attention_bias": _QKV},
        defaults=_USUAL | {
            "vocab_size": 151552, "intermediate_size": 13696, "num_key_value_heads": 2, "head_dim": 128,
            "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07, "attention_bias": True,
            "pad_token_id": 151329, "partial_rotary_factor": 0.5,
        },
    ),
    "cohere": Layout(
        _ATTENTION | _MLP | {"input_layernorm": "D"}, {"attention_bias": _QKVO},
        norms={"use_qk_norm": {"self_attn.q_norm": "Hd", "self_attn.k_norm": "Gd"}},
        defaults=_COHERE | {"rope_theta": 500000.0},
    ),
    "cohere2": Layout(
        _ATTENTION | _MLP | {"input_layernorm": "D"}, {"attention_bias": _QKVO}, windows=4, kinds=True,
        defaults=_COHERE | {"sliding_window": 4096},
    ),
    "starcoder2": Layout(
        _ATTENTION | _NORMS | {"mlp.c_fc": "ID", "mlp.c_proj": "DI"},
        {"use_bias": (*_QKVO, "mlp.c_fc", "mlp.c_proj"), "": _LAYER_NORMS}, windows="all",
        defaults=_BARE | {
            "vocab_size": 49152, "intermediate_size": 12288, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "use_bias": True, "sliding_window": None,
        },
    ),
    "stablelm": Layout(
        _LLAMA, {"use_qkv_bias": _QKV, "": _LAYER_NORMS},
        defaults=_BARE | {
            "vocab_size": 50304, "intermediate_size": 6912, "num_key_value_heads": 32, "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.25,
        },
    ),
    "phi": Layout(
        {name: _ATTENTION[name] for name in _QKV} | _PHI, {"": (*_QKV, *_PHI, "norm", "lm_head")},
        defaults=_BARE | {
            "vocab_size": 51200, "intermediate_size": 8192, "num_key_value_heads": None,
            "max_position_embeddings": 2048, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5,
        },
    ),
    "gpt_neox": Layout(
        _NEOX_ATTENTION | _NEOX_MLP | _NORMS,
        {"attention_bias": tuple(_NEOX_ATTENTION), "": (*_NEOX_MLP, *_LAYER_NORMS)},
        defaults=_BARE | {
            "vocab_size": 50432, "intermediate_size": 24576, "max_position_embeddings": 2048, "hidden_act": "gelu",
            "attention_bias": True, "rotary_pct": 0.25,
        },
    ),
    "minimax_m2": Layout(
        _ATTENTION | _NORMS | _NORM_OF_ALL
        | {"block_sparse_moe.gate": "ND", "block_sparse_moe.e_score_correction_bias": "N"},
        experts=("num_local_experts", "intermediate_size"),
        defaults=_USUAL | {
            "vocab_size": 200064, "intermediate_size": 1536, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 196608, "num_local_experts": 256, "rope_theta": 5000000.0,
        },
    ),
}  # fmt: skip
