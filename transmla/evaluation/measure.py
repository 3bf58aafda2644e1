"""One model, every part of a suite. Parts that are finished are kept, so that an interrupted evaluation can resume."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from transmla.checkpoint.destination import write_whole
from transmla.checkpoint.provenance import portable, read_provenance
from transmla.checkpoint.read import open_source
from transmla.devices import release
from transmla.errors import RecipeError, TransmlaError, VerificationError
from transmla.evaluation.cache import measured_bytes_per_token
from transmla.evaluation.coded_source import CodedSource
from transmla.evaluation.generation import WAYS, shipped_prompts, written
from transmla.evaluation.perplexity import Perplexity, perplexity, text_windows
from transmla.evaluation.positions import by_position
from transmla.evaluation.quantised_cache import RECENT, packed_bytes_per_token, packed_caches, why_no_cache
from transmla.evaluation.smoke import smoke
from transmla.evaluation.steps import ran_out_of_memory
from transmla.evaluation.suite import Suite
from transmla.evaluation.tasks import needles, run_tasks
from transmla.model.loading import is_converted, load_any, load_tokenizer, open_model
from transmla.progress import Progress
from transmla.targets import quantise
from transmla.text.sources import CHARACTERS_PER_TOKEN, read_text
from transmla.text.windows import begin_tokens, calibration_tokens, with_begin

# tokens per window when neither suite nor option says so
DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Skipped:
    """A part that could not be measured, and why."""

    model: str
    part: str
    why: str


# parts that hold texts which a model has written, and no names
GENERATED = ("generation", "smoke")


class Kept:
    """Finished parts of an evaluation in a file, written anew after each one."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """settings: all that the parts depend on; a file of other settings is not read"""
        self._path, self._settings = path, portable(settings)
        self._parts: dict[str, Any] = {}
        if path is not None and path.is_file():
            with contextlib.suppress(
                OSError, ValueError, KeyError, TypeError, AttributeError
            ):  # damaged: as if not there
                found = json.loads(path.read_text("utf-8"))
                if found["settings"] == self._settings:
                    self._parts = dict(found["parts"])

    def get(self, model: str, part: str, make: Callable[[], Any]) -> Any:
        """The part as plain values, measured now or earlier."""
        key = _key(model, part)
        if key not in self._parts:
            self._parts[key] = make()
            if self._path is not None:
                written = {key: found for key, found in self._parts.items() if key.endswith(GENERATED)}
                content = {"settings": self._settings, "parts": portable(self._parts, keep=written)}
                write_whole(self._path, json.dumps(content))
        return self._parts[key]

    def has(self, model: str, part: str) -> bool:
        """Whether it was measured earlier."""
        return _key(model, part) in self._parts


def identity(model: str | Path) -> str:
    """The name of a model without its folder, and what tells it from another one of that name."""
    return f"{Path(model).name} {hashlib.sha256(str(model).encode()).hexdigest()[:12]}"


def _key(model: str, part: str) -> str:
    # of a text, the part is its path
    return f"{identity(model)} {identity(part) if '/' in part else part}"


@dataclass
class Subject:
    """A model under evaluation: loaded when the first part needs it."""

    name: str
    dtype: str
    device: str
    _model: Any = None

    @property
    def model(self) -> Any:
        """The loaded model."""
        if self._model is None:
            self._model = load_any(self.name, dtype=self.dtype, device=self.device)
        return self._model

    def release(self) -> None:
        """Free its memory."""
        self._model = None
        release(self.device)


def window_length(suite: Suite, *models: str | Path) -> int:
    """Tokens per window: as asked for, else 1,024 or the shortest context of the models; `RecipeError` for windows that
    are longer than the context of one of them."""
    contexts = {str(name): _context(name) for name in models}
    shortest = min(contexts, key=lambda name: contexts[name])
    if suite.length > contexts[shortest]:
        raise RecipeError(
            "the windows are longer than the model's context",
            where=f"--length {suite.length}",
            why=f"{Path(shortest).name} was made for {contexts[shortest]:,.0f} tokens",
            remedy=f"use --length {contexts[shortest]:.0f} or less",
        )
    lengths = (getattr(load_tokenizer(name), "model_max_length", DEFAULT_LENGTH) for name in models)
    return suite.length or int(min(DEFAULT_LENGTH, contexts[shortest], *lengths))


def _context(name: str | Path) -> float:
    """Of a model, in tokens; infinity where its config does not say."""
    config = open_source(Path(name)).config if is_converted(Path(name)) else open_model(str(name)).config
    return float(config.get("text_config", config).get("max_position_embeddings") or math.inf)


def digests(name: str | Path, suite: Suite) -> dict[str, str | None]:
    """SHA-256 of the tokens of the windows of each text, as this model reads them; None for a text that cannot be had.

    suite: whose `length` is that of the windows
    """
    tokenizer = load_tokenizer(name)
    begin = begin_of(suite, tokenizer)
    found: dict[str, str | None] = {}
    for text in suite.texts:
        try:
            found[text] = digest(windows_of(text, tokenizer, suite.length, suite.windows, begin))
        except TransmlaError:  # named where it is measured
            found[text] = None
    return found


def digest(ids_NT: Tensor) -> str:
    """SHA-256 of windows of tokens."""
    return hashlib.sha256(ids_NT.contiguous().numpy().tobytes()).hexdigest()


def begin_of(suite: Suite, tokenizer: Any) -> tuple[int, ...]:
    """What windows begin with instead of their first tokens."""
    return begin_tokens(tokenizer) if suite.begin else ()


def windows_of(text: str, tokenizer: Any, length: int, count: int, begin: Sequence[int] = ()) -> Tensor:
    """The first windows of a text, int64 [N, T], behind the tokens `begin`; raises `DataError`."""
    content = read_text(text, count * length * CHARACTERS_PER_TOKEN, evaluation=True)
    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    return with_begin(text_windows(ids, length, count, text), begin)


def measure(subject: Subject, suite: Suite, kept: Kept, skipped: list[Skipped], progress: Progress) -> dict[str, Any]:
    """All parts of one model as plain values; parts that cannot be measured for want of data are named in `skipped`.

    suite: whose `length` is that of the windows
    """
    name, tokenizer = subject.name, load_tokenizer(subject.name)
    length, begin = suite.length, begin_of(suite, tokenizer)
    unscored = max(1, len(begin))

    def part(key: str, make: Callable[[], Any], optional: bool = True) -> Any:
        try:
            return kept.get(name, key, make)
        except TransmlaError as error:
            if not optional:
                raise
            skipped.append(Skipped(name, key, f"{error.what}: {error.why}"))
            return None

    def text(which: str) -> dict[str, Any]:
        ids_NT = windows_of(which, tokenizer, length, suite.windows, begin)
        stage = f"{Path(which).name} {Path(name).name}"
        found = perplexity(
            subject.model, ids_NT, unscored=unscored, progress=lambda done, total: progress(stage, done, total, "")
        )
        _require_predictions(found, subject)
        return {
            "nats": list(found.nats_N),
            "num_tokens": found.num_tokens,
            "length": length,
            "sha256": digest(ids_NT),
        }

    # of short windows, less is exact
    recent = max(1, min(RECENT, length // 8))

    def with_cache(bits: float, cache: str, make: Callable[[], Cache]) -> dict[str, Any]:
        ids_NT = windows_of(suite.texts[0], tokenizer, length, suite.windows, begin)
        made = _LastOf(make)
        stage = f"{cache} {Path(name).name}"
        found = perplexity(
            subject.model, ids_NT, unscored=unscored, cache=made, chunk=recent,
            progress=lambda done, total: progress(stage, done, total, ""),
        )  # fmt: skip
        stored = packed_bytes_per_token(made.last)
        return {"bits": bits, "cache": cache, "bytes_per_token": stored, "nats": list(found.nats_N)}

    def quantised(bits: float) -> list[dict[str, Any]]:
        return [with_cache(bits, *pair) for pair in packed_caches(subject.model, bits, recent).items()]

    def coded() -> list[dict[str, Any]]:
        window = min(quantise.WINDOW, int(subject.model.config.get_text_config(decoder=True).max_position_embeddings))
        ids_NT = calibration_tokens(quantise.MIX, tokenizer, quantise.TOKENS, window).ids_NT
        try:
            source = CodedSource(subject.model, open_model(name), ids_NT, progress=progress)
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            raise TransmlaError(
                "out of memory",
                where=name,
                why=f"windows of {window} tokens are passed back through the whole model",
                remedy="leave --coded-source out, or use a device with more memory",
            ) from error
        return [
            with_cache(bits, f"KVTC-like {bits:g} bits", functools.partial(source.cache, bits, recent))
            for bits in suite.quantised
        ]

    def positions() -> dict[str, Any]:
        context = int(subject.model.config.max_position_embeddings)
        ids_NT = windows_of(suite.texts[0], tokenizer, context, suite.positions, begin)
        found = by_position(subject.model, ids_NT, unscored)
        return {"edges": list(found.edges), "nats": [list(row) for row in found.nats_NR]}

    def tasks(task: str) -> list[dict[str, Any]]:
        progress(f"tasks {Path(name).name}", suite.tasks.index(task), len(suite.tasks), task)
        found = run_tasks(
            subject.model, tokenizer, [task], include_path=suite.include_path or None, limit=suite.limit or None
        )
        return [asdict(result) | {"values": list(result.values)} for result in found]

    def haystacks() -> dict[str, Any]:
        progress(f"needles {Path(name).name}", 0, 1, "")
        found = needles(subject.model, tokenizer, name, list(suite.needles), suite.samples)
        return {str(size): {"found": share, "standard_error": error} for size, (share, error) in found.items()}

    def generation() -> dict[str, Any]:
        context = int(subject.model.config.max_position_embeddings)
        new_tokens = min(suite.generation, context // 2)
        prompts = shipped_prompts(tokenizer, context - new_tokens)
        found: dict[str, Any] = {"new_tokens": new_tokens, "prompts": [asdict(one) for one in prompts]}
        for number, way in enumerate(WAYS):
            progress(f"text of {Path(name).name}", number, len(WAYS), way)
            texts = written(subject.model, prompts, new_tokens, greedy=way == "greedy")
            found[way] = texts.plain(tokenizer)
        return found

    result: dict[str, Any] = {
        "name": name,
        "converted": is_converted(Path(name)),
        "cache_bytes_per_token": part("cache", lambda: measured_bytes_per_token(subject.model), optional=False),
        "dtype": part("dtype", lambda: str(subject.model.dtype).removeprefix("torch."), optional=False),
        # the first text is what everything else refers to
        "texts": {
            which: part(f"text {which}", functools.partial(text, which), optional=number > 0)
            for number, which in enumerate(suite.texts)
        },
    }
    if is_converted(Path(name)):
        result["layers"] = read_provenance(Path(name)).get("layers", [])
    if suite.quantised:
        rows = [part(f"{bits:g} bits", functools.partial(quantised, bits)) for bits in suite.quantised]
        is_source = not result["converted"]
        for bits, row in zip(suite.quantised, rows, strict=True):
            if row == [] and not (is_source and suite.coded_source):
                why = why_no_cache(subject.model)
                skipped.append(Skipped(name, f"a cache of {bits:g} bits", why))
        if suite.coded_source and is_source:
            rows.append(part("coded cache", coded))
        result["quantised"] = [row for found in rows for row in found or [None]]
    if suite.positions:
        result["positions"] = part("positions", positions)
    if suite.tasks:
        rows = [part(f"task {task}", functools.partial(tasks, task)) for task in suite.tasks]
        result["tasks"] = [row for found in rows if found for row in found]
    if suite.needles:
        result["needles"] = part("needles", haystacks)
    if suite.smoke:
        result["smoke"] = part("smoke", lambda: _smoke(subject.model, tokenizer))
    if suite.generation:
        result["generation"] = part("generation", generation)
    result["texts"] = {which: found for which, found in result["texts"].items() if found is not None}
    return result


def _require_predictions(found: Perplexity, subject: Subject) -> None:
    """`VerificationError` for a model whose logits are the same for every token of the vocabulary, as zeros are."""
    flat = math.log(subject.model.get_input_embeddings().num_embeddings)
    if all(abs(nats - flat) < 1e-5 for nats in found.nats_N):
        raise VerificationError(
            "the model predicts nothing",
            where=Path(subject.name).name,
            why=f"in every window the loss is that of {math.exp(flat):,.0f} equally likely tokens",
            remedy="check the folder with transmla verify; a source with weights of zero has to be downloaded again",
        )


class _LastOf:
    """Makes caches and keeps the last one, for a look at what it holds."""

    def __init__(self, make: Callable[[], Cache]) -> None:
        self._make = make
        self.last: Any = None

    def __call__(self) -> Cache:
        made = self.last = self._make()
        return made


def _smoke(model: Any, tokenizer: Any) -> dict[str, Any]:
    found = smoke(model, tokenizer)
    texts = [asdict(one) for one in found.continuations]
    return {"repeated": found.repeated, "num_empty": found.num_empty, "continuations": texts}
