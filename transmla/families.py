"""The table of model families: one row each, every oddity as data with its reason.

A family is a `model_type` of a Hugging Face config. Adding one means adding a row here (and a lively
random model to tests/families.py); code elsewhere reads the row and never asks for a model by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transmla.errors import UnsupportedError


@dataclass(frozen=True)
class Required:
    """A config value without which the conversion would be wrong: `allowed` values and the reason."""

    allowed: tuple[Any, ...]
    why: str


# Why each is required: what a stock `deepseek_v3` implementation has no place for.
NO_ATTENTION_BIAS = Required((False, None), "no inference engine has a place for a bias on the queries")
NO_MLP_BIAS = Required((False, None), "stock deepseek_v3 has no bias in its MLP")
SILU = Required(("silu",), "engines hard-code SiLU for deepseek_v3")


@dataclass(frozen=True)
class Family:
    """One row. Names are templates of the safetensors keys; `{}` is the layer index."""

    model_type: str
    # "module:class" of the decoder layer: its norms and MLP run as they are, its attention is read.
    layer_class: str
    # general.architecture in GGUF files; there, rows of q and k are stored interleaved (pairs 2m, 2m+1).
    gguf_architecture: str
    embed_tokens: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    layer_prefix: str = "model.layers.{}."
    # rope types whose frequencies do not depend on the length of the text
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    requires: Mapping[str, Required] = field(default_factory=dict)


_LLAMA_LIKE = {"attention_bias": NO_ATTENTION_BIAS, "mlp_bias": NO_MLP_BIAS, "hidden_act": SILU}

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        # Llama 1, 2, 3, 3.1, 3.2, SmolLM2, TinyLlama, Yi, DeepSeek-LLM and whatever else calls itself llama
        Family(
            "llama",
            layer_class="transformers.models.llama.modeling_llama:LlamaDecoderLayer",
            gguf_architecture="llama",
            requires=_LLAMA_LIKE,
        ),
        # Mistral 7B, Nemo, Small. A sliding window caps the converted context: inside it, full and sliding
        # attention are the same function, and deepseek_v3 has no sliding window.
        Family(
            "mistral",
            layer_class="transformers.models.mistral.modeling_mistral:MistralDecoderLayer",
            gguf_architecture="llama",
            requires={"hidden_act": SILU},
        ),
    )
}

# what each rope type needs besides rope_theta
_ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}

# Already latent: nothing to convert.
MLA_MODEL_TYPES = frozenset({"deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "minicpm3", "longcat_flash"})

# Learned or additive positions: there is no rotary key to keep.
NON_ROTARY_MODEL_TYPES = frozenset({"gpt2", "gpt_neo", "gpt_bigcode", "opt", "bloom", "mpt", "biogpt", "xglm"})


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The row for a config.json, or an error that says why there is none.

    config: the parsed config.json
    where:  path of that file, for the message
    Raises `UnsupportedError` for encoder-decoder, already-MLA, non-rotary and unknown models, and for
    config values that the row forbids.
    """
    model_type = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(
            f"{model_type} is an encoder-decoder model",
            where=where,
            why="latent attention replaces the self-attention of a decoder-only language model",
            remedy=f"use a decoder-only model; known families: {', '.join(sorted(FAMILIES))}",
        )
    if model_type in MLA_MODEL_TYPES or config.get("kv_lora_rank"):
        raise UnsupportedError(
            f"{model_type} already uses multi-head latent attention",
            where=where,
            why=f"kv_lora_rank is {config.get('kv_lora_rank')}",
            remedy="nothing to convert; `transmla eval` and `transmla generate` take it as it is",
        )
    if model_type in NON_ROTARY_MODEL_TYPES:
        raise _without_rotary(model_type, where)
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"unknown model family {model_type!r}",
            where=where,
            why="the table in transmla/families.py has no row for it, and guessing would give a wrong model",
            remedy=f"known families: {', '.join(sorted(FAMILIES))}; a new family is one row and one test model",
        )
    family = FAMILIES[model_type]
    for key, required in family.requires.items():
        if key in config and config[key] not in required.allowed:
            raise UnsupportedError(
                f"{model_type} with {key} = {config[key]!r} cannot be converted",
                where=where,
                why=required.why,
                remedy=f"use a checkpoint with {key} = {required.allowed[0]!r}",
            )
    _check_rotary(family, config, where)
    return family


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, from it or from the older `rope_theta` + `rope_scaling`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parameters = dict(given) if isinstance(given, Mapping) else {"rope_type": f"of {given!r}"}
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    return parameters


def _check_rotary(family: Family, config: Mapping[str, Any], where: str) -> None:
    parameters = rope_parameters(config)
    rope_type = parameters["rope_type"]
    if rope_type not in family.rope_types:
        raise UnsupportedError(
            f"rope_type {rope_type!r} cannot be converted",
            where=where,
            why="its frequencies change with the length of the text; one fixed set is converted",
            remedy=f"use a checkpoint with one of: {', '.join(family.rope_types)}",
        )
    missing = [key for key in _ROPE_KEYS.get(rope_type, ()) if not isinstance(parameters.get(key), int | float)]
    if missing:
        raise UnsupportedError(
            f"rope_type {rope_type!r} is incomplete",
            where=where,
            why=f"missing or no number: {', '.join(missing)}",
            remedy="restore the rope settings of the original config.json",
        )
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (1.0, None):
        raise UnsupportedError(
            f"{family.model_type} with partial rotary embeddings cannot be converted",
            where=where,
            why="the row of this family describes full rotary heads",
            remedy="use a checkpoint with partial_rotary_factor = 1.0",
        )


def _without_rotary(model_type: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"{model_type} has no rotary position embeddings",
        where=where,
        why="the one cached rotary key of latent attention would have nothing to stand for",
        remedy=f"use a model with RoPE; known families: {', '.join(sorted(FAMILIES))}",
    )
