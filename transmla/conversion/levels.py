"""How much refinement: the levels of `transmla convert --refine`. Measured in benchmarks/refine.md."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Descent:
    """One run of Adam.

    passes:  over the fitted calibration windows, at most;  batch: windows per step, over all processes
    rate:    largest step, relative to each matrix's root mean square
    windows: in all, if that is at least one pass; None: all passes
    """

    passes: float
    batch: int
    rate: float
    windows: int | None = None

    def num_steps(self, num_windows: int) -> int:
        """Over so many windows."""
        in_all = self.passes * num_windows
        if self.windows is not None:
            in_all = min(in_all, max(num_windows, self.windows))
        return max(1, round(in_all / min(self.batch, num_windows)))


@dataclass(frozen=True)
class Refinement:
    """layerwise: each layer against the source's stream, while the streams pass it; None leaves it out
    distil:     blocks of layers against the source's predictions (a last block) or its stream (others)
    closed_form_tokens: calibration tokens that the closed form sees if distillation follows, which mends what more of
                them would have brought; None: all
    distil_unseen: distil on windows that the closed form has not seen, if they are as many as twice those that it has:
                it knows these by heart, and there is less to learn from them. Else as many more of these as that takes
    """

    layerwise: Descent | None
    distil: Descent | None
    closed_form_tokens: int | None = 65536
    distil_unseen: bool = False


LEVELS: dict[str, Refinement] = {
    "off": Refinement(None, None),
    "fast": Refinement(None, Descent(passes=1.0, batch=1, rate=1e-3), closed_form_tokens=49152, distil_unseen=True),
    "full": Refinement(None, Descent(passes=4.0, batch=1, rate=1e-3, windows=940), closed_form_tokens=65536),
}


def with_batch(level: Refinement, batch: int | None) -> Refinement:
    """The same with so many windows per step; None: as it is."""
    if batch is None:
        return level
    layerwise, distil = (descent and replace(descent, batch=batch) for descent in (level.layerwise, level.distil))
    return replace(level, layerwise=layerwise, distil=distil)
