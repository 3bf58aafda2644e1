"""Prepare what training needs: packed windows of text, and a teacher that knows the source's predictions for them.

Everything that is computed here is kept in the journal, so that an interrupted run does not compute it again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.destination import disk_errors, write_whole
from transmla.checkpoint.provenance import portable
from transmla.checkpoint.read import Source
from transmla.devices import narrow_dtype
from transmla.errors import DataError
from transmla.healing.student import Teacher, halve_frozen
from transmla.healing.teacher import CachedTeacher, Judged, OnlineTeacher, Precision, record
from transmla.healing.windows import Windows, write_windows
from transmla.model.loading import load_source
from transmla.processes import Processes
from transmla.progress import Progress
from transmla.recipe import Healing
from transmla.text.documents import Text, mixed, open_text
from transmla.text.mixes import SELF, Part, names_of, parse_mix
from transmla.text.packing import pack
from transmla.text.sampling import TEXT_LENGTH, sample_texts
from transmla.text.sources import dataset_of, place_of

# predictions stored for each token where the recipe does not set top_k
CACHED_TOP_K = 64
# most tokens that are sampled from the source; beyond that they repeat
MOST_SAMPLED = 4_000_000
# file that records how many tokens of each text were packed, and in how many passes
TEXTS = "texts.json"


def packed_texts(work: Path) -> dict[str, dict[str, int]]:
    """Tokens drawn of each text of the training mix, and how often it was begun; `DestinationError` if that cannot be
    read."""
    with disk_errors(work / TEXTS):
        found: dict[str, dict[str, int]] = json.loads((work / TEXTS).read_text("utf-8"))
    return found


@dataclass(frozen=True)
class Preparation:
    """Prepares the windows and the teacher of one healing run.

    converted:         the converted folder
    source_checkpoint: the source model
    settings:          settings of the run; `window` fits into the model's context
    num_windows:       different windows to train on;  num_long: long ones
    larger:            the model that is distilled, where it is not the source
    processes:         the processes of the run
    device:            the device of this process
    tell:              the progress function
    """

    converted: Source
    source_checkpoint: Source
    settings: Healing
    num_windows: int
    processes: Processes
    device: torch.device
    tell: Progress
    num_long: int = 0
    larger: Source | None = None

    @property
    def texts(self) -> list[Part]:
        """The texts that are measured on: the training mix as one, then each watched text."""
        return [Part(name) for name in (self.settings.mix, *names_of(self.settings.watch or ""))]

    def windows(self, work: Path) -> tuple[Windows, list[Windows], Windows | None]:
        """The windows to train on, the held-out windows of each of `texts`, and the long windows to train on at last.

        Process 0 packs them into files in `work`; all processes map these into memory. Raises `DataError` for text
        that is missing or too short.
        """
        paths = [work / "train.npy", *(work / f"heldout-{number}.npy" for number in range(len(self.texts)))]
        long = work / "long.npy" if self.num_long else None
        if self.processes.first and not all(path.is_file() for path in (*paths, work / TEXTS, long or paths[0])):
            self._pack(work, paths, long)
        self.processes.wait()
        files = [Windows(paths[0])]
        for path in paths[1:]:
            files.append(Windows(path, sum(map(len, files))))
        return files[0], files[1:], None if long is None else Windows(long)

    def _pack(self, work: Path, paths: list[Path], long: Path | None) -> None:
        settings, model_tokenizer = self.settings, tokenizer(self.converted)
        parts = parse_mix(settings.mix, "--data")
        sampled_share = sum(part.weight for part in parts if part.name == SELF) / sum(part.weight for part in parts)

        def sampled() -> list[list[int]]:
            path = work / "sampled.npz"
            if not path.is_file():
                # slightly more than needed, because packing drops documents of one token and incomplete windows
                windows = math.ceil(1.05 * sampled_share * self.num_windows) + 2 * settings.heldout + 2
                self._sample(min(windows * settings.window, MOST_SAMPLED), path)
            with np.load(path, allow_pickle=False) as arrays:
                return [text.tolist() for text in np.split(arrays["ids"], arrays["ends"][:-1])]

        def opened(part: Part, evaluation: bool, length: int | None = None) -> Text:
            return open_text(
                part, model_tokenizer, length or settings.window, sampled, evaluation=evaluation, begin=settings.begin,
                completion_only=settings.completion_only,
            )  # fmt: skip

        texts = [opened(part, evaluation=False) for part in parts]
        watched = [opened(part, evaluation=True) for part in self.texts[1:]]
        for text in watched:
            text.hold_out(settings.heldout, settings.window, is_trained_on=False)
        heldout_of_each = -(-settings.heldout // len(texts))
        watched_names = {_identity(text.part.name) for text in watched}
        for text in texts:
            # what is measured of a watched text is not trained on where the mix has it, too
            is_watched = _identity(text.part.name) in watched_names
            text.hold_out(settings.heldout if is_watched else heldout_of_each, settings.window)
        of_mix = [window for text in texts for window in text.heldout[:heldout_of_each]]
        heldout = [of_mix, *(text.heldout for text in watched)]
        for path, windows in zip(paths[1:], heldout, strict=True):
            write_windows(path, windows, len(windows), settings.window, self.tell, "hold out")
        rows = pack(mixed(texts, settings.seed), settings.window)
        write_windows(paths[0], rows, self.num_windows, settings.window, self.tell, "pack")
        if long is not None:
            self._pack_long(texts, parts, opened, long)
        packed = {text.part.name: {"tokens": text.drawn, "passes": text.begun} for text in texts}
        write_whole(work / TEXTS, json.dumps(portable(packed)))

    def _pack_long(self, texts: list[Text], parts: tuple[Part, ...], opened: Callable[..., Text], path: Path) -> None:
        """Long windows of the same mix, behind the documents that are held out; plain texts in longer pieces."""
        settings = self.settings
        longer = [opened(part, evaluation=False, length=settings.long_window) for part in parts]
        for text, short in zip(longer, texts, strict=True):
            # pieces are counted in pieces; a long one that holds a held-out token is left out as well
            of_pieces = -(-short.skipped * settings.window // settings.long_window)
            text.skipped = of_pieces if text.is_cut else short.skipped
            if next(islice(text.documents(), text.skipped, None), None) is None:
                raise DataError(
                    "the text is too short for long windows",
                    where=text.part.name,
                    why=f"behind the held-out windows, no piece of {settings.long_window:,} tokens is left",
                    remedy="use a longer text, or a smaller --long-window",
                )
        rows = pack(mixed(longer, settings.seed + 1), settings.long_window)
        write_windows(path, rows, self.num_long, settings.long_window, self.tell, "pack")

    def _sample(self, num_tokens: int, path: Path) -> None:
        """Sample texts from the source into the file `path`: the token ids of all texts, and where each text ends."""
        settings = self.settings
        narrow = narrow_dtype(self.device) if settings.precision == "bfloat16" else None
        model = load_source(self.source_checkpoint, dtype=narrow or torch.float32, device=str(self.device))
        texts = sample_texts(
            model, num_tokens, min(settings.window, TEXT_LENGTH), seed=settings.seed,
            progress=lambda done, total: self.tell("sample", done, total, "tokens"),
        )  # fmt: skip
        partial = path.with_suffix(".partial.npz")
        with disk_errors(path):
            np.savez(partial, ids=np.concatenate(texts), ends=np.cumsum([len(text) for text in texts]))
            partial.rename(path)

    def teacher(self, work: Path, train: Windows, heldout: list[Windows], precision: Precision) -> Teacher:
        """A teacher for all windows: the source model itself or, with `cached`, its predictions stored in `work`.

        With a larger model, that is the teacher of training, and the source that of held-out windows, where nothing is
        softened by a temperature. Stored predictions are computed now unless an earlier run has finished them. Every
        process calls this.
        precision: makes the context in which the source is run, see `transmla.healing.train.autocast`
        """
        settings = self.settings
        k = settings.top_k or (CACHED_TOP_K if settings.cached else None)
        folder = work / "predictions"
        if settings.cached and (folder / "done").is_file():
            return CachedTeacher(folder, self.device)
        streams = settings.hidden > 0 or settings.layerwise > 0

        vocabulary = int(self.converted.config.get("text_config", self.converted.config)["vocab_size"])

        def online(model: Any, temperature: float) -> OnlineTeacher:
            return OnlineTeacher(model, precision, k=k, temperature=temperature, streams=streams, vocabulary=vocabulary)

        source = self._model(self.source_checkpoint)
        judge, teacher = online(source, 1.0), online(source, settings.temperature)
        if self.larger is not None:
            teacher = online(self._model(self.larger), settings.temperature)
        if not settings.cached:
            return judge if self.larger is None and settings.temperature == 1 else Judged(teacher, judge)
        for windows, by in ((train, teacher), *((windows, judge) for windows in heldout)):
            record(by, windows, folder, self.processes.mine(len(windows)), self.device, self.tell)
        self.processes.wait()
        if self.processes.first:
            write_whole(folder / "done", "")
        return CachedTeacher(folder, self.device)

    def _model(self, checkpoint: Source) -> Any:
        half = self.settings.precision == "bfloat16"
        if is_sharded():
            # whole in the memory of each process; on its device, no more than one whole layer at a time
            model = load_source(checkpoint, dtype=torch.bfloat16 if half else torch.float32, device="cpu")
            return _shard(model.requires_grad_(False)).to(self.device)
        model = load_source(checkpoint, dtype=torch.float32).requires_grad_(False)
        if half:
            halve_frozen(model)
        return model.to(self.device)


def _identity(name: str) -> tuple[str, str, str]:
    """Of the text of this name: a file or folder may be written in several ways, a default configuration left out."""
    place = place_of(name)
    if place is not None and place.is_file():
        return os.path.realpath(place), "", ""
    dataset, config, split = dataset_of(name)
    whole = dataset if place is None else os.path.realpath(place)
    return whole, "" if config == "default" else config, split or "train"


def is_sharded() -> bool:
    """Whether the launcher has enabled FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _shard(model: Any) -> Any:
    """The model with its layers sharded over all processes; embeddings and head stay whole in each."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_decoder().layers:
        # each layer is a root of its own, and by default roots stay whole after their first forward
        fully_shard(layer, reshard_after_forward=True)
    return model
