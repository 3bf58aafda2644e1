"""The table of model families: one row for each, with its peculiarities as data and the reasons for them.

A family is a `model_type` of a Hugging Face config. To add one, add a row here and a random model to tests/families.py;
code elsewhere reads the row and never checks for a model by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transmla.errors import UnsupportedError


@dataclass(frozen=True)
class Required:
    """A requirement on a config value without which the conversion would be wrong.

    allowed: values that are accepted;  why: the reason, for the error message
    """

    allowed: tuple[Any, ...]
    why: str


# What stock implementations of deepseek_v3 cannot express.
NO_ATTENTION_BIAS = Required(
    (False, None), "inference engines do not support biases in the attention of a deepseek_v3 model"
)
NO_MLP_BIAS = Required((False, None), "the MLP of stock deepseek_v3 has no biases")
SILU = Required(("silu",), "engines hard-code SiLU for deepseek_v3")


@dataclass(frozen=True)
class Family:
    """One row of the table.

    model_type:   as in config.json
    layer_class:  "module:class" of the decoder layer; its norms and MLP are run, its attention is read as weights
    embed_tokens, norm, lm_head: names of tensors in the checkpoint
    layer_prefix: prefix of the names of a layer's tensors; `{}` is the index of the layer
    requires:     config keys that must have certain values, if they are present
    """

    model_type: str
    layer_class: str
    # general.architecture in GGUF files; they store rows of q and k interleaved (pairs 2m, 2m+1)
    gguf_architecture: str
    embed_tokens: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    layer_prefix: str = "model.layers.{}."
    # supported rope types: their frequencies do not depend on the length of the text
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    requires: Mapping[str, Required] = field(default_factory=dict)


_LLAMA_LIKE = {"attention_bias": NO_ATTENTION_BIAS, "mlp_bias": NO_MLP_BIAS, "hidden_act": SILU}

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        # Llama 1 to 3.2, SmolLM2, TinyLlama, Yi, DeepSeek-LLM and other models with this model_type
        Family(
            "llama",
            layer_class="transformers.models.llama.modeling_llama:LlamaDecoderLayer",
            gguf_architecture="llama",
            requires=_LLAMA_LIKE,
        ),
        # Mistral 7B, Nemo, Small. deepseek_v3 has no sliding window, so a sliding window limits the context of the
        # converted model; within it, full and sliding attention are the same function.
        Family(
            "mistral",
            layer_class="transformers.models.mistral.modeling_mistral:MistralDecoderLayer",
            gguf_architecture="llama",
            requires={"hidden_act": SILU},
        ),
    )
}

# keys that each rope type needs besides rope_theta
_ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}

# These have latent attention already.
MLA_MODEL_TYPES = frozenset({"deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "minicpm3", "longcat_flash"})

# These have learned or additive positions, and no rotary embeddings.
NON_ROTARY_MODEL_TYPES = frozenset({"gpt2", "gpt_neo", "gpt_bigcode", "opt", "bloom", "mpt", "biogpt", "xglm"})


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The row of the table for a parsed config.json.

    where: path of that file, for error messages

    Raises `UnsupportedError` for encoder-decoder models, models with latent attention already, models without rotary
    embeddings, unknown families, and config values that the row does not allow.
    """
    model_type = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(
            f"{model_type} is an encoder-decoder model",
            where=where,
            why="only the self-attention of decoder-only language models can be converted",
            remedy=f"use a decoder-only model; known families: {', '.join(sorted(FAMILIES))}",
        )
    if model_type in MLA_MODEL_TYPES or config.get("kv_lora_rank"):
        raise UnsupportedError(
            f"{model_type} already uses multi-head latent attention",
            where=where,
            why=f"kv_lora_rank is {config.get('kv_lora_rank')}",
            remedy="there is nothing to convert; use the model as it is",
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
    """The rotary settings of a config, with `rope_theta`, `rope_type` and what else the type needs.

    They are read from `rope_parameters` (transformers 5) or from the older `rope_theta` and `rope_scaling`.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parameters = dict(settings) if isinstance(settings, Mapping) else {"rope_type": f"of {settings!r}"}
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    return parameters


def _check_rotary(family: Family, config: Mapping[str, Any], where: str) -> None:
    """Raise `UnsupportedError` for rotary settings that cannot be converted or are incomplete."""
    parameters = rope_parameters(config)
    rope_type = parameters["rope_type"]
    if rope_type not in family.rope_types:
        raise UnsupportedError(
            f"rope_type {rope_type!r} cannot be converted",
            where=where,
            why="only fixed frequencies can be converted, and these may change with the length of the text",
            remedy=f"use a checkpoint with one of: {', '.join(family.rope_types)}",
        )
    missing = [key for key in _ROPE_KEYS.get(rope_type, ()) if not isinstance(parameters.get(key), int | float)]
    if missing:
        raise UnsupportedError(
            f"rope_type {rope_type!r} is incomplete",
            where=where,
            why=f"missing or not a number: {', '.join(missing)}",
            remedy="restore the rotary settings from the original config.json",
        )
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (1.0, None):
        raise UnsupportedError(
            f"{family.model_type} with partial rotary embeddings cannot be converted",
            where=where,
            why="this family is only supported with rotary embeddings on whole heads",
            remedy="use a checkpoint with partial_rotary_factor = 1.0",
        )


def _without_rotary(model_type: str, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"{model_type} has no rotary position embeddings",
        where=where,
        why="latent attention stores positions in a rotary key, which is made from the source's rotary keys",
        remedy=f"use a model with RoPE; known families: {', '.join(sorted(FAMILIES))}",
    )
