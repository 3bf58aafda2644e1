"""Checkpoints in 8-bit floats with a scale for each block of a matrix, as DeepSeek-V3 and Qwen3 are published.

X.weight is float8 e4m3, X.weight_scale_inv has one float for each block of `weight_block_size`, and the weight is their
product (DeepSeek-V3, 2412.19437, section 3.3), in float32 but for the rounding of that product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmla.checkpoint.store import TensorInfo, WeightStore, broken_tensor

if TYPE_CHECKING:
    import torch

# of the format: in the header of a file
FP8 = "f8_e4m3"
_SCALE = "_scale_inv"


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, if the config is that of such a checkpoint."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "fp8":
        return None
    size = settings.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(one, int) and one > 0 for one in size):
        return None
    return size[0], size[1]


class Fp8Store:
    """`WeightStore` of another one's tensors, scaled weights as float32."""

    def __init__(self, store: WeightStore, block: tuple[int, int]) -> None:
        """block: from `block_size`; raises `SourceError` for a weight without scales, or with too few of them"""
        self._store, self._block = store, block
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in store.tensors.items():
            if name.endswith(_SCALE) and name.removesuffix(_SCALE) in store.tensors:
                continue
            if info.dtype == FP8:
                self._check(name, info)
                info = replace(info, dtype="float32")
            self.tensors[name] = info

    def files(self) -> list[Path]:
        return self._store.files()

    def view(self, name: str) -> torch.Tensor:
        if self._store.tensors[name].dtype != FP8:
            return self._store.view(name)
        whole = self._store.view(name).float()
        scales = self._store.view(name + _SCALE).float()
        rows, columns = self._block
        for number, scale in enumerate(scales):
            whole[number * rows : (number + 1) * rows] *= scale.repeat_interleave(columns)[: whole.shape[1]]
        return whole

    def view_rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        if self._store.tensors[name].dtype != FP8:
            return self._store.view_rows(name, index)
        return self.view(name)[index]

    def _check(self, name: str, info: TensorInfo) -> None:
        scales = self._store.tensors.get(name + _SCALE)
        wanted = tuple(-(-size // block) for size, block in zip(info.shape, self._block, strict=False))
        if len(info.shape) != 2 or scales is None or scales.shape != wanted:
            why = f"it needs scales {name}{_SCALE} of shape {list(wanted)}, and " + (
                "there are none" if scales is None else f"they are {list(scales.shape)}"
            )
            folder = next((file.parent for file in self._store.files()), Path())
            raise broken_tensor(folder / info.file, name, why, "download the checkpoint again")
