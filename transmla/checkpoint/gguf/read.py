"""GGUF, one file: dequantised tensor by tensor, with the names and the row order of Hugging Face.

Shape legend: H heads, P pairs of rotary dimensions per head (head_dim / 2), D columns
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transmla.checkpoint.gguf.config import (
    config_of_gguf,
    correct_from_tensors,
    family_of_gguf,
    sizes_of_gguf,
    unsupported_gguf,
)
from transmla.checkpoint.gguf.header import check_header
from transmla.checkpoint.store import REDOWNLOAD, TensorInfo, broken_file, broken_tensor, source_errors, understood
from transmla.errors import SourceError
from transmla.families import Family

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

# llama3 frequency scaling; GGUF has it as a tensor, a Hugging Face config as numbers
ROPE_FREQS = "rope_freqs.weight"

# inside a layer of every architecture that a row of FAMILIES names
_LAYER_MODULES = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    "self_attn.q_norm",
    "self_attn.k_norm",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True)
class _Blocks:
    """Where a tensor lies in the file, and in which encoding."""

    offset: int
    encoding: int  # gguf.GGMLQuantizationType
    shape_in_bytes: tuple[int, ...]
    num_heads_interleaved: int | None  # set for q and k, whose rows llama.cpp stores as pairs


class GgufStore:
    """`WeightStore` of a .gguf file, and the config that transformers makes of its metadata."""

    def __init__(self, path: Path, *, sizes_only: bool = False) -> None:
        """sizes_only: what the metadata says by itself is config enough, if that can be had without transformers"""
        self._path, self._sizes_only = path, sizes_only
        reader = open_gguf(path)
        with understood(f"{path} (metadata)"):
            self._describe(reader, path)

    def _describe(self, reader: GGUFReader, path: Path) -> None:
        self.family = family_of_gguf(reader, path)
        sizes = sizes_of_gguf(reader, path, self.family) if self._sizes_only else None
        self.config = sizes or config_of_gguf(reader, path, self.family)
        self._blocks: dict[str, _Blocks] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.rope_frequency_factors: list[float] | None = None
        names = _hugging_face_names(self.family, int(self.config["num_hidden_layers"]))
        for tensor in reader.tensors:
            if tensor.name == ROPE_FREQS:
                self.rope_frequency_factors = [float(factor) for factor in tensor.data]
            elif tensor.name in names:
                self._add(names[tensor.name], tensor)
            else:
                raise unsupported_gguf(path, f"tensor {tensor.name} has no place in {self.family.model_type}")
        correct_from_tensors(self.config, self.tensors, self.family)

    def files(self) -> list[Path]:
        return [self._path]

    def view(self, name: str) -> torch.Tensor:
        blocks = self._blocks[name]
        tensor = self._dequantised(name, self._mapped(blocks))
        if name.endswith("norm.weight") and self.family.gguf_norm_offset:
            return tensor - self.family.gguf_norm_offset
        if blocks.num_heads_interleaved is None:
            return tensor
        # stored as (H, P, 2, D), the two halves of a pair side by side; Hugging Face has (H, 2, P, D)
        w_HP2D = tensor.reshape(blocks.num_heads_interleaved, -1, 2, *tensor.shape[1:])
        return w_HP2D.transpose(1, 2).reshape(tensor.shape)

    def view_rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        if self._blocks[name].num_heads_interleaved is not None or len(self.tensors[name].shape) < 2:
            return self.view(name)[index]
        # blocks run along a row, so rows can be dequantised alone
        return self._dequantised(name, self._mapped(self._blocks[name])[index.numpy()])

    def _mapped(self, blocks: _Blocks) -> np.ndarray[Any, Any]:
        with source_errors(self._path), understood(str(self._path)):
            return np.memmap(self._path, np.uint8, mode="r", offset=blocks.offset, shape=blocks.shape_in_bytes)

    def _dequantised(self, name: str, data: np.ndarray[Any, Any]) -> torch.Tensor:
        import torch
        from gguf import GGMLQuantizationType, dequantize

        encoding = GGMLQuantizationType(self._blocks[name].encoding)
        dtype = getattr(torch, self.tensors[name].dtype)
        if encoding.name == "F64":
            return torch.from_numpy(np.array(data).view(np.float64))
        try:
            return torch.from_numpy(np.array(dequantize(data, encoding))).to(dtype)
        except NotImplementedError as error:
            # nothing is left to implement here: the gguf library raises this for encodings that it cannot decode, and
            # whoever made such a file has to choose another one
            remedy = "use a GGUF in F16, BF16, Q8_0 or a K-quant"
            raise broken_tensor(self._path, name, str(error), remedy) from error

    def _add(self, name: str, tensor: Any) -> None:
        encoding = tensor.tensor_type.name
        dtype = {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}.get(encoding, "float32")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if encoding.startswith("I") and encoding[1:].isdigit():
            dtype = f"int{encoding[1:]}"
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        self.tensors[name] = TensorInfo(shape, dtype, int(tensor.n_bytes), self._path.name, int(tensor.data_offset))
        self._blocks[name] = _Blocks(
            offset=int(tensor.data_offset),
            encoding=int(tensor.tensor_type),
            shape_in_bytes=(*shape[:-1], int(tensor.n_bytes) // max(1, int(np.prod(shape[:-1])))),
            num_heads_interleaved=int(self.config[heads]) if heads and self.family.gguf_interleaved else None,
        )


def open_gguf(path: Path) -> GGUFReader:
    """The reader of a file, headers read; `SourceError` if it is damaged."""
    from gguf import GGUFReader

    with source_errors(path), path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise broken_file(path, "it does not start with the letters GGUF", "pass a .gguf file or a model folder")
    try:
        check_header(path)
        reader = GGUFReader(path)
    except Exception as error:  # the reader checks no bounds: whatever a short or damaged file provokes
        why = f"truncated or damaged ({type(error).__name__}: {error})"
        raise SourceError("the GGUF file cannot be read", where=str(path), why=why, remedy=REDOWNLOAD) from error
    if reader.byte_order != "I":
        raise broken_file(path, "its bytes are in the order of another kind of processor", "convert it here again")
    return reader


def _hugging_face_names(family: Family, num_hidden_layers: int) -> dict[str, str]:
    """GGUF tensor name -> Hugging Face tensor name."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.gguf_architecture)
    gguf_names = get_tensor_name_map(architecture, num_hidden_layers)
    modules = [family.embed_tokens, family.norm, family.lm_head]
    for layer in range(num_hidden_layers):
        modules += [f"{family.layers}.{layer}.{module}" for module in _LAYER_MODULES]
    found: dict[str, str] = {}
    for module in modules:
        if (name := gguf_names.get_name(module)) is not None:
            for kind in ("weight", "bias"):
                # what two names of a family are called in the file is the first one's
                found.setdefault(f"{name}.{kind}", f"{module}.{kind}")
    return found
