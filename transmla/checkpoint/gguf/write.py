"""Write one GGUF file: metadata, tokenizer, then tensors one at a time; quantised types through llama.cpp's own code.

The file appears under its name only when all of it is written.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType

from transmla.checkpoint.destination import check_destination, disk_errors, exclusive, sync
from transmla.checkpoint.gguf.types import OWN_TYPES
from transmla.checkpoint.gguf.vocab import GgufVocab, add_vocab
from transmla.checkpoint.read import Source
from transmla.errors import DestinationError, UnsupportedError, VerificationError

# what numpy writes here
_FORMATS = {name: GgmlType[name.upper()] for name in OWN_TYPES}
# relative error of a row in q8_0, which is 0.5 % for rows of ordinary size
MOST_ROUNDING = 0.02
QUANTISER = "llama-quantize"


class TensorEntry(Protocol):
    """One tensor: name and shape in the file, which tensor of the source it is made of, and how; small: its rows may
    be too small for the scales of blocks."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def small(self) -> bool: ...
    @property
    def make(self) -> Callable[[torch.Tensor], torch.Tensor]: ...


@dataclass(frozen=True)
class Quantiser:
    """llama.cpp's own, as a program or through its Python binding: run(given file, new file)."""

    name: str
    run: Callable[[Path, Path], None]


def write_gguf(
    source: Source,
    out: Path,
    architecture: str,
    settings: Mapping[str, int | float | bool | str],
    vocab: GgufVocab,
    tensors: Sequence[TensorEntry],
    type: str,
    quantiser: Quantiser | None,
    progress: Callable[[int, int, str], None],
) -> dict[str, str]:
    """Write `out`; type: one of OWN_TYPES, or of QUANTISER_TYPES with the quantiser that `find_quantiser` gave.

    Returns which tensors were written in another type than the wanted one because their rows are too small for it.
    Raises `DestinationError`, and `VerificationError` for a weight that the type cannot hold.
    """
    first = _FORMATS["f32" if quantiser is not None else type]
    size = sum(_num_bytes(entry.shape, first) for entry in tensors)
    check_gguf_destination(out, size if quantiser is None else 2 * size)
    kept = _too_small(source, tensors, type)
    types = {entry.name: _stored_type(entry.shape, first) for entry in tensors}

    def written(
        path: Path, file_type: gguf.LlamaFileType, stored: _Stored, tell: Callable[[int, int, str], None]
    ) -> None:
        writer = gguf.GGUFWriter(path, architecture)
        try:
            _add_settings(writer, {"general.file_type": int(file_type)} | dict(settings))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_vocab(writer, source.path, vocab)
            _write_tensors(writer, tensors, stored, tell)
        finally:
            writer.close()

    with exclusive(out) as folder, disk_errors(folder):
        made, quantised = folder / "made.gguf", folder / "quantised.gguf"
        if quantiser is None:
            written(made, _file_type(type), _Encoded(source, types | kept), progress)
        else:
            written(made, _file_type("f32"), _Encoded(source, types), progress)
            progress(len(tensors), len(tensors), quantiser.name)
            quantiser.run(made, quantised)
            if kept:  # the quantiser has no say in this, so its other tensors are copied
                made.unlink()
                copied = _Copied(gguf.GGUFReader(quantised), _Encoded(source, kept))
                written(made, _file_type(type), copied, lambda *_: None)
            else:
                quantised.replace(made)
        sync(made)
        check_gguf_destination(out)
        os.replace(made, out)
        sync(out.absolute().parent)
    return {name: type.name.lower() for name, type in kept.items()}


def _file_type(type: str) -> gguf.LlamaFileType:
    return gguf.LlamaFileType[f"{'ALL' if type == 'f32' else 'MOSTLY'}_{type.upper()}"]


class _Stored(Protocol):
    """Tensors as they stand in the file."""

    def form(self, entry: TensorEntry) -> tuple[tuple[int, ...], np.dtype[Any], int, GgmlType]:
        """numpy's shape and dtype, bytes, and the type."""

    def content(self, entry: TensorEntry) -> np.ndarray[Any, Any]: ...


@dataclass(frozen=True)
class _Encoded:
    """Made of the source's tensors; types: by the names of the file."""

    source: Source
    types: Mapping[str, GgmlType]

    def form(self, entry: TensorEntry) -> tuple[tuple[int, ...], np.dtype[Any], int, GgmlType]:
        type = self.types[entry.name]
        shape, dtype = _numpy_form(entry.shape, type)
        return shape, dtype, math.prod(shape) * dtype.itemsize, type

    def content(self, entry: TensorEntry) -> np.ndarray[Any, Any]:
        return _encode(_made(self.source, entry), self.types[entry.name], entry.name)


class _Copied:
    """As they stand in another file, but for those that `encoded` has a type for."""

    def __init__(self, reader: gguf.GGUFReader, encoded: _Encoded) -> None:
        self._tensors, self._encoded = {tensor.name: tensor for tensor in reader.tensors}, encoded

    def form(self, entry: TensorEntry) -> tuple[tuple[int, ...], np.dtype[Any], int, GgmlType]:
        if entry.name in self._encoded.types:
            return self._encoded.form(entry)
        tensor = self._tensors[entry.name]
        return tensor.data.shape, tensor.data.dtype, int(tensor.n_bytes), tensor.tensor_type

    def content(self, entry: TensorEntry) -> np.ndarray[Any, Any]:
        if entry.name in self._encoded.types:
            return self._encoded.content(entry)
        return self._tensors[entry.name].data


def check_gguf_destination(out: Path, needed_bytes: int = 0) -> None:
    """Raise `DestinationError` unless a new file of that size can be written to `out`, whose name says what it is."""
    if out.is_dir():
        raise DestinationError(
            "the destination is a folder",
            where=str(out),
            why="a GGUF model is one file",
            remedy=f"give the file a name: {out / 'model.gguf'}",
        )
    check_destination(out, needed_bytes)
    if out.suffix.lower() != ".gguf":
        raise DestinationError(
            "the file could not be read back",
            where=str(out),
            why="programs know a GGUF model by its name, which ends in .gguf",
            remedy=f"did you mean {out}.gguf? A folder for GPU kernels is written with --to vllm",
        )


def _add_settings(writer: gguf.GGUFWriter, settings: Mapping[str, int | float | bool | str]) -> None:
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in settings.items():
        kinds[type(value)](key, value)


def _write_tensors(
    writer: gguf.GGUFWriter,
    tensors: Sequence[TensorEntry],
    stored: _Stored,
    progress: Callable[[int, int, str], None],
) -> None:
    for entry in tensors:
        shape, dtype, num_bytes, type = stored.form(entry)
        writer.add_tensor_info(entry.name, shape, dtype, num_bytes, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, entry in enumerate(tensors):
        writer.write_tensor_data(stored.content(entry))
        progress(done + 1, len(tensors), entry.name)
    writer.close()


def _made(source: Source, entry: TensorEntry) -> torch.Tensor:
    return entry.make(source.read(entry.source, dtype=torch.float32)).contiguous()


def _too_small(source: Source, tensors: Sequence[TensorEntry], type: str) -> dict[str, GgmlType]:
    """Types for those tensors that a type with scales of blocks would destroy.

    The scales are float16, whose smallest number is 6e-8. Folded latent rows are about 2^-10 / sqrt(D): llama.cpp's own
    q6_k makes zeros of them from a hidden size of 1,024 on, q5_k and q4_k lose up to a quarter, q8_0 up to 6 %.
    """
    kept = {}
    for entry in tensors:
        if not entry.small or type in ("f32", "f16", "bf16"):
            continue
        rows = _made(source, entry).numpy()
        # narrower types fall back to blocks of 32 where rows have no blocks of 256
        wide = type not in OWN_TYPES and rows.shape[-1] % 256 == 0
        if wide or (rows.shape[-1] % 32 == 0 and _rounding(rows, GgmlType.Q8_0) > MOST_ROUNDING):
            half = _rounding(rows, GgmlType.F16)
            kept[entry.name] = GgmlType.F16 if half <= MOST_ROUNDING / 4 else GgmlType.F32
    return kept


def _rounding(rows: np.ndarray[Any, Any], type: GgmlType) -> float:
    """Relative error of the worst row; infinite where the type does not hold a value."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.linalg.norm(gguf.quants.dequantize(gguf.quants.quantize(rows, type), type) - rows, axis=-1)
    return float((error / np.maximum(np.linalg.norm(rows, axis=-1), 1e-30)).max())


def _encode(weight: torch.Tensor, type: GgmlType, name: str) -> np.ndarray[Any, Any]:
    largest = float(weight.abs().max())
    if type == GgmlType.F16 and largest > torch.finfo(torch.float16).max:
        raise VerificationError(
            "a weight does not fit into f16",
            where=name,
            why=f"its largest value is {largest:.3g}",
            remedy="use --type bf16 or q8_0",
        )
    return gguf.quants.quantize(weight.numpy(), type)


def _stored_type(shape: tuple[int, ...], wanted: GgmlType) -> GgmlType:
    """Vectors stay float32; rows that are not a multiple of a block become float16."""
    if len(shape) == 1:
        return GgmlType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else GgmlType.F16


def _numpy_form(shape: tuple[int, ...], type: GgmlType) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of what `gguf.quants.quantize` makes: bytes, but for float32 and float16."""
    if type in (GgmlType.F32, GgmlType.F16):
        return shape, np.dtype(np.float32 if type == GgmlType.F32 else np.float16)
    return gguf.quant_shape_to_byte_shape(shape, type), np.dtype(np.uint8)


def _num_bytes(shape: tuple[int, ...], wanted: GgmlType) -> int:
    """In the file, of a tensor that is to be stored as `wanted`."""
    stored, dtype = _numpy_form(shape, _stored_type(shape, wanted))
    return math.prod(stored) * dtype.itemsize


def find_quantiser(type: str) -> Quantiser | None:
    """None for OWN_TYPES; else `llama-quantize` on the PATH or the llama_cpp package, or `UnsupportedError`."""
    if type in OWN_TYPES:
        return None
    if program := shutil.which(QUANTISER):
        return Quantiser(QUANTISER, lambda given, out: _run_program([program, given, out, type], out))
    try:
        import llama_cpp
    except ImportError:
        raise UnsupportedError(
            f"type {type} needs llama.cpp's quantiser",
            where="--type",
            why=f"{QUANTISER} is not on the PATH and the Python package llama_cpp is not installed",
            remedy=f"install one of them (pip install llama-cpp-python), or use one of: {', '.join(OWN_TYPES)}",
        ) from None
    return Quantiser("llama_cpp", lambda given, out: _run_binding(llama_cpp, given, out, type))


def _run_program(command: Iterable[str | Path], out: Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise _quantiser_failed(out, (done.stderr.strip().splitlines() or ["no message"])[-1])


def _run_binding(llama_cpp: Any, given: Path, out: Path, type: str) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(gguf.LlamaFileType[f"MOSTLY_{type.upper()}"])
    if code := llama_cpp.llama_model_quantize(str(given).encode(), str(out).encode(), settings):
        raise _quantiser_failed(out, f"it returned {code}")


def _quantiser_failed(out: Path, why: str) -> DestinationError:
    return DestinationError(
        "llama.cpp could not quantise the file",
        where=str(out),
        why=why,
        remedy="check disk and memory, or export --type q8_0",
    )
