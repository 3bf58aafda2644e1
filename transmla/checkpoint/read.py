"""Open a model folder or a GGUF file: config and headers first, tensors one at a time when asked for.

Headers are read without torch.
"""

from __future__ import annotations

import codecs
import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmla.checkpoint.bin_file import BinStore
from transmla.checkpoint.destination import clear_finished
from transmla.checkpoint.fp8 import Fp8Store, block_size
from transmla.checkpoint.gguf.read import GgufStore
from transmla.checkpoint.language_model import Whole, language_model
from transmla.checkpoint.resolve import EMBEDDED_MODELS, local
from transmla.checkpoint.safetensors_file import SafetensorsStore
from transmla.checkpoint.store import (
    FLOAT_DTYPES,
    RenamedStore,
    TensorInfo,
    WeightStore,
    broken_tensor,
    first_few,
    parsed_json,
)
from transmla.errors import SourceError, UnsupportedError
from transmla.recipe import list_recipes

if TYPE_CHECKING:
    import torch

# the first that exists is taken, in the order in which transformers looks
_WEIGHT_FILES = (
    ("model.safetensors", "safetensors"),
    ("model.safetensors.index.json", "safetensors"),
    ("pytorch_model.bin", "bin"),
    ("pytorch_model.bin.index.json", "bin"),
)


# of config.json; real ones have some kilobytes
MOST_CONFIG_BYTES = 2**24
# generous limits of what a config may say; other values are judged by geometry.py
_MOST = {
    "num_hidden_layers": 2**10, "hidden_size": 2**20, "intermediate_size": 2**22, "vocab_size": 2**26,
    "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16, "max_position_embeddings": 2**40,
    "num_experts": 2**16, "num_local_experts": 2**16, "n_routed_experts": 2**16, "moe_intermediate_size": 2**22,
}  # fmt: skip


class Source:
    """A checkpoint of which only config and headers have been read."""

    path: Path  # the folder, or the .gguf file
    format: str  # "safetensors", "bin" or "gguf"
    config: dict[str, Any]  # the parsed config.json, of a multimodal model that of its language model
    config_where: str  # where it is, for messages
    tensors: Mapping[str, TensorInfo]  # by Hugging Face names, for GGUF too
    whole: Whole | None  # the multimodal model that this is the language model of
    # per pair of dimensions, dividing the frequency; the llama3 scaling of a GGUF file, else None
    rope_frequency_factors: list[float] | None

    def __init__(self, path: Path, format: str, config: dict[str, Any], config_where: str, store: WeightStore) -> None:
        config, store, self.whole = language_model(config, store)
        self.path, self.format, self.config, self.config_where = path, format, config, config_where
        self.tensors = store.tensors
        self.rope_frequency_factors = getattr(store, "rope_frequency_factors", None)
        self._store = store

    def read(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        check_finite: bool = True,
    ) -> torch.Tensor:
        """A tensor in memory of its own, in `dtype` (default: as stored; GGUF blocks: float32)."""
        import torch

        self._check_readable(name)
        stored = self._store.view(name)
        wanted = dtype or stored.dtype
        if torch.device(device).type == "cpu":
            tensor = stored.to(dtype=wanted, copy=True).contiguous()
        else:  # moved before it is cast: narrow numbers cross the bus
            tensor = stored.to(device=device).to(dtype=wanted).contiguous()
        return self._finite(name, stored, tensor) if check_finite else tensor

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """The rows `index` of a matrix, as stored; of a large embedding only these are read."""
        self._check_readable(name)
        # indexing copies, so the result does not hold on to the file
        rows = self._store.view_rows(name, index.cpu())
        return self._finite(name, rows, rows)

    def rename(self, stored: Mapping[str, str]) -> None:
        """From now on, tensors have these names; stored: new name -> name until now, which a new one may be as well"""
        self._store = RenamedStore(self._store, stored)
        self.tensors = self._store.tensors

    def announce(self, names: Iterable[str]) -> None:
        """Tell the operating system that these tensors are read soon: the disk works ahead, this process holds nothing.

        An advice: formats that do not say where a tensor lies, and systems that do not take it, do without.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        places: dict[Path, list[TensorInfo]] = {}
        for name in names:
            if name in self.tensors and self.tensors[name].offset is not None:
                places.setdefault(self._where(name), []).append(self.tensors[name])
        for path, infos in places.items():
            with contextlib.suppress(OSError), path.open("rb") as file:
                for info in infos:
                    os.posix_fadvise(file.fileno(), info.offset or 0, info.num_bytes, os.POSIX_FADV_WILLNEED)

    def require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `SourceError` unless all these tensors are there with these shapes and a dtype of weights."""
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise self._unfit("tensors are missing", first_few(missing))
        shapes = {name: tuple(self.tensors[name].shape) for name in expected}
        wrong = [
            f"{name} is {list(shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if shapes[name] != tuple(shape)
        ]
        if wrong:
            raise self._unfit("tensors have other shapes than the config says", first_few(wrong))
        for name in expected:
            self._check_readable(name)

    @property
    def dtype(self) -> str:
        """Of the weights: as the config says, or the first of them where it does not."""
        named = [self.config.get(key) for key in ("dtype", "torch_dtype")]
        stored = [info.dtype for info in self.tensors.values()]
        return next(name for name in (*named, *stored, "float32") if name in FLOAT_DTYPES)

    def files(self) -> list[Path]:
        """The weight files, for hashing."""
        return self._store.files()

    def _where(self, name: str) -> Path:
        return self.path if self.path.is_file() else self.path / self.tensors[name].file

    def _check_readable(self, name: str) -> None:
        if name not in self.tensors:
            raise self._unfit("tensors are missing", name)
        dtype = self.tensors[name].dtype
        if dtype not in FLOAT_DTYPES:
            why = f"its dtype is {dtype}; weights are read as {', '.join(FLOAT_DTYPES)}"
            raise broken_tensor(self._where(name), name, why, "pass a checkpoint that is not quantised")

    def _finite(self, name: str, stored: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        if not _is_finite(stored):
            why = "it contains NaN or infinity"
            raise broken_tensor(self._where(name), name, why, "download the file again, or use another checkpoint")
        if tensor.dtype != stored.dtype and not _is_finite(tensor):
            why = f"its values exceed the range of {str(tensor.dtype).removeprefix('torch.')}"
            raise broken_tensor(self._where(name), name, why, "use bfloat16 or float32 (--dtype)")
        return tensor

    def _unfit(self, what: str, why: str) -> SourceError:
        remedy = "check that the checkpoint is complete and belongs to its config"
        return SourceError(what, where=str(self.path), why=why, remedy=remedy)


def open_source(path: Path, *, sizes_only: bool = False) -> Source:
    """Read config and headers of a model folder or a .gguf file; `SourceError` if that is not possible.

    sizes_only: the config of a .gguf file may be less than transformers would make of it; see `GgufStore`
    """
    found = local(str(path))
    if found is None and str(path) in (*EMBEDDED_MODELS, *list_recipes()):
        why = f"there is no such folder; {path} is the name of a source, which is not converted yet"
        raise _not_a_model(path, why, f"transmla convert {path}, then pass the folder that it writes")
    if found is None:
        raise _not_a_model(
            path, "no such file" if path.suffix.lower() == ".gguf" else "no such folder", "check the path"
        )
    path = found
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise _not_a_model(path, "it is a file, but not a .gguf file", "pass a model folder or a .gguf file")
        store = GgufStore(path, sizes_only=sizes_only)
        return Source(path, "gguf", store.config, f"{path} (metadata)", store)
    clear_finished(path)
    weights, format = _weights_in(path)
    config = read_config(path / "config.json")
    opened: WeightStore = SafetensorsStore(weights) if format == "safetensors" else BinStore(weights)
    if (block := block_size(config)) is not None:
        opened = Fp8Store(opened, block)
    return Source(path, format, config, str(path / "config.json"), opened)


def _weights_in(folder: Path) -> tuple[Path, str]:
    for name, format in _WEIGHT_FILES:
        if (folder / name).is_file():
            _refuse_adapter_beside(folder)
            return folder / name, format
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        why = f"it has no safetensors, but {'one GGUF file' if len(ggufs) == 1 else 'GGUF files'}: {names}"
        raise _not_a_model(folder, why, f"pass the file itself: {ggufs[0]}")
    if (folder / "adapter_config.json").is_file():
        raise _not_a_model(folder, "it holds an adapter, not a model", "merge the adapter into its base model first")
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    why = f"none of {', '.join(name for name, _ in _WEIGHT_FILES)}" + (f"; found {first_few(found)}" if found else "")
    raise _not_a_model(folder, why, "pass the folder that holds config.json and the weights")


def _refuse_adapter_beside(folder: Path) -> None:
    """Which model a folder with weights and an adapter is depends on whether peft is installed."""
    if (folder / "adapter_config.json").is_file():
        raise SourceError(
            "the folder holds a model and an adapter",
            where=str(folder / "adapter_config.json"),
            why="where peft is installed transformers adds the adapter to the weights, elsewhere it does not",
            remedy="merge the adapter (merge_and_unload of peft) and save the model in another folder; or, if it is "
            "merged already or not wanted, pass a copy of the folder without adapter_config.json",
        )


def read_config(path: Path) -> dict[str, Any]:
    """The parsed config.json; an error for a file that is none."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_CONFIG_BYTES + 1)
        if content.startswith(codecs.BOM_UTF8):
            why = "it begins with a byte order mark, which transformers does not read"
            raise _not_a_model(path, why, "save it as UTF-8 without one")
        config = parsed_json(content, MOST_CONFIG_BYTES)
    except OSError as error:
        raise _not_a_model(path, error.strerror or str(error), "pass a folder that holds config.json") from error
    except ValueError as error:
        raise _not_a_model(path, f"not JSON: {error}", "download the file again") from error
    if not isinstance(config, dict):
        raise _not_a_model(path, f"it holds a {type(config).__name__}, not an object", "download the file again")
    _check_sizes(config, path)
    return config


def _check_sizes(config: dict[str, Any], path: Path) -> None:
    """Refuse sizes that no model has, before a class tries to make that many modules; also of parts of the model."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, path)
        elif key in _MOST and isinstance(value, int | float) and not 0 <= value <= _MOST[key]:
            raise _not_a_model(path, f"{key} is {value!r:.40}", f"download the file again; at most {_MOST[key]:,}")


def refuse_quantised(source: Source) -> None:
    """`UnsupportedError` for a checkpoint whose weights are packed in a way that is not undone here."""
    quantization = source.config.get("quantization_config")
    if quantization and block_size(source.config) is None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(
            "a quantised checkpoint cannot be converted",
            where=source.config_where,
            why=f"its weights are packed ({method or 'unnamed'}); directions of the cache come from real matrices",
            remedy="dequantise it first, or pass the checkpoint it was made from",
        )


def _not_a_model(path: Path, why: str, remedy: str) -> SourceError:
    return SourceError("this is not a model that can be read", where=str(path), why=why, remedy=remedy)


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    # NaN passes through minimum and maximum; unlike isfinite, no mask as large as the tensor is made
    lowest, highest = tensor.aminmax()
    return bool(lowest.isfinite()) and bool(highest.isfinite())
