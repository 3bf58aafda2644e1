"""Adam whose steps are shares of what they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# of rows that have no size yet: of weights, and of new adapters, which start at nothing
LEAST, LEAST_OF_ADAPTERS = 1e-3, 0.02


class RelativeAdam(torch.optim.Optimizer):
    """Adam (1412.6980), each step times the size of what it changes: the root mean square of a row or of a matrix (as
    in Adafactor, 1804.04235, section 8). One rate then fits matrices, and models, of all sizes. A vector is one row.

    params: groups may have `each`, "row": every row by its own size as it is now, for matrices whose rows are of very
            different sizes, as the latent and rotary rows of kv_a_proj_with_mqa; or "matrix": by the size that the
            matrix had at first. And `least`, the size of rows that are smaller
    lr:     share of its size that a step may change
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-12,
        each: str = "row",
        least: float = LEAST,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "each": each, "least": least})

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
        state = self._state_of(parameter, group["each"])
        rate = float(group["lr"])
        if group["each"] == "matrix":
            _adam(parameter, gradient, state, rate * float(state["size"]), group)
            return
        update = torch.zeros_like(parameter)
        _adam(update, gradient, state, 1.0, group)
        # not in place: of a vector that is sharded, the mean is a sum over processes until its root is taken
        size = parameter.square().mean(-1, keepdim=True).sqrt().clamp_min(group["least"])
        parameter.addcmul_(update, size.expand_as(parameter), value=rate)

    def _state_of(self, parameter: Tensor, each: str) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            if each == "matrix":
                state["size"] = float(parameter.square().mean().sqrt())
        elif state["step"].device != parameter.device:
            # load_state_dict moves the moments alone, and the Trainer reads them all to the CPU
            state["step"] = state["step"].to(parameter.device)
        return state


def _adam(parameter: Tensor, gradient: Tensor, state: dict[str, Any], rate: float, group: dict[str, Any]) -> None:
    """One step of ordinary Adam in place, moments and all in one pass over memory."""
    first, second = group["betas"]
    state["step"] += 1
    torch._fused_adam_(
        [parameter], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
        lr=rate, beta1=first, beta2=second, weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
