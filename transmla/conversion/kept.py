"""The finished steps of a conversion, as its journal keeps them: layers by stage, blocks, and numbers.

Process 0 reads and writes; what it reads, all processes get.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.journal import Journal
from transmla.geometry import MlaGeometry
from transmla.maths.attention import MlaWeights
from transmla.processes import Processes

FITTED, DISTILLED = "fitted", "distilled"
# fields of `MlaWeights` that are numbers, and what stands before the names of its encoder's weights
_NUMBERS = ("scaling", "window", "softcap")
_ENCODER = "encoder."


@dataclass(frozen=True)
class KeptLayers:
    """The steps of one size; a journal may hold several, since `--latent auto` tries them.

    device: where weights go when they are read
    """

    journal: Journal
    sizes: MlaGeometry
    processes: Processes
    device: torch.device

    def of(self, sizes: MlaGeometry) -> KeptLayers:
        """The steps of another size in the same journal."""
        return replace(self, sizes=sizes)

    def load(self, step: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors on the CPU and values of a step, or None if it is not finished."""
        kept = self.journal.load(self._name(step)) if self.processes.first else None
        values: dict[str, Any] | None = self.processes.from_first(None if kept is None else kept[1])
        if values is None:
            return None
        return self.processes.tensors_from_first({} if kept is None else kept[0]), values

    def values(self, step: str) -> dict[str, Any] | None:
        """The values of a step alone, or None if it is not finished."""
        found: dict[str, Any] | None = self.processes.from_first(
            self.journal.values(self._name(step)) if self.processes.first else None
        )
        return found

    def save(self, step: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep a step; one of the same name is replaced."""
        if self.processes.first:
            self.journal.save(self._name(step), tensors or {}, values)

    def drop(self, step: str) -> None:
        """Forget a step; * in its name stands for anything."""
        if self.processes.first:
            self.journal.drop(self._name(step))

    def layer(self, index: int, stage: str) -> tuple[MlaWeights, dict[str, Any]] | None:
        """Weights of a layer on the device, and the values kept with them, or None."""
        kept = self.load(_layer(index, stage))
        return None if kept is None else (self._unpacked(kept[0]), kept[1])

    def layers(self, indices: Sequence[int], stage: str) -> list[MlaWeights]:
        """Weights of layers that are finished, on the device."""
        found = []
        for index in indices:
            kept = self.layer(index, stage)
            assert kept is not None, f"layer {index} is not {stage}"
            found.append(kept[0])
        return found

    def layer_values(self, index: int, stage: str) -> dict[str, Any] | None:
        """The values kept with a layer, or None."""
        return self.values(_layer(index, stage))

    def save_layer(self, index: int, stage: str, mla: MlaWeights, values: Mapping[str, Any]) -> None:
        """Keep a layer at a stage."""
        self.save(_layer(index, stage), values, _packed(mla))

    def forget_layers(self) -> None:
        """Drop all layers of this size, whatever their stage."""
        self.drop("layer-*")

    def _name(self, step: str) -> str:
        queries = f"-q{self.sizes.q_lora_rank}" if self.sizes.q_lora_rank else ""
        return f"{self.sizes.kv_lora_rank}-{self.sizes.qk_rope_head_dim}{queries}-{step}"

    def _unpacked(self, tensors: dict[str, Tensor]) -> MlaWeights:
        values: dict[str, Any] = {
            name: float(value) if name in _NUMBERS else value
            for name, value in tensors.items()
            if not name.startswith(_ENCODER)
        }
        if (window := values.get("window")) is not None:
            values["window"] = int(window)
        encoder = {name.removeprefix(_ENCODER): one for name, one in tensors.items() if name.startswith(_ENCODER)}
        return MlaWeights(**values, encoder=encoder or None).to(device=self.device)


def _layer(index: int, stage: str) -> str:
    return f"layer-{index:05d}-{stage}"


def _packed(mla: MlaWeights) -> dict[str, Tensor]:
    named = {field.name: getattr(mla, field.name) for field in fields(mla) if field.name != "encoder"}
    packed = {
        name: torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
        for name, value in named.items()
        if value is not None
    }
    return packed | {_ENCODER + name: value for name, value in (mla.encoder or {}).items()}
