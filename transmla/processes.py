"""Several processes that work on one conversion: each takes some of the windows, and process 0 writes the result.

They are started by `accelerate launch -m transmla convert ...` or torchrun. Without a launcher there is one process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from transmla.devices import usable
from transmla.errors import TransmlaError

# how long processes wait for each other; process 0 may sample text, or write and verify a large model, in the meantime
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as seen from one of them.

    rank: number of this process, 0 .. size - 1; process 0 writes files and reports progress
    size: number of processes
    """

    rank: int = 0
    size: int = 1
    _objects: Any = None  # a group that passes objects through host memory: as bytes on GPUs they would fill these

    @classmethod
    def current(cls, device: str) -> Processes:
        """The processes that the launcher has started, according to the environment variables that it sets.

        device: "cpu" or a GPU. If there are several processes, this joins their process group (gloo for the CPU).
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        objects = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        atexit.register(_leave, objects)
        return cls(state.process_index, state.num_processes, objects)

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process. Of several processes on GPUs, each takes another GPU.

        name: "cpu", "cuda" or, with one process, "cuda:1" and the like

        Raises `TransmlaError` if the device cannot be used, or does not support float64, which the conversion needs,
        or if all processes would take the same GPU.
        """
        if name.startswith("cuda:") and self.size > 1:
            raise TransmlaError(
                "several processes cannot share one GPU",
                where=f"--device {name}",
                why=f"the launcher has started {self.size} processes, and each needs a GPU of its own",
                remedy="use --device cuda, which assigns a GPU to each process; CUDA_VISIBLE_DEVICES selects the GPUs",
            )
        if name == "cuda" and self.size > 1:
            name = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        return usable(name, torch.float64)

    def mine(self, num_windows: int) -> list[int]:
        """Indices of the windows that this process works on: rank, rank + size, ..."""
        return list(range(self.rank, num_windows, self.size))

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over all processes, in place; all processes have to call this with the same shapes."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def gather(self, values: dict[int, Any]) -> dict[int, Any]:
        """The union of the dicts of all processes, sorted by key."""
        parts: list[Any] = [values]
        if self.size > 1:
            parts = [None] * self.size
            torch.distributed.all_gather_object(parts, values, group=self._objects)
        return dict(sorted((key, value) for part in parts for key, value in part.items()))

    def from_first(self, value: Any) -> Any:
        """The value that process 0 has passed, in every process; any object that can be pickled."""
        if self.size > 1:
            broadcast = [value]
            torch.distributed.broadcast_object_list(broadcast, src=0, group=self._objects)
            value = broadcast[0]
        return value

    def tensors_from_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that process 0 has passed, in every process, on the CPU; one after the other, since several of
        them as one object would be several times as large in every process while they are on their way."""
        if self.size == 1:
            return tensors
        forms = self.from_first({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        found = (
            tensors if self.first else {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in forms.items()}
        )
        for tensor in found.values():
            if tensor.numel():  # as bytes, since gloo does not know every dtype
                torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=self._objects)
        return found

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            torch.distributed.barrier()


def _leave(group: Any) -> None:
    """End the threads of gloo's groups before the interpreter does: it would abort now and then, all work done."""
    with contextlib.suppress(RuntimeError, ValueError, AssertionError):  # gone already, or lost with another process
        torch.distributed.destroy_process_group(group)
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()


# a run without a launcher
ALONE = Processes()
