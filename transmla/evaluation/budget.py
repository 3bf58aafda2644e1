"""How many texts a budget of cache memory holds, and how fast they are decoded: what a smaller cache buys.

What one text takes is read from the tensors of its cache, room that is kept free in them included. Then that text is
repeated until the budget is full, and decoded in turns with the source's cache, which is filled likewise.

Legend: S tokens of a text.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from transmla.errors import GeometryError
from transmla.evaluation.cache import held_bytes
from transmla.evaluation.quantised_cache import packed_caches
from transmla.evaluation.steps import decode, fill, forgetful, packing, ran_out_of_memory, rewind
from transmla.model.generation import own_cache
from transmla.progress import Progress
from transmla.tables import size

# of the source's own cache, whose packed forms are counted
COUNTED_BITS = 4


@dataclass(frozen=True)
class Kind:
    """A cache of a model, empty: `make` is told how many tokens it will have; counted: it is not timed, and why."""

    model: str
    cache: str
    loaded: Any
    make: Callable[[int], Cache]
    counted: str | None = None


@dataclass(frozen=True)
class Held:
    """Texts of one length in a budget. Speeds are medians over the repeats, with the smallest and the largest.

    cache:          "bfloat16" or what else is computed in, "latent-int4", "KIVI 4 bits" ...
    context:        tokens of each text, those that are decoded included
    texts:          most whose caches fit;  tokens: of all these together
    bytes_per_text: held by the cache of one
    tokens_per_second: of decoding, all texts together;  speed_ratio: to the source's in the same turns
    remark:         why there are no speeds
    """

    model: str
    cache: str
    context: int
    texts: int
    tokens: int
    bytes_per_text: int
    tokens_per_second: float | None = None
    slowest: float | None = None
    fastest: float | None = None
    speed_ratio: float | None = None
    remark: str | None = None


@dataclass(frozen=True)
class Budget:
    """bytes: for caches alone, not for weights and activations;  rows: by context, the source first."""

    bytes: int
    rows: tuple[Held, ...]


def kinds_of(models: dict[str, Any], names: Sequence[str], dtype: str) -> list[Kind]:
    """Every cache that is compared: as computed of each model, packed ones of the source, which nothing here reads
    block by block, and the latent ones of a converted folder.

    names: of latent caches; none: exact, int8, int4, and coded3 if the folder is prepared
    """
    kinds: list[Kind] = []
    for model, loaded in models.items():
        if not hasattr(loaded, "latent_cache"):
            kinds.append(Kind(model, dtype, loaded, lambda _, loaded=loaded: DynamicCache(config=loaded.config)))  # type: ignore[misc]
            if hasattr(loaded.config, "kv_lora_rank"):  # the stock class, which caches expanded keys and values
                continue
            for name, empty in packed_caches(loaded, COUNTED_BITS).items():
                why = "counted, not run: it is unpacked as a whole to be attended to"
                kinds.append(Kind(model, name, loaded, lambda _, empty=empty: empty(), why))  # type: ignore[misc]
            continue
        usual = ["latent", "latent-int8", "latent-int4"]
        if getattr(loaded.config, "latent_code", None) is not None:
            usual.append("latent-coded3")
        for name in names or usual:

            def make(length: int, loaded: Any = loaded, name: str = name, model: str = model) -> Cache:
                found: Cache = own_cache(loaded, name, model, max_length=length)
                return found

            make(1)  # refused before anything is timed
            kinds.append(Kind(model, dtype if name == "latent" else name, loaded, make))
    return kinds


def held_within(
    budget: int,
    kinds: Sequence[Kind],
    contexts: Sequence[int],
    steps: int,
    repeats: int,
    device: torch.device,
    progress: Progress,
) -> Budget:
    """The largest number of texts of each length whose caches fit into so many bytes, and tokens per second.

    kinds: the first one is that to which speeds are compared
    """
    if min(contexts) <= steps:
        raise GeometryError(
            "a text is too short",
            where="--context / --steps",
            why=f"{steps} of its {min(contexts)} tokens are decoded, and nothing is left to read before",
            remedy=f"use contexts above {steps}, or fewer --steps",
        )
    vocabulary = min(int(kind.loaded.config.vocab_size) for kind in kinds)
    rows: list[Held] = []
    for number, context in enumerate(contexts):
        generator = torch.Generator().manual_seed(context)
        ids_1S = torch.randint(vocabulary, (1, context), generator=generator).to(device)
        base, others = _Turn(kinds[0], ids_1S, steps, budget), []
        for place, kind in enumerate(kinds[1:], 1):
            progress("bench", number * len(kinds) + place, len(contexts) * len(kinds), f"{kind.cache}, {context:,}")
            one = _Turn(kind, ids_1S, steps, budget, "the weights, the source's cache")
            _take_turns(base, one, repeats, device)
            others.append(one.row(base))
            del one
        if not base.seconds:
            _take_turns(base, None, repeats, device)
        rows += [base.row(base), *others]
    return Budget(budget, tuple(rows))


class _Turn:
    """A cache that fills the budget, and the times of decoding with it; `paired` are the source's beside them.

    beside: what else is in memory
    """

    def __init__(self, kind: Kind, ids_1S: Tensor, steps: int, budget: int, beside: str = "the weights") -> None:
        self._beside = beside
        self.kind, self.steps, self.context = kind, steps, ids_1S.shape[1]
        self.seconds: list[float] = []
        self.paired: list[float] = []
        self.remark = kind.counted
        self.ids_1T, self.bytes_per_text, self.texts = ids_1S[:, -steps:], 0, 0
        self.cache: Any = None
        windows = self._guarded(lambda: self._fill(ids_1S[:, :-steps]))
        if self.cache is None:
            return
        self.texts = budget // self.bytes_per_text
        if not self.texts:
            self.remark = f"one text takes {size(self.bytes_per_text)}"
        if self.remark:
            self.cache = None
            return
        rewind(self.cache, steps, windows)
        self._guarded(lambda: self.cache.batch_repeat_interleave(self.texts))
        self._windows: dict[int, Any] = {} if self.cache is None else forgetful(self.cache)
        found = None if self.cache is None else self._guarded(lambda: packing(self.cache, steps, ids_1S.device))
        self._packing: float = found or 0.0

    def _fill(self, ids_1S: Tensor) -> dict[int, Any]:
        """Read a text and see what the cache of it takes at the most while the steps are made; its layers with a window
        before these."""
        self.cache = fill(self.kind.loaded, ids_1S, lambda: self.kind.make(self.context))
        windows = forgetful(self.cache)
        for token_11 in torch.split(self.ids_1T, 1, dim=1):
            decode(self.kind.loaded, self.cache, token_11, ids_1S.device)
            self.bytes_per_text = max(self.bytes_per_text, held_bytes(self.cache))
        return windows

    def step(self, device: torch.device) -> float | None:
        """Seconds of one step of all texts; None if there is nothing to time."""
        if self.cache is None:
            return None
        ids_BT = self.ids_1T.expand(self.texts, -1)
        found: float | None = self._guarded(lambda: decode(self.kind.loaded, self.cache, ids_BT, device))
        if found is None:
            return None
        rewind(self.cache, self.steps, self._windows)
        return found / self.steps + self._packing

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            with torch.inference_mode():
                return call()
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            what = (
                f"it fits, but not beside {self._beside} and a step"
                if self.texts
                else f"one text beside {self._beside}"
            )
            self.cache, self.remark = None, f"out of memory: {what}"
            return None

    def row(self, base: _Turn) -> Held:
        rates = sorted(self.texts / taken for taken in self.seconds)
        ratio = None
        if rates:
            beside = self.seconds if self is base else self.paired
            if beside:
                ratio = statistics.median(rates) / statistics.median(base.texts / taken for taken in beside)
        return Held(
            self.kind.model, self.kind.cache, self.context, self.texts, self.texts * self.context, self.bytes_per_text,
            statistics.median(rates) if rates else None, rates[0] if rates else None, rates[-1] if rates else None,
            ratio, self.remark,
        )  # fmt: skip


def _take_turns(base: _Turn, one: _Turn | None, repeats: int, device: torch.device) -> None:
    """Time both, `repeats` times in turns after one that warms up."""
    if one is not None and one.cache is None:
        return
    for repeat in range(-1, repeats):
        beside = base.step(device)
        own = None if one is None else one.step(device)
        if repeat < 0:
            continue
        if beside is not None:
            base.seconds.append(beside)
        if one is not None and own is not None:
            one.seconds.append(own)
            if beside is not None:
                one.paired.append(beside)
