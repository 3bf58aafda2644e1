"""Adam on converted attention weights, windows dealt to processes, the same steps whatever their number.

Legend: see transmla/maths/__init__.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transmla.conversion.levels import TOKENS_ELSEWHERE, TOKENS_ON_GPU, Descent
from transmla.maths.attention import MlaWeights
from transmla.processes import Processes
from transmla.train.adam import RelativeAdam

TRAINED = ("q_nope_HnD", "q_rope_HeD", "kv_down_rD", "k_rope_eD", "k_up_Hnr", "v_up_Hvr", "o_DHv", "q_down_qD")
WARMUP = 0.1


def tokens_per_pass(device: torch.device) -> int:
    """Tokens that go forward and backward together."""
    return TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ELSEWHERE


def trainable(mla: MlaWeights, device: torch.device) -> MlaWeights:
    """A float32 copy on the device whose weights take gradients."""
    moved = mla.to(dtype=torch.float32, device=device)
    return _replaced(moved, lambda leaf: leaf.detach().clone().requires_grad_())


def detached(mla: MlaWeights) -> MlaWeights:
    """The weights without gradients, sharing memory."""
    return _replaced(mla, lambda leaf: leaf.detach())


def _replaced(mla: MlaWeights, change: Callable[[Tensor], Tensor]) -> MlaWeights:
    """The weights with all that is trained changed."""
    changed = {name: change(leaf) for name, leaf in _trained(mla)}
    encoder = None
    if mla.encoder is not None:
        encoder = {name: changed.pop(name, value) for name, value in mla.encoder.items()}
    fields: dict[str, Any] = changed
    return replace(mla, **fields, encoder=encoder)


def leaves(weights: Sequence[MlaWeights]) -> list[Tensor]:
    """All trained tensors, layer by layer."""
    return [leaf for mla in weights for _, leaf in _trained(mla)]


def _trained(mla: MlaWeights) -> list[tuple[str, Tensor]]:
    """Trained tensors by name: those of `TRAINED` that there are, and the matrices of an encoder. Norms and biases are
    few and stay."""
    names = [name for name in TRAINED if getattr(mla, name) is not None and (name != "q_nope_HnD" or not mla.encoder)]
    found = [(name, getattr(mla, name)) for name in names]
    return found + [(name, value) for name, value in (mla.encoder or {}).items() if value.dim() > 1]


class Descender:
    """Adam with a step size relative to each matrix, warmed up and annealed; can be saved and restored."""

    def __init__(self, weights: Sequence[MlaWeights], descent: Descent, num_windows: int, processes: Processes) -> None:
        self.descent, self.processes = descent, processes
        self.num_windows, self.batch = num_windows, min(descent.batch, num_windows)
        self.num_steps = descent.num_steps(num_windows)
        self.done = 0
        # mean loss of every step so far, before the step
        self.losses: list[float] = []
        self._leaves = leaves(weights)
        self._adam = RelativeAdam(self._leaves, lr=descent.rate, each="matrix")

    def steps(self, loss_of: Callable[[list[int]], Tensor], places: dict[int, int], at_once: int) -> Iterator[float]:
        """Take the remaining steps and yield the mean loss of each, before the step.

        Ends early at a loss or a gradient that is not finite, since a step on it would ruin every weight.

        loss_of: places of windows of this process -> sum of their losses
        places:  place here by index of the window, for the windows that this process holds
        """
        for indices in _batches(self.num_windows, self.batch, self.num_steps)[self.done :]:
            here = [places[index] for index in indices if index in places]
            total = torch.zeros((), device=self._leaves[0].device)
            for start in range(0, len(here), at_once):
                with torch.enable_grad():
                    loss = loss_of(here[start : start + at_once]) / len(indices)
                loss.backward()
                total += loss.detach()
            self.processes.sum_((total,))
            if not math.isfinite(float(total)) or not self._step():
                return
            self.losses.append(float(total))
            yield self.losses[-1]

    def _step(self) -> bool:
        """False: no step was taken, since a gradient is not finite."""
        for leaf in self._leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        gradients = [leaf.grad for leaf in self._leaves if leaf.grad is not None]
        self.processes.sum_(gradients)
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            return False
        for group in self._adam.param_groups:
            group["lr"] = self.descent.rate * _annealed(self.done, self.num_steps)
        self._adam.step()
        self._adam.zero_grad()
        self.done += 1
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on, as tensors and plain values."""
        tensors: dict[str, Tensor] = {}
        held = [self._adam.state[leaf] for leaf in self._leaves]
        for place, (leaf, one) in enumerate(zip(self._leaves, held, strict=True)):
            tensors |= {f"{place}.weight": leaf, f"{place}.m": one["exp_avg"], f"{place}.v": one["exp_avg_sq"]}
        return tensors, {"done": self.done, "sizes": [one["size"] for one in held], "losses": self.losses}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.done, self.losses = int(values["done"]), list(values["losses"])
        with torch.no_grad():
            for place, (leaf, size) in enumerate(zip(self._leaves, values["sizes"], strict=True)):
                leaf.copy_(tensors[f"{place}.weight"])
                self._adam.state[leaf] = {
                    "step": torch.tensor(float(self.done), device=leaf.device),
                    "size": float(size),
                    "exp_avg": tensors[f"{place}.m"].to(leaf),
                    "exp_avg_sq": tensors[f"{place}.v"].to(leaf),
                }


def _annealed(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    warm = max(1, round(WARMUP * num_steps))
    return min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))


def _batches(num_windows: int, batch: int, num_steps: int) -> list[list[int]]:
    """Indices of windows for each step.

    Column c of the windows (index % batch) feeds place c of every batch, so that processes that hold every size-th
    window have equal shares; the order within a column changes with each pass.
    """
    columns = [list(range(column, num_windows, batch)) for column in range(batch)]
    generator = torch.Generator().manual_seed(0)
    found: list[list[int]] = []
    while len(found) < num_steps:
        orders = [[column[k] for k in torch.randperm(len(column), generator=generator)] for column in columns]
        found += [list(step) for step in zip(*orders, strict=False)]
    return found[:num_steps]
