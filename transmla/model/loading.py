"""Load models: a converted folder with the packaged class, a source with its own. Code in a folder is never run."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.provenance import FILE_NAME
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.resolve import resolve
from transmla.devices import usable
from transmla.errors import SourceError, UnsupportedError
from transmla.model.modeling_transmla import DeepseekV3ForCausalLM, UnfoldedConfig, UnfoldedForCausalLM
from transmla.recipe import Recipe, find_recipe, load_recipe

# wherever this package is imported, Auto classes know the unfolded form without code from its folder
AutoConfig.register(UnfoldedConfig.model_type, UnfoldedConfig, exist_ok=True)
AutoModelForCausalLM.register(UnfoldedConfig, UnfoldedForCausalLM, exist_ok=True)


def load(model: str | Path, *, dtype: Any = "auto", device: Any = "cpu", **kwargs: Any) -> DeepseekV3ForCausalLM:
    """The converted model in `model`, ready for inference.

    dtype:  a torch dtype or its name; "auto" keeps what the folder holds
    device: where the model goes; with `device_map` among `kwargs` that decides instead
    kwargs: passed on to `from_pretrained`; attn_implementation is "sdpa" unless given
    """
    folder = Path(model)
    if "device_map" not in kwargs:
        device = usable(device)
    model_class = UnfoldedForCausalLM if _checked_type(folder) == UnfoldedConfig.model_type else DeepseekV3ForCausalLM
    kwargs.setdefault("attn_implementation", "sdpa")
    loaded: DeepseekV3ForCausalLM = model_class.from_pretrained(
        str(folder), dtype=dtype, local_files_only=True, **kwargs
    )
    if "device_map" not in kwargs:
        loaded.to(device)
    # from_pretrained leaves the model in evaluation mode
    return loaded


def load_source(source: Source, *, dtype: Any = "auto", device: Any = "cpu") -> Any:
    """The source model itself, as transformers loads it; GGUF files are dequantised, with their rotary scaling."""
    device = usable(device)
    if source.format != "gguf":
        model = AutoModelForCausalLM.from_pretrained(str(source.path), dtype=dtype, local_files_only=True)
        return model.to(device).eval()
    model = AutoModelForCausalLM.from_pretrained(
        str(source.path.parent), gguf_file=source.path.name, dtype=dtype, local_files_only=True
    )
    if source.rope_frequency_factors is not None:  # transformers leaves these out
        inv_freq = model.model.rotary_emb.inv_freq
        inv_freq /= torch.tensor(source.rope_frequency_factors)
    return model.to(device).eval()


def load_any(name: str | Path, *, dtype: Any = "auto", device: Any = "cpu") -> Any:
    """A converted folder through `load`, anything else as a source: folder, .gguf, hub id, recipe or embedded name."""
    if is_converted(Path(name)):
        return load(name, dtype=dtype, device=device)
    return load_source(open_model(str(name)), dtype=dtype, device=device)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a converted folder or a source."""
    return tokenizer(open_source(Path(name)) if is_converted(Path(name)) else open_model(str(name)))


def open_model(name: str) -> Source:
    """Resolve a path, recipe, embedded name or hub id, and open it."""
    recipe = None if Path(name).exists() else find_recipe(name)
    found = load_recipe(recipe) if recipe is not None else Recipe(source=name)
    return open_source(resolve(found.source or name, found.revision).path)


def is_converted(folder: Path) -> bool:
    """Whether `transmla convert` wrote this folder."""
    return (folder / FILE_NAME).is_file()


def _checked_type(folder: Path) -> str:
    """model_type of a converted folder, folded or not."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(
            "the converted model was not found",
            where=str(path),
            why="there is no such file" if folder.is_dir() else "there is no such folder",
            remedy="give the folder that `transmla convert` wrote",
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(
            "the config of the converted model cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            remedy="convert again, or restore the file",
        ) from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    known = model_type in ("deepseek_v3", UnfoldedConfig.model_type)
    if not known or not config.get("kv_lora_rank"):
        fact = "it has no kv_lora_rank" if known else f"model_type is {model_type!r}"
        raise UnsupportedError(
            "this is not a converted model",
            where=str(path),
            why=f"{fact}; a converted model is a deepseek_v3 with a kv_lora_rank",
            remedy="convert it first: transmla convert SRC OUT",
        )
    return str(model_type)
