"""Bytes of the tensors that are alive while something runs, by reference counts: the same on every machine."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the memory of what operations return, until the last tensor in it is gone; what an operation holds within
    itself is not seen. `now` and `peak` are in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, int] = {}  # tensors in each piece of memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        older = {one.untyped_storage().data_ptr() for one in given} - self._held.keys()
        returned = func(*args, **(kwargs or {}))
        for one in tree_leaves(returned):
            if isinstance(one, torch.Tensor) and all(one is not other for other in given):
                self._see(one, older)
        return returned

    def _see(self, tensor: torch.Tensor, older: set[int]) -> None:
        """older: memory that was there before"""
        memory = tensor.untyped_storage()
        place, num_bytes = memory.data_ptr(), memory.nbytes()
        if place in older or not num_bytes:
            return
        if place not in self._held:
            self._held[place] = 0
            self.now += num_bytes
            self.peak = max(self.peak, self.now)
        self._held[place] += 1
        weakref.finalize(tensor, self._gone, place, num_bytes)

    def _gone(self, place: int, num_bytes: int) -> None:
        self._held[place] -= 1
        if not self._held[place]:
            del self._held[place]
            self.now -= num_bytes
