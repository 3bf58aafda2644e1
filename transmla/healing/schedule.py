"""How many windows and steps a run takes, and how large a step may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transmla.recipe import Healing

# (number of trained parameters, rate for models up to that number); a rate is the largest step of Adam relative to the
# size of each row. And the rate outside the attention, as a share of it. Measured in benchmarks/heal.md
RATES = ((5e6, 1e-2), (float("inf"), 5e-4))
REST = 0.3
# the largest rate on long windows, as a share of that on the others, where they have few of the tokens
LONG = 0.3
STEPS_WANTED, LARGEST_BATCH = 400, 64


@dataclass(frozen=True)
class Schedule:
    """How many windows and steps a run takes, from `schedule`.

    num_windows: different windows to train on; further steps repeat them
    steps:       optimizer steps
    batch:       windows per step, over all processes
    accumulated: batches of `micro` windows that each process accumulates gradients over in one step
    every:       steps between evaluations
    window:      tokens per window
    long_steps:  the last steps, which are on long windows;  long_rows: such windows at once on a device
    long_batch:  such windows per step, over all processes;  long_window: tokens of them
    """

    num_windows: int
    steps: int
    batch: int
    accumulated: int
    every: int
    window: int
    long_steps: int = 0
    long_rows: int = 1
    long_batch: int = 1
    long_window: int = 0

    @property
    def windows_seen(self) -> int:
        """Windows of ordinary length in all steps together, repetitions included."""
        return self.short_steps * self.batch

    @property
    def short_steps(self) -> int:
        """Steps on windows of ordinary length."""
        return self.steps - self.long_steps

    @property
    def long_windows(self) -> int:
        """Long windows in all steps together."""
        return self.long_steps * self.long_batch

    def share_of_rate(self, step: int, warmup: float) -> float:
        """Of the largest rate, in this step: it rises over the first steps, `warmup` of them, and falls along a cosine
        to nothing; on long windows it does so again, up to `LONG` or their share of the tokens. At the end of one
        cosine they would teach nothing."""
        first, count = (0, self.short_steps) if step < self.short_steps else (self.short_steps, self.long_steps)
        at, rising = step - first, min(math.ceil(warmup * count), count - 1)
        if at >= count:
            return 0.0
        of_long = 1 - self.tokens(self.short_steps) / self.tokens(self.steps)
        most = max(LONG, of_long) if first else 1.0
        return most * (at / rising if at < rising else (1 + math.cos(math.pi * (at - rising) / (count - rising))) / 2)

    def tokens(self, step: int) -> int:
        """Tokens trained on in the first `step` steps."""
        short = min(step, self.short_steps)
        return short * self.batch * self.window + (step - short) * self.long_batch * self.long_window


def schedule(settings: Healing, num_processes: int) -> Schedule:
    """The schedule that trains on `settings.tokens` tokens, rounded up to full batches and evaluations.

    A batch is a multiple of what the processes hold at once, which is `micro` windows each, of long windows as many as
    have as many tokens, at least one.
    """
    at_once = settings.micro * num_processes
    tokens_long = settings.long_share * settings.tokens
    windows_seen = max(1, round((settings.tokens - tokens_long) / settings.window))
    batch = settings.batch or min(LARGEST_BATCH, max(1, round(settings.tokens / settings.window) // STEPS_WANTED))
    accumulated = math.ceil(batch / at_once)
    batch = accumulated * at_once
    long_rows = max(1, settings.micro * settings.window // settings.long_window)
    long_batch = long_rows * accumulated * num_processes
    long_steps = math.ceil(tokens_long / settings.long_window / long_batch)
    steps = math.ceil(windows_seen / batch) + long_steps
    every = math.ceil(steps / settings.evaluations)
    steps = every * math.ceil(steps / every)  # so that the last step is evaluated and saved as well
    distinct = min(settings.distinct or settings.tokens, settings.tokens)
    num_windows = max(batch, round(distinct * (1 - settings.long_share) / settings.window))
    return Schedule(
        num_windows, steps, batch, accumulated, every, settings.window, long_steps, long_rows, long_batch,
        settings.long_window,
    )  # fmt: skip


def learning_rate(settings: Healing, num_trained: int) -> float:
    """The rate of the settings or, if they have none, the one of `RATES` for this number of trained parameters."""
    return settings.rate or next(rate for limit, rate in RATES if num_trained <= limit)


def rest_rate(settings: Healing, num_trained: int) -> float:
    """The rate of what is trained outside the attention."""
    return settings.rate_rest or REST * learning_rate(settings, num_trained)
