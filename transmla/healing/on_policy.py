"""Windows of what the model that is trained has written itself, in the place of some of those of the text.

On given text a model never meets the states that its own mistakes lead to, and that it then repeats. Here it does, and
the source says how it would go on from there: forward KL on prefixes of the student (DAgger; 2605.16826 compares it
with the alternatives).

Every `resample` steps the model writes behind beginnings of documents and, where only answers are learned, behind the
turns that ask for one. What it has written is kept in a file, so that a resumed run trains on the same windows.

Legend: B windows of a batch, T tokens per window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transmla.errors import DataError
from transmla.healing.windows import Windows, write_windows
from transmla.processes import Processes
from transmla.progress import Progress
from transmla.recipe import Healing
from transmla.text.decoding import ends_of, write
from transmla.text.packing import IGNORED, Answered, Window, pack

# tokens of a document that it goes on from
LEAST_GIVEN, MOST_GIVEN = 4, 32
# draws after which there is taken to be no prompt in the text
MOST_DRAWS = 10_000


class OnPolicy:
    """Puts windows that the model has written into batches of training.

    student:     the model, as its class was: it writes when its forward gets no labels
    train:       windows of text, whose beginnings are prompts
    settings:    on_policy, on_policy_tokens, resample, window, seed
    per_step:    windows of each step in this process
    folder:      where windows are kept
    precision:   makes the context in which the model is run
    """

    def __init__(
        self,
        student: Any,
        train: Windows,
        settings: Healing,
        per_step: int,
        folder: Path,
        processes: Processes,
        precision: Callable[[], AbstractContextManager[Any]],
        progress: Progress,
    ) -> None:
        self._student, self._train, self._settings, self._per_step = student, train, settings, per_step
        self._folder, self._processes, self._precision, self._tell = folder, processes, precision, progress
        self._block, self._step, self._seen = -1, -1, 0
        self._rows: Windows | None = None

    def mixed(self, step: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with some of its windows exchanged. Called once for each batch of a step, in their order."""
        if step != self._step:
            self._step, self._seen = step, 0
        if step // self._settings.resample != self._block:
            self._block = step // self._settings.resample
            self._rows = self._windows(self._block)
        first = step % self._settings.resample * self._per_step + self._seen
        places = [
            (row, math.floor((first + row) * self._settings.on_policy))
            for row in range(len(batch["input_ids"]))
            if self._is_exchanged(first + row)
        ]
        self._seen += len(batch["input_ids"])
        if not places or self._rows is None:
            return batch
        changed = {name: values.clone() for name, values in batch.items()}
        for row, number in places:
            for name, values in self._rows[number].items():
                changed[name][row] = values.to(changed[name].device)
        return changed

    def _is_exchanged(self, number: int) -> bool:
        """Whether the window of this number, of those until the model writes again, is exchanged: an even share."""
        share = self._settings.on_policy
        return math.floor((number + 1) * share) > math.floor(number * share)

    def _windows(self, block: int) -> Windows | None:
        """The windows of `resample` steps, written now unless the file is there."""
        count = math.floor(self._settings.resample * self._per_step * self._settings.on_policy)
        if not count:
            return None
        path = self._folder / f"{block:06d}-{self._processes.rank}.npy"
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            rows = list(self._written(block, count))
            write_windows(path, rows, count, self._settings.window, self._tell, "write")
        return Windows(path)

    def _written(self, block: int, count: int) -> Iterator[Window]:
        """`count` windows of what the model writes now."""
        settings = self._settings
        draw = np.random.default_rng([settings.seed % 2**63, block, self._processes.rank])
        seed = int(draw.integers(2**62))
        first = 0
        made: list[Window] = []
        documents: list[list[int]] = []
        while len(made) < count:
            missing = (count - len(made)) * settings.window
            prompts = [self._prompt(draw) for _ in range(1 + missing // settings.on_policy_tokens)]
            # with a cache every layer would be a graph of its own, and compiled anew for each
            with self._precision(), torch.compiler.set_stance("force_eager"):
                texts = write(self._student, prompts, settings.on_policy_tokens, seed=seed, first=first)
            first += len(prompts)
            for prompt, text in zip(prompts, texts, strict=True):
                # the source has nothing to say about what the model did not choose
                documents.append(Answered(prompt + text, [False] * len(prompt) + [True] * len(text)))
            made = list(pack(documents, settings.window))
        yield from made[:count]

    def _prompt(self, draw: np.random.Generator) -> list[int]:
        """The beginning of a document in a random window, or the turns before an answer of it."""
        room = self._settings.window - self._settings.on_policy_tokens
        ends = ends_of(self._student)
        for _ in range(MOST_DRAWS):
            if prompt := self._beginning(draw, ends):
                return prompt[-room:]
        raise DataError(
            "there is nothing that the model could go on from",
            where=self._settings.mix,
            why=f"no document in {MOST_DRAWS:,} draws has {LEAST_GIVEN} tokens before its end",
            remedy="use text with longer documents, or leave on_policy out",
        )

    def _beginning(self, draw: np.random.Generator, ends: list[int]) -> list[int]:
        """A prompt, or nothing where the turns do not get as far as an answer within their window, or the document ends
        too soon. Behind its end token, one of `ends`, the model would write as if it had not ended."""
        row = self._train[int(draw.integers(len(self._train)))]
        starts = (row["position_ids"] == 0).nonzero()[:, 0].tolist()
        place = int(draw.integers(len(starts)))
        end = starts[place + 1] if place + 1 < len(starts) else len(row["input_ids"])
        ids, labels = (row[name][starts[place] : end].tolist() for name in ("input_ids", "labels"))
        asked = next((number for number, label in enumerate(labels) if label != IGNORED), len(labels))
        if asked == len(labels):
            return []
        if asked:
            return list(ids[: asked + 1])
        given = int(draw.integers(LEAST_GIVEN, MOST_GIVEN + 1))
        # end tokens inside are those of turns, which others follow
        whole = len(ids) - (ids[-1] in ends)
        return list(ids[: min(given, whole)]) if whole >= LEAST_GIVEN else []


def forget(folder: Path, before: int) -> None:
    """Delete the windows of blocks before this one, to which no run goes back."""
    for path in folder.glob("*.npy"):
        if int(path.name.partition("-")[0]) < before:
            path.unlink(missing_ok=True)
