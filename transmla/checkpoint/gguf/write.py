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

# what numpy writes here: the type of a tensor, and that of the file
_FORMATS = {
    name: (GgmlType[name.upper()], gguf.LlamaFileType[f"{'ALL' if name == 'f32' else 'MOSTLY'}_{name.upper()}"])
    for name in OWN_TYPES
}
QUANTISER = "llama-quantize"


class TensorEntry(Protocol):
    """One tensor: name and shape in the file, which tensor of the source it is made of, and how."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
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
) -> None:
    """Write `out`; type: one of OWN_TYPES, or of QUANTISER_TYPES with the quantiser that `find_quantiser` gave.

    Raises `DestinationError`, and `VerificationError` for a weight that the type cannot hold.
    """
    own_type, file_type = _FORMATS["f32" if quantiser is not None else type]
    size = sum(_num_bytes(entry.shape, own_type) for entry in tensors)
    check_gguf_destination(out, size if quantiser is None else 2 * size)
    with exclusive(out) as folder, disk_errors(folder):
        made, quantised = folder / "made.gguf", folder / "quantised.gguf"
        writer = gguf.GGUFWriter(made, architecture)
        try:
            _add_settings(writer, {"general.file_type": int(file_type)} | dict(settings))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_vocab(writer, source.path, vocab)
            _write_tensors(writer, source, tensors, own_type, progress)
            if quantiser is not None:
                progress(len(tensors), len(tensors), quantiser.name)
                quantiser.run(made, quantised)
                quantised.replace(made)
        finally:
            writer.close()
        sync(made)
        check_gguf_destination(out)
        os.replace(made, out)
        sync(out.absolute().parent)


def check_gguf_destination(out: Path, needed_bytes: int = 0) -> None:
    """Raise `DestinationError` unless a new file of that size can be written to `out`."""
    if out.is_dir():
        raise DestinationError(
            "the destination is a folder",
            where=str(out),
            why="a GGUF model is one file",
            remedy=f"give the file a name: {out / 'model.gguf'}",
        )
    check_destination(out, needed_bytes)


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
    source: Source,
    tensors: Sequence[TensorEntry],
    wanted: GgmlType,
    progress: Callable[[int, int, str], None],
) -> None:
    for entry in tensors:
        type = _stored_type(entry.shape, wanted)
        shape, dtype = _numpy_form(entry.shape, type)
        writer.add_tensor_info(entry.name, shape, dtype, _num_bytes(entry.shape, wanted), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, entry in enumerate(tensors):
        weight = entry.make(source.read(entry.source, dtype=torch.float32)).contiguous()
        writer.write_tensor_data(_encode(weight, _stored_type(entry.shape, wanted), entry.name))
        progress(done + 1, len(tensors), entry.name)
    writer.close()


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
