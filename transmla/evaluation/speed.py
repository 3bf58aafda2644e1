"""`transmla bench`: prefill and decoding of a converted model and its source, side by side.

All models are in memory at once and take turns within every repeat, so that a busy moment of the machine hits all of
them. Beside each time stands its floor: the bytes and multiply-adds of one decoding step over what this machine moves
and multiplies, measured in the same run (Williams et al., "Roofline", CACM 52/4).

Legend: B batch, S cached tokens.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import Cache

from transmla.checkpoint.provenance import commit, portable, versions
from transmla.devices import named, usable
from transmla.errors import GeometryError
from transmla.evaluation.budget import Budget, held_within, kinds_of
from transmla.evaluation.cache import cache_bytes
from transmla.evaluation.roofline import Rates, machine_rates, step_cost, wait
from transmla.evaluation.steps import PREFILL_CHUNK, decode, fill, forgetful, packing, ran_out_of_memory, rewind
from transmla.model.generation import own_cache
from transmla.model.loading import is_converted, load, load_any
from transmla.progress import Progress, silent
from transmla.tables import Shown


@dataclass(frozen=True)
class Timing:
    """One model at one batch and context. Speeds are medians over the repeats, with the smallest and the largest.

    first_token_seconds: the whole context, from nothing to the first new token
    tokens_per_second:   of decoding, all texts of the batch together
    floor_seconds:       of one decoding step, by the roofline;  peak_bytes: allocated, CUDA only
    failed:              why there are no numbers
    """

    model: str
    batch: int
    context: int
    first_token_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    slowest: float | None = None
    fastest: float | None = None
    speed_ratio: float | None = None
    cache_bytes_per_token: float | None = None
    floor_seconds: float | None = None
    of_floor: float | None = None
    peak_bytes: int | None = None
    failed: str | None = None


@dataclass(frozen=True)
class BenchReport(Shown):
    """rows: by batch and context, the source first; speed_ratio is to it.  budget: what fits, if that was asked for"""

    rows: tuple[Timing, ...]
    rates: Rates
    notes: tuple[str, ...]
    setting: dict[str, Any]
    budget: Budget | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON, without absolute paths."""
        content = {
            "rows": [asdict(row) for row in self.rows],
            "rates": asdict(self.rates),
            "notes": list(self.notes),
            "setting": self.setting,
            "budget": None if self.budget is None else asdict(self.budget),
        }
        found: dict[str, Any] = portable(content)
        return found

    def show(self, console: Console) -> None:
        from transmla.evaluation.show_bench import show_bench

        show_bench(self, console)


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    contexts: Sequence[int] = (512, 2048, 8192),
    batches: Sequence[int] = (1,),
    steps: int = 16,
    repeats: int = 3,
    stock: bool = False,
    caches: Sequence[str] = (),
    cache_budget: int | None = None,
    dtype: str = "bfloat16",
    device: str = "auto",
    progress: Progress | None = None,
) -> BenchReport:
    """Time a model, and its source in the same run.

    model:    converted folder, or a source;  against: the source, to which speeds are compared
    contexts: cached tokens per text;  batches: texts at once. A grid until memory ends: sizes that do not fit are named
    steps:    decoding steps per timing;  repeats: timings, after one that warms up
    stock:    also the stock transformers class of a converted folder
    caches:   also a converted folder with these caches of its own, as "latent-int4"
    cache_budget: bytes of caches; in place of `batches`, as many texts as fit in each cache: the source's as computed
              and, counted alone, at 4 bits, and `caches` of the converted folder (by default its own as computed, int8,
              int4, and coded3 if it is prepared)
    """
    tell = progress or silent
    device = named(device)
    where, number_format = usable(device), getattr(torch, dtype)
    models = _loaded(model, against, stock, number_format, where)
    makers = {} if cache_budget is not None else _caches(models, str(model), caches)
    longest = min(int(one.config.max_position_embeddings) for one in models.values())
    if min(contexts) > longest:
        raise GeometryError(
            "no context fits the model",
            where="--context",
            why=f"it ends at {longest:,} positions",
            remedy=f"use contexts up to {longest - steps:,}",
        )
    if steps >= longest:
        raise GeometryError(
            "the steps do not fit the model",
            where="--steps",
            why=f"it ends at {longest:,} positions, and {steps:,} tokens are decoded behind the context",
            remedy=f"use fewer than {longest:,}",
        )
    notes = [f"context {size:,} left out: the models end at {longest:,}" for size in contexts if size > longest]
    sizes = [min(size, longest - steps) for size in contexts if size <= longest]
    rates = machine_rates(where, number_format)
    for one in models.values():  # what is compiled or allocated once is not to be timed
        fill(one, torch.zeros(1, 8, dtype=torch.long, device=where))
    rows: list[Timing] = []
    budget = None
    if cache_budget is not None:
        contexts = [size for size in contexts if size <= longest]
        kinds = kinds_of(models, caches, dtype)
        budget = held_within(cache_budget, kinds, contexts, steps, repeats, where, tell)
    grid = [] if budget else [(batch, context) for batch in batches for context in sizes]
    for number, (batch, context) in enumerate(grid):
        tell("bench", number, len(grid), f"batch {batch}, context {context:,}")
        rows += _measured(models, makers, batch, context, steps, repeats, where, rates)
    tell("bench", 1, 1, "")
    setting = {
        "dtype": dtype, "device": device, "device_name": _device_name(where), "threads": torch.get_num_threads(),
        "steps": steps, "repeats": repeats, "versions": versions(), "commit": commit(),
    }  # fmt: skip
    return BenchReport(tuple(rows), rates, tuple(notes), setting, budget)


def _loaded(
    model: str | Path, against: str | Path | None, stock: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    models: dict[str, Any] = {}
    if against is not None:
        models[str(against)] = load_any(against, dtype=dtype, device=device)
    if is_converted(Path(model)):
        models[str(model)] = load(model, dtype=dtype, device=device)
        if stock:
            from transformers import DeepseekV3ForCausalLM

            loaded: Any = DeepseekV3ForCausalLM.from_pretrained(str(model), dtype=dtype, local_files_only=True)
            models[f"{model}, stock class"] = loaded.to(device).eval()
    else:
        models[str(model)] = load_any(model, dtype=dtype, device=device)
    return models


def _caches(models: dict[str, Any], name: str, kinds: Sequence[str]) -> dict[str, Callable[[], Cache] | None]:
    """What makes the cache of each model, see `fill`; the converted one comes once more for each of its own caches."""
    makers: dict[str, Callable[[], Cache] | None] = dict.fromkeys(models)
    for kind in kinds:
        models[f"{name}, {kind}"] = models[name]
        makers[f"{name}, {kind}"] = make = functools.partial(own_cache, models[name], kind, name)
        make()
    return makers


def _measured(
    models: dict[str, Any],
    makers: dict[str, Callable[[], Cache] | None],
    batch: int,
    context: int,
    steps: int,
    repeats: int,
    device: torch.device,
    rates: Rates,
) -> list[Timing]:
    """One row per model; a model whose cache does not fit has a row that says so."""
    vocabulary = min(one.config.vocab_size for one in models.values())
    generator = torch.Generator().manual_seed(context)
    ids_BS = torch.randint(vocabulary, (batch, context + steps), generator=generator).to(device)
    caches: dict[str, Any] = {}
    first: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    for name, model in models.items():
        try:
            # kernels of chunks of this size are loaded, and their memory is there, before the clock runs
            fill(model, ids_BS[:, : min(context, 2 * PREFILL_CHUNK)], makers[name])
            wait(device)
            before = _memory_before(device)
            started = time.perf_counter()
            caches[name] = fill(model, ids_BS[:, :context], makers[name])
            wait(device)
            first[name] = time.perf_counter() - started
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            failed[name] = "out of memory"
            gc.collect()
            continue
        peaks[name] = _peak(model, before, device)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    windows = {name: forgetful(cache) for name, cache in caches.items()}
    packed: dict[str, float] = {}
    for repeat in range(-1, repeats):
        for name in list(caches):
            try:
                elapsed = decode(models[name], caches[name], ids_BS[:, context:], device)
                if repeat < 0:
                    packed[name] = packing(caches[name], steps, device)
            except (MemoryError, RuntimeError) as error:
                if not ran_out_of_memory(error):
                    raise
                failed[name] = "out of memory"
                del caches[name], windows[name], seconds[name]
                gc.collect()
                continue
            rewind(caches[name], steps, windows[name])
            if repeat >= 0:  # the first one warms up kernels and allocators
                seconds[name].append(elapsed / steps + packed[name])
    rows = []
    base = next(iter(models))
    for name, model in models.items():
        if name in failed:
            rows.append(Timing(name, batch, context, failed=failed[name]))
            continue
        stored = cache_bytes(caches[name])
        median = statistics.median(seconds[name])
        multiply_adds, moved = step_cost(model, batch, context, stored)
        floor = max(multiply_adds / rates.multiply_adds, moved / rates.bytes)
        rows.append(
            Timing(
                model=name,
                batch=batch,
                context=context,
                first_token_seconds=first[name],
                prefill_tokens_per_second=batch * context / first[name],
                tokens_per_second=batch / median,
                slowest=batch / max(seconds[name]),
                fastest=batch / min(seconds[name]),
                speed_ratio=statistics.median(seconds[base]) / median if base in seconds else None,
                cache_bytes_per_token=stored / (batch * context),
                floor_seconds=floor,
                of_floor=median / floor,
                peak_bytes=peaks[name],
            )
        )
    return rows


def _memory_before(device: torch.device) -> int:
    """Bytes that are allocated on a GPU, from where on its peak is watched."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(model: Any, before: int, device: torch.device) -> int | None:
    """Bytes of the model, and what a GPU has needed beyond `before`, which holds other models and caches, too."""
    if device.type != "cuda":
        return None
    return int(model.get_memory_footprint()) + torch.cuda.max_memory_allocated(device) - before


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
