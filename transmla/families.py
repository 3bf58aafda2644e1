"""The table of model families: one row for each, with its peculiarities as data and the reasons for them.

A family is a `model_type` of a Hugging Face config. To add one, add a row here and a random model to tests/families.py;
code elsewhere reads the row and never checks for a model by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transmla.errors import UnsupportedError

# of embeddings, residuals and logits, in the configs of some families; classes of others pass over them
MULTIPLIERS = (
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "final_logit_softcapping",
)
# the second is how the first configs of Phi-3 call it
LONG_ROPE = ("longrope", "su")


@dataclass(frozen=True)
class Family:
    """One row of the table: where things are, and what the modules themselves do not tell.

    model_type:   as in config.json
    gguf_architecture: general.architecture in GGUF files; None: GGUF files of the family are not read
    gguf_interleaved: whether these store rows of q and k interleaved (pairs 2m, 2m + 1)
    gguf_norm_offset: what these add to the weights of norms
    embed_tokens, norm, lm_head, layers: names of modules in the model and of their tensors in the checkpoint
    attention, o_proj: names of modules in a layer, and in its attention
    rotary:       layout of the pairs that turn together: "half" (m, m + d / 2) or "interleaved" (2m, 2m + 1)
    unrotated:    layers without rotary embeddings: "no_rope_layers", where that list of the config has a 0, or
                  "full_attention", the layers of that type; None: no layer
    embedding_scale: "sqrt": embeddings are multiplied with the root of hidden_size
    output_norm:  name of the norm in a layer that the output of its attention goes through, before it is added to the
                  residual stream; None: it is added as it is, or a multiple of it
    experts:      gate, up and down of an expert by their names in the checkpoint, inside a layer, with `{}` for the
                  number of the expert; the class holds those of all experts in two tensors
    renamed:      other tensors of a layer whose name in the checkpoint is not that in the class: in the class -> there
    obstacles:    what stock deepseek_v3 cannot express of any model of the family
    """

    model_type: str
    gguf_architecture: str | None = None
    gguf_interleaved: bool = False
    gguf_norm_offset: float = 0.0
    embed_tokens: str = "model.embed_tokens"
    norm: str = "model.norm"
    lm_head: str = "lm_head"
    layers: str = "model.layers"
    attention: str = "self_attn"
    o_proj: str = "o_proj"
    rotary: str = "half"
    unrotated: str | None = None
    embedding_scale: str | None = None
    output_norm: str | None = None
    # supported rope types; those whose frequencies depend on the length of the text are taken as `fixed_rotary` says
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic", *LONG_ROPE)
    experts: tuple[str, ...] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    obstacles: tuple[str, ...] = ()


_SANDWICH = "norms behind attention and MLP"
_ONE_PLUS_NORM = "norms that multiply with 1 + weight"
_LAYER_NORM = "LayerNorm"
_PARALLEL = "attention and MLP side by side"
_EXPERTS = "experts that are chosen by a softmax"
_QWEN_EXPERTS = tuple(f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down"))
_MIXTRAL_EXPERTS = tuple(f"block_sparse_moe.experts.{{}}.{name}.weight" for name in ("w1", "w3", "w2"))
# the norm that Gemma and OLMo call so is behind the attention
_BEHIND = "post_attention_layernorm"

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        # Llama 1 to 3.2, SmolLM2, TinyLlama, Yi, DeepSeek-LLM, Falcon 3 and other models with this model_type
        Family("llama", gguf_architecture="llama", gguf_interleaved=True),
        # Mistral 7B, Nemo, Small. deepseek_v3 has no sliding window, so a sliding window limits the context of the
        # converted model; within it, full and sliding attention are the same function.
        Family("mistral", gguf_architecture="llama", gguf_interleaved=True),
        # Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen: biases on q, k and v
        Family("qwen2", gguf_architecture="qwen2"),
        # a norm on the queries and keys of each head
        Family("qwen3", gguf_architecture="qwen3"),
        Family("qwen3_moe", experts=_QWEN_EXPERTS, obstacles=(_EXPERTS,)),
        Family(
            "mixtral",
            experts=_MIXTRAL_EXPERTS,
            renamed={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
            obstacles=(_EXPERTS,),
        ),
        # a norm on the queries and keys of all heads together; half of each head turns
        Family(
            "minimax_m2",
            experts=_MIXTRAL_EXPERTS,
            renamed={
                "mlp.gate.weight": "block_sparse_moe.gate.weight",
                "mlp.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias",
            },
            obstacles=("experts without groups",),
        ),
        Family(
            "gemma3_text", gguf_architecture="gemma3", gguf_norm_offset=1.0, embedding_scale="sqrt",
            output_norm=_BEHIND, obstacles=(_SANDWICH, _ONE_PLUS_NORM),
        ),
        Family("gemma2", embedding_scale="sqrt", output_norm=_BEHIND, obstacles=(_SANDWICH, _ONE_PLUS_NORM)),
        Family("gemma", embedding_scale="sqrt", obstacles=(_ONE_PLUS_NORM,)),
        # a norm on the queries and keys of all heads together, none before attention and MLP
        Family("olmo2", output_norm=_BEHIND, obstacles=(_SANDWICH,)),
        Family("olmo3", output_norm=_BEHIND, obstacles=(_SANDWICH,)),
        # its class takes every type but these for longrope
        Family("phi3", rope_types=("default", "dynamic", *LONG_ROPE)),
        Family("granite"),
        Family("smollm3", unrotated="no_rope_layers"),
        Family("ministral"),
        Family("cohere", rotary="interleaved", obstacles=(_LAYER_NORM, _PARALLEL)),
        Family("cohere2", rotary="interleaved", unrotated="full_attention", obstacles=(_LAYER_NORM, _PARALLEL)),
        Family("glm4", rotary="interleaved", output_norm="post_self_attn_layernorm", obstacles=(_SANDWICH,)),
        Family("starcoder2", obstacles=(_LAYER_NORM, "an MLP without a gate")),
        Family("stablelm", obstacles=(_LAYER_NORM,)),
        Family("phi", norm="model.final_layernorm", o_proj="dense", obstacles=(_LAYER_NORM, _PARALLEL)),
        Family(
            "gpt_neox", embed_tokens="gpt_neox.embed_in", norm="gpt_neox.final_layer_norm", lm_head="embed_out",
            layers="gpt_neox.layers", attention="attention", o_proj="dense", obstacles=(_LAYER_NORM,),
        ),
    )
}  # fmt: skip

# keys that each rope type needs besides rope_theta
_ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}

# These have latent attention already.
MLA_MODEL_TYPES = frozenset(
    {
        "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k3", "minicpm3", "longcat_flash", "glm_moe_dsa",
        "glm4_moe_lite", "youtu",
    }
)  # fmt: skip

# These have learned or additive positions, and no rotary embeddings.
NON_ROTARY_MODEL_TYPES = frozenset({"gpt2", "gpt_neo", "gpt_bigcode", "opt", "bloom", "mpt", "biogpt", "xglm"})

_LINEAR = "most of its layers are linear attention, which keeps a state and caches no keys and values"
_MAMBA = "most of its layers are state-space models, which cache no keys and values"
# Known, and known not to fit: model_type -> what stands in the way.
REFUSED = {
    "gpt_oss": "its attention has learned sinks, which are part of every softmax",
    "qwen3_next": _LINEAR, "qwen3_5": _LINEAR, "qwen3_5_moe": _LINEAR, "qwen3_6": _LINEAR, "kimi_linear": _LINEAR,
    "minimax": _LINEAR, "lfm2": "most of its layers are convolutions, which cache no keys and values",
    "nemotron_h": _MAMBA, "jamba": _MAMBA, "bamba": _MAMBA, "falcon_h1": _MAMBA, "zamba2": _MAMBA,
    "granitemoehybrid": _MAMBA, "recurrent_gemma": "most of its layers are recurrent, and cache no keys and values",
    "llama4": "its attention is limited to chunks, and its queries are scaled by their position",
    "llama4_text": "its attention is limited to chunks, and its queries are scaled by their position",
    "mimo_v2_flash": "its layers with and without a window have keys of different widths, and sinks",
    "gemma4": "its global layers have keys and values of another width, and the two share a projection",
    "gemma4_text": "its global layers have keys and values of another width, and the two share a projection",
    "deepseek_v4": "its attention reads compressed blocks of tokens, and selects among them",
    "gemma3n": "its layers share keys and values with each other",
}  # fmt: skip


# Multimodal models whose language model, given text alone, computes what one of these families does; it is converted
# alone, see checkpoint/language_model.py. Around other families the whole scales or caps logits as the family does not.
WRAPPERS: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "mistral3": ("mistral",),
    "llava": ("llama", "mistral", "qwen2"),
    "llava_next": ("llama", "mistral", "qwen2"),
    "llava_onevision": ("qwen2",),
    "idefics3": ("llama",),
    "smolvlm": ("llama",),
    "internvl": ("llama", "qwen2", "qwen3"),
    "qwen3_vl": ("qwen3",),
}
# Their language models that have a name of their own -> the family that computes the same from text.
INNER = {"qwen3_vl_text": "qwen3"}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The row of the table for a parsed config.json.

    where: path of that file, for error messages

    Raises `UnsupportedError` for encoder-decoder and multimodal models, models with latent attention already, models
    that are known not to fit, models without rotary embeddings, unknown families, rotary settings that are not known or
    incomplete, and models whose tokens attend to later ones.
    """
    model_type = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(
            f"{model_type} is an encoder-decoder model",
            where=where,
            why="only the self-attention of decoder-only language models can be converted",
            remedy=f"use a decoder-only model; known families: {', '.join(sorted(FAMILIES))}",
        )
    inner = config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else {}
    if model_type in MLA_MODEL_TYPES or config.get("kv_lora_rank") or inner.get("kv_lora_rank"):
        raise UnsupportedError(
            f"{model_type} already uses multi-head latent attention",
            where=where,
            why=f"kv_lora_rank is {config.get('kv_lora_rank') or inner.get('kv_lora_rank')}",
            remedy="there is nothing to convert; use the model as it is",
        )
    if model_type in REFUSED:
        raise UnsupportedError(
            f"{model_type} cannot be converted",
            where=where,
            why=REFUSED[model_type],
            remedy=f"use a model of a known family: {', '.join(sorted(FAMILIES))}",
        )
    if inner and model_type not in FAMILIES:
        raise UnsupportedError(
            f"{model_type} is a multimodal model",
            where=where,
            why=f"its language model, {inner.get('model_type', 'of an unnamed type')}, is a part of it (text_config)",
            remedy=f"of {model_type} these language models are converted: {', '.join(WRAPPERS[model_type])}"
            if model_type in WRAPPERS
            else f"the language models of these are converted: {', '.join(sorted(WRAPPERS))}",
        )
    if model_type in NON_ROTARY_MODEL_TYPES:
        raise _without_rotary(model_type, where)
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"unknown model family {model_type!r}",
            where=where,
            why="transmla/families.py has no row for it, and guessing its structure could give a wrong model",
            remedy=f"use a model of a known family: {', '.join(sorted(FAMILIES))}; or add a row and a test model",
        )
    family = FAMILIES[model_type]
    _check_rotary(family, config, where)
    both_ways = model_type == "gemma3_text" and config.get("use_bidirectional_attention")
    if both_ways or config.get("is_causal") is False:
        raise UnsupportedError(
            "this model does not predict the next token",
            where=where,
            why="its tokens attend to later ones as well "
            f"({'use_bidirectional_attention' if both_ways else 'is_causal: false'}), so nothing of them can be cached",
            remedy="use a causal language model; models of embeddings have no cache that could be smaller",
        )
    return family


def has_rotary_kinds(config: Mapping[str, Any]) -> bool:
    """Whether layers of different types have rotary settings of their own."""
    settings = config.get("rope_parameters")
    return isinstance(settings, Mapping) and any(isinstance(value, Mapping) for value in settings.values())


def layer_kind(config: Mapping[str, Any], index: int) -> str | None:
    """The layer's entry in `layer_types`: "full_attention", "sliding_attention"; None if all layers are alike."""
    kinds = config.get("layer_types")
    return str(kinds[index]) if kinds else None


def rope_parameters(config: Mapping[str, Any], kind: str | None = None) -> dict[str, Any]:
    """The rotary settings of a config, with `rope_theta`, `rope_type` and what else the type needs.

    They are read from `rope_parameters` (transformers 5) or from the older `rope_theta` and `rope_scaling`.

    kind: the type of the layers that they are wanted of, where layers differ; see `layer_kind`
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if has_rotary_kinds(config):
        settings = settings.get(kind) or next(one for one in settings.values() if isinstance(one, Mapping))
    parameters = dict(settings) if isinstance(settings, Mapping) else {"rope_type": f"of {settings!r}"}
    parameters.setdefault("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", 10000.0)))
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    return parameters


def fixed_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config has to be another, so that its frequencies are the same for every length of the text: those of
    a text that fills the context. A key that is cached cannot turn otherwise when the text grows.

    dynamic:  it changes them behind `max_position_embeddings` alone, and so not within
    longrope: one factor per pair for texts up to `original_max_position_embeddings`, another for longer ones; the
              latter are for all texts, as where an engine serves the whole context
    """
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        settings = config.get(key)
        if isinstance(settings, Mapping):
            kinds = {kind: _fixed(config, one) for kind, one in settings.items() if isinstance(one, Mapping)}
            fixed = {**settings, **kinds} if kinds else _fixed(config, settings)
            if fixed != settings:
                found[key] = fixed
    return found


def _fixed(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    kind = settings.get("rope_type", settings.get("type"))
    if kind == "dynamic":
        plain = {key: value for key, value in settings.items() if key not in ("type", "factor")}
        return plain | {"rope_type": "default"}
    if kind in LONG_ROPE:
        short = (config.get("max_position_embeddings") or 0) <= _original_length(config, settings)
        chosen = settings.get("short_factor" if short else "long_factor")
        plain = {key: value for key, value in settings.items() if key != "type"}
        return plain | {"rope_type": "longrope", "short_factor": chosen, "long_factor": chosen}
    return dict(settings)


def _original_length(config: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """The context before it was stretched; 0 if it is not there. The class of Phi-3 does not look for it among the
    rotary settings."""
    key = "original_max_position_embeddings"
    found = config.get(key, None if config.get("model_type") == "phi3" else settings.get(key))
    return found if isinstance(found, int) else 0


def rotary_dim(config: Mapping[str, Any], head_dim: int) -> int:
    """How many values of a head turn, the first ones."""
    share = rope_parameters(config).get("partial_rotary_factor")
    share = config.get("partial_rotary_factor", config.get("rotary_pct")) if share is None else share
    return head_dim if share is None else int(head_dim * float(share))


def is_unrotated(family: Family, config: Mapping[str, Any], index: int) -> bool:
    """Whether a layer has no rotary embeddings."""
    if family.unrotated == "no_rope_layers":
        rotated = config.get("no_rope_layers") or ()
        return bool(rotated) and not rotated[index]
    return family.unrotated is not None and layer_kind(config, index) == family.unrotated


def _check_rotary(family: Family, config: Mapping[str, Any], where: str) -> None:
    """Raise `UnsupportedError` for rotary settings that cannot be converted or are incomplete."""
    settings = config["rope_parameters"] if has_rotary_kinds(config) else {}
    kinds = [kind for kind, one in settings.items() if isinstance(one, Mapping)] or [None]
    for parameters in (rope_parameters(config, kind) for kind in kinds):
        rope_type = parameters["rope_type"]
        if rope_type not in family.rope_types:
            raise UnsupportedError(
                f"rope_type {rope_type!r} cannot be converted",
                where=where,
                why="it is not known which frequencies these are, and whether they change with the length of the text",
                remedy=f"use a checkpoint with one of: {', '.join(family.rope_types)}",
            )
        missing = [key for key in _ROPE_KEYS.get(rope_type, ()) if not isinstance(parameters.get(key), int | float)]
        if rope_type in LONG_ROPE:
            missing = [key for key in ("short_factor", "long_factor") if not _are_positive(parameters.get(key))]
            if not _original_length(config, parameters):
                missing.append("original_max_position_embeddings")
            if not isinstance(config.get("max_position_embeddings"), int):
                missing.append("max_position_embeddings")
        if missing:
            raise UnsupportedError(
                f"rope_type {rope_type!r} is incomplete",
                where=where,
                why=f"missing, or not what it has to be: {', '.join(missing)}",
                remedy="restore the rotary settings from the original config.json",
            )


def _are_positive(values: Any) -> bool:
    """Whether these are numbers that one can divide by."""
    return isinstance(values, list) and all(isinstance(one, int | float) and one > 0 for one in values)


def _without_rotary(model_type: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"{model_type} has no rotary position embeddings",
        where=where,
        why="latent attention stores positions in a rotary key, which is made from the source's rotary keys",
        remedy=f"use a model with RoPE; known families: {', '.join(sorted(FAMILIES))}",
    )
