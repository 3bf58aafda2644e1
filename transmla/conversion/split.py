"""`--rope auto`: a fixed number of cached values, divided between latent and rotary key by measured error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transmla.conversion.run import Run
from transmla.conversion.theta import candidates, choose, survey
from transmla.families import rope_parameters, rotary_dim
from transmla.geometry import MlaGeometry


@dataclass(frozen=True)
class SplitTrial:
    """One division, and the error of the attention's output on held-out windows by surveyed layer.

    losses: with the rope_theta that suits this width best, where the form has one: see `theta.output_error`
    """

    kv_lora_rank: int
    qk_rope_head_dim: int
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean over layers."""
        return sum(self.losses) / len(self.losses)


def choose_split(run: Run) -> tuple[Run, tuple[SplitTrial, ...]]:
    """The run at the best of the planned divisions, and all that were measured, in the closed form on a few layers.

    The first one, which is the usual, has to be beaten clearly: see `theta.MARGIN`.
    """
    splits = [split.mla for split in run.plan.splits]
    if (kept := run.kept.values("split")) is not None:
        losses, chosen = kept["losses"], kept["chosen"]
    else:
        losses = _measured(run, splits)
        chosen = run.processes.from_first(choose(dict(enumerate(losses))))
        run.kept.save("split", {"losses": losses, "chosen": chosen})
    trials = tuple(
        SplitTrial(mla.kv_lora_rank, mla.qk_rope_head_dim, tuple(found))
        for mla, found in zip(splits, losses, strict=True)
    )
    return run.with_sizes(splits[chosen]), trials


def _measured(run: Run, splits: Sequence[MlaGeometry]) -> list[list[float]]:
    """Losses by surveyed layer of each division."""
    trials = [
        (place, (mla.kv_lora_rank, mla.qk_rope_head_dim), theta)
        for place, mla in enumerate(splits)
        for theta in _thetas(run, mla)
    ]
    found = survey(run, [(sizes, theta) for _, sizes, theta in trials], "choose rope width")
    losses = []
    for place in range(len(splits)):
        own = [one for (of, _, _), one in zip(trials, found, strict=True) if of == place]
        losses.append(min(own, key=sum))
    return losses


def _thetas(run: Run, mla: MlaGeometry) -> tuple[float | None, ...]:
    """What rope_theta may become; None in the own form, where every layer has the frequencies that suit it."""
    wanted, config = run.plan.recipe.theta, run.plan.config
    if not isinstance(wanted, str):
        return (float(wanted),)
    if run.plan.form != "deepseek_v3":
        return (None,)
    own, turning = float(rope_parameters(config)["rope_theta"]), rotary_dim(config, run.plan.gqa.head_dim)
    return candidates(own, turning, mla.qk_rope_head_dim)
