"""Teachers: what the source predicts for a batch, computed when it is needed, or once and stored on the disk.

Legend: B windows, T tokens, D hidden_size, V vocabulary, K stored predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transmla.checkpoint.destination import disk_errors
from transmla.healing.windows import Windows
from transmla.model.head import head_of
from transmla.progress import Progress
from transmla.text.packing import IGNORED
from transmla.train.losses import Predictions, TopK, parts, text_nats, top_k

# makes the context in which the source is run, for example torch.autocast
Precision = Callable[[], AbstractContextManager[Any]]
# files of stored predictions per folder
PER_FOLDER = 1000


@dataclass(frozen=True)
class Lesson:
    """What the source predicts for one batch of windows: the target of one training step.

    predictions: maps a slice of the batch's tokens (flattened, window after window) to the source's logits [n, V] or,
                 where only the largest are kept, to a `TopK`. A function, so that logits of a whole batch never exist
    streams:     residual streams of the source, [B, T, D] before each layer and after the last; empty if not requested
    nats:        maps labels [B, T] to the mean next-token loss of the source on each window, float32 [B]
    """

    predictions: Predictions
    streams: Sequence[Tensor]
    nats: Callable[[Tensor], Tensor]


class OnlineTeacher:
    """A teacher that runs the source model on every batch.

    model:       the source, a transformers causal language model; never trained
    precision:   makes the context in which it is run
    k:           number of predictions to keep per token, as `TopK`; None keeps all logits
    temperature: divides the logits before the largest are taken
    streams:     whether to return residual streams as well
    vocabulary:  number of logits that are wanted; a model that has more of them is cut, one that has fewer gets tokens
                 that it never predicts
    """

    def __init__(
        self,
        model: Any,
        precision: Precision,
        *,
        k: int | None = None,
        temperature: float = 1.0,
        streams: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        self.model, self._precision, self._k, self._temperature = model.eval(), precision, k, temperature
        self._wants_streams = streams
        self.vocabulary: int = vocabulary or model.config.vocab_size

    @property
    def models(self) -> tuple[Any, ...]:
        """All that it runs."""
        return (self.model,)

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor, positions_BT: Tensor, index_B: Tensor) -> Lesson:
        """The source's predictions for the windows `ids_BT`, int64 [B, T]; `index_B` is not used."""
        with self._precision():
            out = self.model.get_decoder()(
                input_ids=ids_BT, position_ids=positions_BT, use_cache=False, output_hidden_states=self._wants_streams
            )
        normed_ND, head = out.last_hidden_state.flatten(0, 1), head_of(self.model)

        def logits(some_ND: Tensor) -> Tensor:
            with torch.no_grad(), self._precision():
                return resized(head.logits(some_ND), self.vocabulary)

        def predictions(tokens: slice) -> Tensor | TopK:
            logits_NV = logits(normed_ND[tokens])
            return logits_NV if self._k is None else top_k(logits_NV, self._k, self._temperature)

        def nats(labels_BT: Tensor) -> Tensor:
            nats_N, _ = text_nats(normed_ND, logits, labels_BT.flatten(), self.vocabulary)
            return nats_N.view_as(labels_BT).sum(1) / (labels_BT != IGNORED).sum(1).clamp_min(1)

        return Lesson(predictions, out.hidden_states or (), nats)


def resized(logits_NV: Tensor, vocabulary: int) -> Tensor:
    """The logits of the first tokens; those that a model does not have are so small that they have no probability."""
    missing = vocabulary - logits_NV.shape[-1]
    if missing <= 0:
        return logits_NV[..., :vocabulary]
    # finite, since 0 * infinity is not 0
    return torch.nn.functional.pad(logits_NV, (0, missing), value=torch.finfo(torch.float16).min)


class Judged:
    """One teaches, a larger model or the source at a temperature, and the source says how near to it the result is.

    model: that of the teacher;  judge: the source
    """

    def __init__(self, teacher: OnlineTeacher, judge: OnlineTeacher) -> None:
        self._teacher, self.judge = teacher, judge
        self.model = teacher.model

    @property
    def models(self) -> tuple[Any, ...]:
        """All that it runs."""
        return tuple(dict.fromkeys((*self._teacher.models, *self.judge.models)))

    def __call__(self, ids_BT: Tensor, positions_BT: Tensor, index_B: Tensor) -> Lesson:
        """The teacher's predictions in training, the source's where nothing is learned."""
        who = self._teacher if torch.is_grad_enabled() else self.judge
        return who(ids_BT, positions_BT, index_B)


class CachedTeacher:
    """A teacher that reads predictions stored by `record`; the source is not needed in memory.

    folder: folder that `record` wrote to
    device: where the predictions are put
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self._folder, self._device = folder, device

    def __call__(self, ids_BT: Tensor, positions_BT: Tensor, index_B: Tensor) -> Lesson:
        """The stored predictions for the windows with the numbers `index_B`, int64 [B]; the ids are not used."""
        stored = [self._load(index) for index in index_B.tolist()]
        probabilities_NK = torch.cat([largest.probabilities_NK for largest, _ in stored])
        ids_NK = torch.cat([largest.ids_NK for largest, _ in stored])
        nats_B = torch.stack([nats for _, nats in stored])
        return Lesson(lambda tokens: TopK(probabilities_NK[tokens], ids_NK[tokens]), (), lambda _: nats_B)

    def _load(self, index: int) -> tuple[TopK, Tensor]:
        with np.load(record_path(self._folder, index), allow_pickle=False) as arrays:
            probabilities_TK = torch.from_numpy(arrays["probabilities"].astype(np.float32))
            ids_TK = torch.from_numpy(arrays["ids"].astype(np.int64))
            nats = torch.tensor(float(arrays["nats"]))
        return TopK(probabilities_TK.to(self._device), ids_TK.to(self._device)), nats.to(self._device)


def record_path(folder: Path, index: int) -> Path:
    """The file with the stored predictions of window number `index`."""
    return folder / f"{index // PER_FOLDER:05d}" / f"{index % PER_FOLDER:03d}.npz"


def record(
    teacher: OnlineTeacher, windows: Windows, folder: Path, mine: Sequence[int], device: torch.device, tell: Progress
) -> None:
    """Store the teacher's K largest predictions for the windows at the places `mine`, about 5 K bytes per token.

    One compressed file per window: probabilities (float16) and ids (int32) [T, K], and the mean loss of the source in
    nats per token. Windows that have a file already are skipped, so an interrupted run resumes where it stopped.
    Raises `DestinationError` if the disk is full.
    """
    for number, place in enumerate(mine):
        row = windows[place]
        path = record_path(folder, int(row["index"]))
        if not path.is_file():
            ids_1T, positions_1T, labels_1T = (
                row[name][None].to(device) for name in ("input_ids", "position_ids", "labels")
            )
            lesson = teacher(ids_1T, positions_1T, row["index"][None])
            predictions = [lesson.predictions(part) for part in parts(ids_1T.shape[1], teacher.vocabulary, device)]
            largest = [part for part in predictions if isinstance(part, TopK)]
            probabilities_TK = torch.cat([part.probabilities_NK for part in largest])
            ids_TK = torch.cat([part.ids_NK for part in largest])
            partial = path.with_suffix(".partial")
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as file:
                    np.savez_compressed(
                        file,
                        probabilities=probabilities_TK.cpu().numpy().astype(np.float16),
                        ids=ids_TK.cpu().numpy().astype(np.int32),
                        nats=np.float32(lesson.nats(labels_1T).item()),
                    )
                partial.rename(path)
        tell("source's predictions", number + 1, len(mine), "")
