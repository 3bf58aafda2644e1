"""What training needs and keeps in the journal: packed windows, and a teacher for them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.read import Source
from transmla.healing.student import Teacher, halve_frozen
from transmla.healing.teacher import CachedTeacher, OnlineTeacher, Precision, record
from transmla.healing.windows import Windows, write_windows
from transmla.model.loading import load_source
from transmla.processes import Processes
from transmla.progress import Progress
from transmla.recipe import Healing
from transmla.text.documents import mixed, open_text
from transmla.text.mixes import SELF, Part, parse_mix
from transmla.text.packing import pack
from transmla.text.sampling import TEXT_LENGTH, sample_texts

# predictions that are kept of each token if the recipe does not say
CACHED_TOP_K = 64
# tokens that a source writes at most; then they begin anew
MOST_SAMPLED = 4_000_000
# of what was packed: tokens of each text, and in how many passes
TEXTS = "texts.json"


@dataclass(frozen=True)
class Preparation:
    """opened: the converted folder;  num_windows: different ones to train on;  where: the device of this process"""

    opened: Source
    of_source: Source
    settings: Healing
    num_windows: int
    processes: Processes
    where: torch.device
    tell: Progress

    @property
    def texts(self) -> list[Part]:
        """What is measured on: the mix that is trained on, then each watched text."""
        watched = self.settings.watch.split("+") if self.settings.watch else []
        return [Part(name) for name in (self.settings.data, *watched)]

    def windows(self, work: Path) -> tuple[Windows, list[Windows]]:
        """To train on, and held out of each text; packed by the first process, mapped by all."""
        paths = [work / "train.npy", *(work / f"heldout-{number}.npy" for number in range(len(self.texts)))]
        if self.processes.first and not all(path.is_file() for path in (*paths, work / TEXTS)):
            self._pack(work, paths)
        self.processes.wait()
        files = [Windows(paths[0])]
        for path in paths[1:]:
            files.append(Windows(path, sum(map(len, files))))
        return files[0], files[1:]

    def _pack(self, work: Path, paths: list[Path]) -> None:
        settings, words = self.settings, tokenizer(self.opened)
        parts = parse_mix(settings.data, "--data")

        own_share = sum(part.weight for part in parts if part.name == SELF) / sum(part.weight for part in parts)

        def sampled() -> list[list[int]]:
            path = work / "sampled.npz"
            if not path.is_file():
                # a little more than is drawn, since the last token of a document predicts nothing
                windows = math.ceil(1.05 * own_share * self.num_windows) + 2 * settings.heldout + 2
                self._sample(min(windows * settings.window, MOST_SAMPLED), path)
            with np.load(path, allow_pickle=False) as found:
                return [text.tolist() for text in np.split(found["ids"], found["ends"][:-1])]

        texts = [open_text(part, words, self.settings.window, sampled, evaluation=False) for part in parts]
        share = -(-settings.heldout // len(texts))
        for text in texts:
            text.hold_out(share, self.settings.window)
        watched = [open_text(part, words, self.settings.window, sampled, evaluation=True) for part in self.texts[1:]]
        for text in watched:
            text.hold_out(settings.heldout, self.settings.window)
        heldout = [[window for text in texts for window in text.heldout], *(text.heldout for text in watched)]
        for path, kept in zip(paths[1:], heldout, strict=True):
            write_windows(path, kept, len(kept), self.settings.window, self.tell, "hold out")
        rows = pack(mixed(texts, settings.seed), self.settings.window)
        write_windows(paths[0], rows, self.num_windows, self.settings.window, self.tell, "pack")
        (work / TEXTS).write_text(
            json.dumps({text.part.name: {"tokens": text.drawn, "passes": text.begun} for text in texts})
        )

    def _sample(self, num_tokens: int, path: Path) -> None:
        """What the source writes: ids of all texts, and where each ends."""
        settings = self.settings
        model = load_source(self.of_source, dtype=getattr(torch, settings.precision), device=str(self.where))
        texts = sample_texts(
            model, num_tokens, min(settings.window, TEXT_LENGTH), seed=settings.seed,
            progress=lambda done, total: self.tell("sample", done, total, "tokens"),
        )  # fmt: skip
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, ids=np.concatenate(texts), ends=np.cumsum([len(text) for text in texts]))
        partial.rename(path)

    def teacher(self, work: Path, train: Windows, heldout: list[Windows], precision: Precision) -> Teacher:
        """The source itself, or its predictions of all windows, computed now if they are not there yet."""
        settings = self.settings
        k = settings.top_k or (CACHED_TOP_K if settings.cached else None)
        folder = work / "predictions"
        if settings.cached and (folder / "done").is_file():
            return CachedTeacher(folder, self.where)
        online = OnlineTeacher(
            self._source_model(), precision, k=k, temperature=settings.temperature, streams=settings.hidden > 0
        )
        if not settings.cached:
            return online
        for windows in (train, *heldout):
            record(online, windows, folder, self.processes.mine(len(windows)), self.where, self.tell)
        self.processes.wait()
        if self.processes.first:
            (folder / "done").touch()
        return CachedTeacher(folder, self.where)

    def _source_model(self) -> Any:
        half = self.settings.precision == "bfloat16"
        if is_sharded():
            model = load_source(self.of_source, dtype=torch.bfloat16 if half else torch.float32, device=str(self.where))
            return _shard(model.requires_grad_(False))
        model = load_source(self.of_source, dtype=torch.float32).requires_grad_(False)
        if half:
            halve_frozen(model)
        return model.to(self.where)


def is_sharded() -> bool:
    """Whether the launcher has asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _shard(model: Any) -> Any:
    """The source's layers over all processes; embeddings and head whole in each."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_decoder().layers:
        fully_shard(layer)
    return model
