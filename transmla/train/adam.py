"""Adam whose steps are shares of what they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# of rows that have no size yet: of weights, and of new adapters, which start at nothing
LEAST, LEAST_OF_ADAPTERS = 1e-3, 0.02


class RelativeAdam(torch.optim.Optimizer):
    """Adam (1412.6980), each step times the root mean square of the row that it changes (as Adafactor does with whole
    matrices, 1804.04235, section 8).

    Rows of one matrix can be of very different sizes here: latent and rotary rows of kv_a_proj_with_mqa, keys and
    values of kv_b_proj. One rate then fits all of them, and models of all sizes. A vector is one row.

    params: groups may have `least`, the size of rows that are smaller;  lr: share of a row that a step may change
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-12, least: float = LEAST
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "least": least})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        first, second = group["betas"]
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        steps = float(state["step"])
        size = parameter.square().mean(-1, keepdim=True).sqrt_().clamp_min_(group["least"])
        update = mean / (square / (1 - second**steps)).sqrt_().add_(group["eps"])
        parameter.sub_(update * size, alpha=float(group["lr"]) / (1 - first**steps))
