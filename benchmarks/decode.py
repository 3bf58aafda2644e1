"""Decoding speed and cache size of a source model and its converted folder, measured side by side.

    python benchmarks/decode.py SRC OUT --context 512,2048 --json decode.json

Three models in one process: the source, OUT in the stock class of transformers and OUT in the class of this
package. Each cache is filled with the same random tokens; then decoding steps are timed, the three models
taking turns within every repeat, so that a busy moment of the machine hits all of them.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

from transmla.loading import load

PREFILL_CHUNK = 512


def main() -> None:
    options = arguments()
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    models: dict[str, Any] = {}
    for name, read in readers(options.source, options.output).items():
        say(f"loading {name}")
        models[name] = read(dtype).to(device).eval()

    longest = min(model.config.max_position_embeddings for model in models.values())
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for context in options.context:
        if context > longest:
            notes.append(f"context {context} skipped: the models end at {longest} positions")
            continue
        # a full context leaves no place for the tokens that are timed
        context = min(context, longest - options.steps)
        rows += measure(models, context, options.steps, options.repeats, device)

    print(table(rows))
    for note in notes:
        print(f"\n{note}")
    if options.json:
        report = {"setting": setting(options, device), "rows": rows, "notes": notes}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", maxsplit=1)[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the source model")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder that transmla convert wrote")
    parser.add_argument("--context", type=sizes, default="512,2048,8192", help="tokens in the cache, comma separated")
    parser.add_argument("--steps", type=positive, default=16, help="decoding steps per timing")
    parser.add_argument("--repeats", type=positive, default=3, help="timings per model; the median is reported")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="number format")
    parser.add_argument("--device", default="cpu", help="torch device, for example cuda")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers here")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def sizes(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def readers(source: Path, output: Path) -> dict[str, Callable[[torch.dtype], Any]]:
    shared: dict[str, Any] = {"attn_implementation": "sdpa", "local_files_only": True}
    return {
        "source": lambda dtype: AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **shared),
        "converted, stock class": lambda dtype: DeepseekV3ForCausalLM.from_pretrained(output, dtype=dtype, **shared),
        "converted, own class": lambda dtype: load(output, dtype=dtype),
    }


def measure(
    models: dict[str, Any], context: int, steps: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """One row per model: median tokens per second, cache bytes per token, ratios to the first model."""
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(vocabulary, (1, context + steps), generator=generator).to(device)
    caches = {}
    for name, model in models.items():
        say(f"filling {context} tokens: {name}")
        caches[name] = fill(model, ids[:, :context])
    bytes_per_token = {name: cache_bytes(cache) / context for name, cache in caches.items()}

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(-1, repeats):
        for name, model in models.items():
            elapsed = decode(model, caches[name], ids[:, context:], device)
            caches[name].crop(-steps)
            # the first round warms up kernels and allocators
            if repeat >= 0:
                seconds[name].append(elapsed)
        say(f"context {context}: repeat {repeat + 1} of {repeats}")

    speed = {name: steps / statistics.median(times) for name, times in seconds.items()}
    first = next(iter(models))
    return [
        {
            "context_tokens": context,
            "model": name,
            "tokens_per_second": speed[name],
            "speed_ratio": speed[name] / speed[first],
            "seconds_per_repeat": seconds[name],
            "cache_bytes_per_token": bytes_per_token[name],
            "cache_ratio": bytes_per_token[name] / bytes_per_token[first],
        }
        for name in models
    ]


@torch.inference_mode()
def fill(model: Any, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache()
    for chunk in torch.split(ids, PREFILL_CHUNK, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.inference_mode()
def decode(model: Any, cache: DynamicCache, ids: torch.Tensor, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for token in torch.split(ids, 1, dim=1):
        model(token, past_key_values=cache)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def cache_bytes(cache: DynamicCache) -> int:
    layers: list[Any] = list(cache.layers)
    return sum(int(t.nbytes) for layer in layers for t in (layer.keys, layer.values))


def table(rows: list[dict[str, Any]]) -> str:
    head = ("context", "model", "tokens/s", "ratio", "cache bytes/token", "ratio")
    lines = [head] + [
        (
            str(row["context_tokens"]),
            row["model"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['speed_ratio']:.2f}x",
            f"{row['cache_bytes_per_token']:.0f}",
            f"{row['cache_ratio']:.3f}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def text(cells: tuple[str, ...]) -> str:
        padded = (c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + ("-" if i == 1 else ":") for i, w in enumerate(widths))
    return "\n".join([text(lines[0]), f"|{rule}|", *map(text, lines[1:])])


def setting(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "source": options.source.name,
        "output": options.output.name,
        "dtype": options.dtype,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "repeats": options.repeats,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
