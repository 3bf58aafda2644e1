"""Tokens per second that a model writes, as the program samples and as it did before with a static cache: steps in
the middle of texts, alternately in one run. `self`, `--sampled` and `--on-policy` wait for them.

    python benchmarks/sampling_speed.py MODEL [--length 256 --steps 6 --repeats 3] [--out FILE.json]

Rates are per second and per second of processor time, which is what counts on a machine that others use as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from transmla.devices import narrow_dtype
from transmla.model.loading import load_any
from transmla.text.decoding import decoding, draw, growing_cache, texts_at_once

# bytes of the cache and of three float32 copies of the logits of all texts that the former way had in memory
FORMER_BYTES, FORMER_MOST = 2**29, 512


def former_batch(model: Any, length: int) -> int:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize * length
    return max(1, min(FORMER_MOST, FORMER_BYTES // (cache + 12 * config.vocab_size)))


def fill(model: Any, cache: Any, batch: int, length: int) -> Any:
    """As if `length` tokens of each text were written: what they are does not matter for the time."""
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    for layer in cache.layers:
        layer.update(*(torch.zeros(batch, heads, length, width, dtype=model.dtype) for _ in range(2)))
    return cache


@torch.no_grad()
def former(model: Any, batch: int, length: int, steps: int) -> Callable[[], None]:
    cache = fill(model, StaticCache(config=model.config, max_cache_len=length), batch, length // 2)
    generator = torch.Generator().manual_seed(0)

    def run() -> None:
        ids_B1 = torch.full((batch, 1), 5)
        for _ in range(steps):
            logits_BV = model(ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
            ids_B1 = (logits_BV - noise_BV.log_()).argmax(-1, keepdim=True)

    return run


@torch.no_grad()
def now(model: Any, batch: int, length: int, steps: int) -> Callable[[], None]:
    cache = fill(model, growing_cache(model), batch, length // 2)
    drawn_BN = torch.rand(batch, steps, dtype=torch.float64)

    def run() -> None:
        ids_B1 = torch.full((batch, 1), 5)
        with decoding(model):
            for step in range(steps):
                logits_BV = model(ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                ids_B1 = draw(logits_BV, drawn_BN[:, step])[:, None]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=256, help="of a text; steps are timed behind half of it")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    dtype = narrow_dtype(torch.device("cpu")) or torch.float32
    model = load_any(given.model, dtype=dtype)
    ways = {"former": (former, former_batch(model, given.length)), "now": (now, texts_at_once(model, given.length))}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    by_processor: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, given.repeats):
        for name, (way, batch) in ways.items():
            steps = given.steps if repeat >= 0 else 1
            run = way(model, batch, given.length, steps)
            begun = time.perf_counter(), time.process_time()
            with torch.no_grad():
                run()
            elapsed, processor = (
                end - start for start, end in zip(begun, (time.perf_counter(), time.process_time()), strict=True)
            )
            if repeat >= 0:  # the first one warms up
                rates[name].append(round(batch * steps / elapsed, 1))
                by_processor[name].append(round(batch * steps / processor, 1))
                print(name, rates[name][-1], by_processor[name][-1], flush=True)
    found = {
        "model": Path(given.model).name, "length": given.length, "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."), "batch": {name: batch for name, (_, batch) in ways.items()},
        "tokens_per_second": rates, "tokens_per_second_of_processor": by_processor,
        "median_ratio_by_processor": round(
            statistics.median(new / old for old, new in zip(*by_processor.values(), strict=True)), 2
        ),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
