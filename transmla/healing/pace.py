"""How fast a run trains, beside the floor of its matrix products at the rate at which the device multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from transmla.evaluation.roofline import product_rate, step_cost, wait


class Clock(TrainerCallback):
    """A Trainer callback that adds up the time of steps, without that of measuring and saving.

    tokens: step -> tokens trained on until then
    """

    def __init__(self, tokens: Callable[[int], int]) -> None:
        self._tokens, self._begun, self._step = tokens, 0.0, 0
        self.seconds, self.trained = 0.0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock when the device has done what came before."""
        wait(args.device)
        self._begun, self._step = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock when the device has done the step."""
        wait(args.device)
        self.seconds += time.perf_counter() - self._begun
        self.trained += self._tokens(state.global_step) - self._tokens(self._step)

    @property
    def rate(self) -> float:
        """Tokens per second of all processes together; 0.0 if this run did no step."""
        return self.trained / self.seconds if self.seconds else 0.0


def multiply_adds(student: Any, teacher: Any | None) -> float:
    """Of one token, in the products with weights: forward of both; backward through the student, which costs as much as
    its forward; and gradients of the weights that are trained. Scores of the attention are left out.

    teacher: None where its predictions are stored
    """
    trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    forward = step_cost(student, 1, 0, 0)[0]
    return 2 * forward + trained + (0.0 if teacher is None else step_cost(teacher, 1, 0, 0)[0])


def times_floor(clock: Clock, per_token: float, dtype: torch.dtype, device: torch.device, num_processes: int) -> float:
    """Seconds per token over what the products of it take at the device's own rate, best of five square ones."""
    if not clock.rate:
        return 0.0
    return num_processes / clock.rate / (per_token / product_rate(device, dtype))
