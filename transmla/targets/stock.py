"""The stock form of a converted model: config.json, tensor names and shapes of a dense deepseek_v3 model.

Values that some engine depends on have a comment that says so. Everything follows from the source's config and the
target geometry, so it can be checked before anything is converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from transmla.families import Family
from transmla.geometry import MlaGeometry
from transmla.maths import EPS

ARCHITECTURE = "DeepseekV3ForCausalLM"
MODELING_FILE = "modeling_transmla.py"

# copied unchanged from the source's config
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "initializer_range", "attention_dropout",
)  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def obstacles(config: Mapping[str, Any], family: Family, *, encoded: bool) -> tuple[str, ...]:
    """What this form cannot express of a source; empty if it can express all of it.

    config:  its complete config, with the defaults of its class
    encoded: whether queries and keys go through norms
    """
    found = list(family.obstacles)
    if encoded:
        found.append("norms on queries and keys")
    if config.get("mlp_bias"):
        found.append("biases in the MLP")
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in (None, "silu", "swish"):
        found.append(f"an MLP with {activation}")
    if len(set(config.get("layer_types") or ())) > 1:
        found.append("layers with and without a window")
    if config.get("attn_logit_softcapping"):
        found.append("capped attention scores")
    if config.get("final_logit_softcapping"):
        found.append("capped logits")
    multipliers = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale")
    if any(config.get(key) not in (None, 1, 1.0) for key in multipliers):
        found.append("multipliers of embeddings, residuals or logits")
    return tuple(found)


def deepseek_v3_config(
    source: Mapping[str, Any], target: MlaGeometry, theta: float, max_position_embeddings: int, dtype: str
) -> dict[str, Any]:
    """config.json of the converted folder, as a dict.

    source:                  complete config of the source, with the defaults of its class
    target:                  geometry of the converted model
    theta:                   rope_theta of the converted model
    max_position_embeddings: longest context, in tokens
    dtype:                   of the weights: "float32", "bfloat16" or "float16"
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "deepseek_v3",
        # only used with trust_remote_code=True; otherwise the stock class is loaded
        "auto_map": {"AutoModelForCausalLM": f"modeling_transmla.{ARCHITECTURE}"},
    }
    config |= {key: source[key] for key in _KEPT if source.get(key) is not None}
    # the first LLaMA models have -1 for none; where there is no begin or end, null says so: left out, they would be the
    # first two tokens
    rows = range(source["vocab_size"])
    tokens = {key: ids if isinstance(ids := source.get(key), list) or ids in rows else None for key in _TOKENS}
    config |= {key: ids for key, ids in tokens.items() if ids is not None or key != "pad_token_id"}
    config |= {
        # vLLM and SGLang expect one key/value head per query head here, although only one latent is cached
        "num_key_value_heads": target.num_attention_heads,
        "q_lora_rank": target.stock_q_lora_rank,
        "kv_lora_rank": target.kv_lora_rank,
        "qk_rope_head_dim": target.qk_rope_head_dim,
        "qk_nope_head_dim": target.qk_nope_head_dim,
        "qk_head_dim": target.qk_nope_head_dim + target.qk_rope_head_dim,
        "v_head_dim": target.v_head_dim,
        "rms_norm_eps": EPS,
        "latent_norm_folded": True,
        # read by `transmla unfold`
        "unfolded_rms_norm_eps": float(source.get("rms_norm_eps", EPS)),
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": theta,
        "rope_interleave": True,
        # changes nothing, but avoids a wrong rotary kernel of vLLM on CPUs
        "rope_scaling": identity_yarn(max_position_embeddings),
        # of q_a_proj, kv_a_proj_with_mqa and o_proj; in no class of the form q_proj and q_b_proj have one
        "attention_bias": target.attention_bias,
        "tie_word_embeddings": False,
        # all layers are dense; n_routed_experts is an int >= 2, because vLLM adds to it and llama.cpp requires more
        # experts than groups
        "first_k_dense_replace": target.num_hidden_layers,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_intermediate_size": source["intermediate_size"],
        "moe_layer_freq": 1,
        # in float16, vLLM would rescale the residual stream by any other value
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if target.query_bias:
        # 0: without a latent. The form for training has no constant in it; read by `transmla unfold`
        config["unfolded_q_lora_rank"] = target.q_lora_rank or 0
    return config


def identity_yarn(max_position_embeddings: int) -> dict[str, Any]:
    """A `rope_scaling` that changes nothing: YaRN with factor 1 and equal mscales (YaRN, 2309.00071, section 3).

    max_position_embeddings: longest context, in tokens
    """
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": max_position_embeddings,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


def flat_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `rope_theta` and `rope_scaling`, which engines read.

    transformers merges both into `rope_parameters` when it saves a model.
    """
    if config.get("rope_parameters") is None:
        return {key: value for key, value in config.items() if key != "rope_parameters"}
    rotary = dict(config["rope_parameters"])
    # save_pretrained also adds head_dim, the rotary size, which an engine could mistake for the width of the heads
    flat = {key: value for key, value in config.items() if key not in ("rope_parameters", "head_dim")}
    return flat | {"rope_theta": rotary.pop("rope_theta"), "rope_scaling": {"type": rotary["rope_type"]} | rotary}


def modeling_source() -> str:
    """The source code of `MODELING_FILE`, which is copied into every converted folder."""
    return (resources.files("transmla.model") / MODELING_FILE).read_text("utf-8")


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a converted folder with this config.json, or of its form for training."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, rank, rope = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value, q_rank = config["qk_nope_head_dim"], config["v_head_dim"], config.get("q_lora_rank")
    queries: dict[str, tuple[int, ...]] = {"self_attn.q_proj.weight": (heads * (nope + rope), hidden)}
    if q_rank:
        queries = {
            "self_attn.q_a_proj.weight": (q_rank, hidden),
            "self_attn.q_a_layernorm.weight": (q_rank,),
            "self_attn.q_b_proj.weight": (heads * (nope + rope), q_rank),
        }
    layer = queries | {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), rank),
        "self_attn.o_proj.weight": (hidden, heads * value),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.get("attention_bias"):
        layer |= {"self_attn.kv_a_proj_with_mqa.bias": (rank + rope,), "self_attn.o_proj.bias": (hidden,)}
        layer |= {"self_attn.q_a_proj.bias": (q_rank,)} if q_rank else {}
    if config.get("query_bias"):  # of the form for training
        layer[f"self_attn.{'q_b_proj' if q_rank else 'q_proj'}.bias"] = (heads * (nope + rope),)
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return tensors | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
