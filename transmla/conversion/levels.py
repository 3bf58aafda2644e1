"""How much refinement: the levels of `transmla convert --refine`. Measured in benchmarks/refine.md."""

from dataclasses import dataclass, replace

# tokens that go forward and backward together: more of them cost only memory on a CPU, and keep a GPU busy
TOKENS_ON_GPU, TOKENS_ELSEWHERE = 8192, 2048
# tokens that a regression should see per feature
LEAST_PER_FEATURE = 32


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

    def tokens_at_once(self, window: int, most: int) -> int:
        """Tokens that go forward and backward together: the windows of a step up to `most`, but at least one."""
        return max(window, min(self.batch * window, most))

    def num_steps(self, num_windows: int) -> int:
        """Steps over `num_windows` windows."""
        in_all = self.passes * num_windows
        if self.windows is not None:
            in_all = min(in_all, max(num_windows, self.windows))
        return max(1, round(in_all / min(self.batch, num_windows)))


@dataclass(frozen=True)
class Refinement:
    """distil: blocks of layers against the source's predictions (the last block) or its stream (earlier ones); None:
            the closed form alone
    closed_form_tokens: calibration tokens that the closed form sees if distillation follows, which makes up for the
            rest, but at least `LEAST_PER_FEATURE` for each feature of its regressions; None: all
    distil_unseen: distil on windows that the closed form has not seen, as long as there are twice as many of them as of
            those that it has. It fits its own windows closely, so there is less to learn from them; some are added
            only where unseen ones are short
    """

    distil: Descent | None
    closed_form_tokens: int | None = 65536
    distil_unseen: bool = False

    def num_closed(self, num_windows: int, num_heldout: int, window: int, width: int = 0) -> int:
        """Windows that the closed form sees, held-out ones included; width: features of its widest regression."""
        if self.closed_form_tokens is None or self.distil is None:
            return num_windows
        tokens = max(self.closed_form_tokens, LEAST_PER_FEATURE * width)
        return min(num_windows, max(1, tokens // window) + num_heldout)

    def num_distilled(self, num_windows: int, num_heldout: int, num_closed: int) -> int:
        """Windows that are distilled on: the first ones, which the closed form has not seen."""
        fitted, unseen = num_windows - num_heldout, num_windows - num_closed
        return max(unseen, min(fitted, 2 * (fitted - unseen))) if self.distil_unseen else fitted


LEVELS: dict[str, Refinement] = {
    "off": Refinement(None),
    "fast": Refinement(Descent(passes=1.0, batch=1, rate=1e-3), closed_form_tokens=49152, distil_unseen=True),
    "full": Refinement(Descent(passes=4.0, batch=1, rate=1e-3, windows=940), closed_form_tokens=65536),
}


def with_batch(level: Refinement, batch: int | None) -> Refinement:
    """The same level with `batch` windows per step; None: unchanged."""
    if batch is None or level.distil is None:
        return level
    return replace(level, distil=replace(level.distil, batch=batch))
