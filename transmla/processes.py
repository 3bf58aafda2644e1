"""Several processes on one conversion: calibration windows are dealt out, sums are reduced, one process writes.

Started by `accelerate launch -m transmla convert ...` or torchrun; a process that was started alone is all there is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from transmla.devices import usable
from transmla.errors import TransmlaError

# the others wait while process 0 samples text, or writes and verifies a large model
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """rank: of this process, 0 .. size - 1. Process 0 writes and speaks."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls, device: str) -> Processes:
        """What the launcher's environment says; joins the process group (gloo for the CPU) if there are several."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str) -> torch.device:
        """The device of this process, of several on GPUs each takes the next one; `TransmlaError` if it cannot be
        used for the conversion, which needs float64, or if all would take the same one."""
        if wanted.startswith("cuda:") and self.size > 1:
            raise TransmlaError(
                "one GPU cannot take several processes",
                where=f"--device {wanted}",
                why=f"the launcher has started {self.size}, and each needs a GPU of its own",
                remedy="use --device cuda, which deals them out; CUDA_VISIBLE_DEVICES says which ones",
            )
        if wanted == "cuda" and self.size > 1:
            wanted = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        return usable(wanted, torch.float64)

    def mine(self, num_windows: int) -> list[int]:
        """Indices of the windows that this process holds: every size-th."""
        return list(range(self.rank, num_windows, self.size))

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up each tensor over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def gather(self, values: dict[int, Any]) -> dict[int, Any]:
        """The union of what all processes hold, by key, sorted."""
        found: list[Any] = [values]
        if self.size > 1:
            found = [None] * self.size
            torch.distributed.all_gather_object(found, values)
        return dict(sorted((key, value) for part in found for key, value in part.items()))

    def from_first(self, value: Any) -> Any:
        """What process 0 holds, in all of them (any object that pickles between processes of one program)."""
        if self.size > 1:
            held = [value]
            torch.distributed.broadcast_object_list(held, src=0)
            value = held[0]
        return value

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


ALONE = Processes()
