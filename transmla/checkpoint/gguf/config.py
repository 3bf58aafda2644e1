"""The config.json that a GGUF file stands for: transformers' reading of it, and what that leaves out."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmla.checkpoint.store import TensorInfo
from transmla.errors import SourceError, UnsupportedError
from transmla.families import FAMILIES, Family, has_rotary_kinds
from transmla.layouts import LAYOUTS

if TYPE_CHECKING:
    from gguf import GGUFReader

# names and paths of the machine that reads, and what describes the blocks that are about to be dequantised
_NOT_OF_THE_MODEL = ("_name_or_path", "_model_name_or_path", "quantization_config")
# of Gemma 3, whose scores are scaled by hidden size over heads, not by the width of a head
_LAYERS_OF_27B = 62


# metadata -> its name in config.json
_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_NEEDED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def family_of_gguf(reader: "GGUFReader", path: Path) -> Family:
    """The first row of FAMILIES with the architecture of the file; mistral and llama share one."""
    architecture = _field(reader, "general.architecture")
    num_files = int(_field(reader, "split.count") or 1)
    if num_files > 1:
        raise SourceError(
            "the GGUF file is one part of several",
            where=str(path),
            why=f"split.count is {num_files}",
            remedy="join the parts with `llama-gguf-split --merge` and pass the result",
        )
    for family in FAMILIES.values():
        if family.gguf_architecture == architecture:
            return family
    raise unsupported_gguf(path, f"its architecture is {architecture!r}")


def unsupported_gguf(path: Path, why: str) -> UnsupportedError:
    known = ", ".join(sorted({family.gguf_architecture for family in FAMILIES.values() if family.gguf_architecture}))
    return UnsupportedError(
        "this GGUF model cannot be converted",
        where=str(path),
        why=why,
        remedy=f"known GGUF architectures: {known}, without experts; or pass the original safetensors folder",
    )


def sizes_of_gguf(reader: "GGUFReader", path: Path, family: Family) -> dict[str, Any] | None:
    """As much of the same config as the metadata says by itself; None where that is not enough."""
    layout, architecture = LAYOUTS.get(family.model_type), family.gguf_architecture
    if layout is None:
        return None
    found = {ours: _field(reader, f"{architecture}.{theirs}") for theirs, ours in _SIZES.items()}
    if isinstance(layout.windows, int):
        found["sliding_window"] = _field(reader, f"{architecture}.attention.sliding_window")
    # a model of this name is read as one of another family
    if _field(reader, "general.name") in ("mistral", None) and family.gguf_interleaved:
        return None
    if any(type(found[key]) is not int for key in _NEEDED):
        return None
    config = {key: value for key, value in found.items() if value is not None} | {"model_type": family.model_type}
    if layout.rotary_kinds and _linear_factor(reader, path, family) is not None:
        return None
    return _with_scaling(config, reader, path, family)


def config_of_gguf(reader: "GGUFReader", path: Path, family: Family) -> dict[str, Any]:
    """transformers' config of the file, and the rope scaling that transformers does not read."""
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
        config["num_attention_heads"], config["num_key_value_heads"] = (
            int(config[key]) for key in ("num_attention_heads", "num_key_value_heads")
        )
    except Exception as error:  # whatever transformers does with metadata that it does not expect
        raise SourceError(
            "the metadata of the GGUF file does not describe a model",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            remedy="convert from the original safetensors folder",
        ) from error
    config = _with_scaling(config, reader, path, family)
    if family.model_type == "gemma3_text" and config["num_hidden_layers"] == _LAYERS_OF_27B:
        # which the file does not say; llama.cpp knows it by the number of layers, too
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    return {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL and value is not None}


def _with_scaling(config: dict[str, Any], reader: "GGUFReader", path: Path, family: Family) -> dict[str, Any]:
    factor = _linear_factor(reader, path, family)
    if factor is not None:
        plain = config.get("rope_parameters") or {"rope_theta": config.pop("rope_theta", 10000.0)}
        scaled = {"rope_type": "linear", "factor": factor}
        if has_rotary_kinds(config):  # layers with a window turn as they did before the context was stretched
            config["rope_parameters"] = {**plain, "full_attention": plain["full_attention"] | scaled}
        else:
            config["rope_parameters"] = plain | scaled
    return config


def _linear_factor(reader: "GGUFReader", path: Path, family: Family) -> float | None:
    """By what positions are divided; None if they are not. The type is linear where none is named, as for llama.cpp,
    and older files have another key."""
    keys = (f"{family.gguf_architecture}.rope.{key}" for key in ("scaling.factor", "scale_linear"))
    # 0 is none as well
    factor = next((float(found) for key in keys if (found := _field(reader, key))), None)
    named = _field(reader, f"{family.gguf_architecture}.rope.scaling.type")
    if named not in ("none", "linear", None):
        raise unsupported_gguf(path, f"its rope scaling is {named!r}, whose numbers GGUF keeps only in part")
    return factor if factor != 1 and named != "none" else None


def correct_from_tensors(config: dict[str, Any], tensors: Mapping[str, TensorInfo], family: Family) -> None:
    """Set what the tensors know better than the metadata: vocabulary, head size, tying and biases."""
    if (embeddings := f"{family.embed_tokens}.weight") in tensors:
        config["vocab_size"] = tensors[embeddings].shape[0]
    queries = f"{family.layers}.0.self_attn.q_proj.weight"
    if queries in tensors:
        config["head_dim"] = tensors[queries].shape[0] // config["num_attention_heads"]
    config["tie_word_embeddings"] = f"{family.lm_head}.weight" not in tensors
    # llama.cpp adds whatever biases it finds; in a config.json they must be announced
    biases = [name for name in tensors if name.endswith(".bias")]
    for key, part in (("attention_bias", "self_attn."), ("mlp_bias", "mlp.")):
        if family.model_type != "qwen2" and any(part in name for name in biases):
            config[key] = True


def _field(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field else None
