"""Load models: converted folders with the class of this package, sources with their own class.

Code that lies in a folder is never run.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FineGrainedFP8Config,
)

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.fp8 import block_size
from transmla.checkpoint.language_model import PREFIXES
from transmla.checkpoint.provenance import FILE_NAME
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.resolve import local, resolve
from transmla.checkpoint.store import source_errors
from transmla.devices import usable
from transmla.errors import SourceError, UnsupportedError
from transmla.model.modeling_transmla import (
    DeepseekV3ForCausalLM,
    TransmlaConfig,
    TransmlaForCausalLM,
    TransmlaForSequenceClassification,
    TransmlaModel,
    UnfoldedConfig,
    UnfoldedForCausalLM,
)
from transmla.model.skeleton import complete_config, corrections, source_config, strays
from transmla.recipe import Recipe, find_recipe, load_recipe

# model_type -> class of a converted folder
CONVERTED: dict[str, Any] = {
    "deepseek_v3": DeepseekV3ForCausalLM,
    UnfoldedConfig.model_type: UnfoldedForCausalLM,
    TransmlaConfig.model_type: TransmlaForCausalLM,
}


def register() -> None:
    """Make the Auto classes of transformers load the forms of this package, without running code from a folder.

    `load` and whatever else loads a model has done it already. `import transmla` alone has not: it imports neither
    torch nor transformers.
    """
    for config, model in ((UnfoldedConfig, UnfoldedForCausalLM), (TransmlaConfig, TransmlaForCausalLM)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
    AutoModel.register(TransmlaConfig, TransmlaModel, exist_ok=True)
    AutoModelForSequenceClassification.register(TransmlaConfig, TransmlaForSequenceClassification, exist_ok=True)


register()


def load(model: str | Path, *, dtype: Any = "auto", device: Any = "cpu", **kwargs: Any) -> Any:
    """The converted model in the folder `model`, in evaluation mode.

    dtype:  a torch dtype or its name; "auto" keeps the dtype of the weights
    device: where the model is put; ignored if `kwargs` has a `device_map`
    kwargs: passed on to `from_pretrained`; attn_implementation is "sdpa" by default

    Raises `SourceError` if the folder does not exist or a file of it cannot be read, `UnsupportedError` if it is not a
    converted model, and `TransmlaError` if the device is not available.
    """
    folder = local(str(model)) or Path(model)
    if "device_map" not in kwargs:
        device = usable(device)
    model_class = CONVERTED[converted_type(folder)]
    kwargs.setdefault("attn_implementation", "sdpa")
    with source_errors(folder):
        loaded = model_class.from_pretrained(str(folder), dtype=dtype, local_files_only=True, **kwargs)
    if "device_map" not in kwargs:
        loaded.to(device)
    # from_pretrained leaves the model in evaluation mode
    return loaded


def load_source(source: Source, *, dtype: Any = "auto", device: Any = "cpu") -> Any:
    """The source model as transformers loads it, in evaluation mode.

    Weights of 8-bit floats and GGUF files are dequantised, and the rotary scaling that they store is applied.
    """
    device = usable(device)
    # never the code of a folder, and no question whether to run it
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "trust_remote_code": False}
    with loadable(source):
        if complete_config(source.config).get("attn_logit_softcapping"):
            # transformers 5.19 loads Gemma 2 with sdpa, which has no cap
            options["attn_implementation"] = "eager"
    if block_size(source.config) is not None:
        # on GPUs that have 8-bit floats transformers would keep them, round activations as well, and want kernels
        settings = {**source.config["quantization_config"], "dequantize": True}
        options["quantization_config"] = FineGrainedFP8Config.from_dict(settings)
    if source.format != "gguf":
        with loadable(source):
            if source.whole is not None or corrections(source.config) or strays(source.config):
                options["config"] = source_config(source.config)
                if "quantization_config" in options:  # or the codes of the floats would be taken for weights
                    options["config"].quantization_config = source.config["quantization_config"]
            if source.whole is not None:
                options["key_mapping"] = {f"^{re.escape(inside)}": alone for inside, alone in PREFIXES}
            model = AutoModelForCausalLM.from_pretrained(str(source.path), **options)
        if "quantization_config" in options:  # undone in another dtype than that of the rest
            loaded: Any = model
            model = loaded.to(loaded.get_input_embeddings().weight.dtype if dtype == "auto" else as_dtype(dtype))
        return model.to(device).eval()
    with loadable(source):
        options |= {"config": source_config(source.config), "gguf_file": source.path.name}
        model = AutoModelForCausalLM.from_pretrained(str(source.path.parent), **options)
    if source.rope_frequency_factors is not None:  # transformers ignores these
        inv_freq = model.model.rotary_emb.inv_freq
        inv_freq /= torch.tensor(source.rope_frequency_factors)
    return model.to(device).eval()


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype, given itself or by its name."""
    found: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return found


@contextmanager
def loadable(source: Source) -> Iterator[None]:
    """`SourceError` for what libraries say of files that they cannot use."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
        raise SourceError(
            "the source cannot be loaded",
            where=str(source.path),
            why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            remedy="check it with `transmla plan`; code that lies in a folder is never run",
        ) from error


def load_any(name: str | Path, *, dtype: Any = "auto", device: Any = "cpu") -> Any:
    """The converted model or source called `name`, in evaluation mode.

    name: a converted folder, or a source: folder, .gguf file, hub id, recipe or embedded model
    """
    if is_converted(Path(name)):
        return load(name, dtype=dtype, device=device)
    return load_source(open_model(str(name)), dtype=dtype, device=device)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a converted folder or a source."""
    return tokenizer(open_source(Path(name)) if is_converted(Path(name)) else open_model(str(name)))


def open_model(name: str) -> Source:
    """The opened checkpoint of the source called `name`: a folder, .gguf file, recipe, embedded model or hub id.

    Raises `SourceError` if it is not found or cannot be read, and `RecipeError` if the recipe is invalid.
    """
    recipe = None if local(name) is not None else find_recipe(name)
    settings = load_recipe(recipe) if recipe is not None else Recipe(source=name)
    return open_source(resolve(settings.source or name, settings.revision).path)


def is_converted(folder: Path) -> bool:
    """Whether `transmla convert` has written this folder, judged by its provenance file."""
    found = local(str(folder))
    try:
        return found is not None and (found / FILE_NAME).is_file()
    except OSError:  # in a folder that may not be read
        return False


def converted_type(folder: Path) -> str:
    """The model_type of a converted folder; raises `SourceError` or `UnsupportedError` if it is not one."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(
            "the converted model was not found",
            where=str(path),
            why="the file does not exist" if folder.is_dir() else "the folder does not exist",
            remedy="pass a folder that `transmla convert` has written",
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(
            "the config of the converted model cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            remedy="convert again, or restore the file",
        ) from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    is_known = model_type in CONVERTED
    if not is_known or not config.get("kv_lora_rank"):
        fact = "it has no kv_lora_rank" if is_known else f"model_type is {model_type!r}"
        raise UnsupportedError(
            "this is not a converted model",
            where=str(path),
            why=f"{fact}; a converted model has model_type 'deepseek_v3' or 'transmla' and a kv_lora_rank",
            remedy="convert it first: transmla convert SRC OUT",
        )
    return str(model_type)
