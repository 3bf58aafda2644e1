"""Quality of converted folders beside their source: several texts, positions up to the full context, cache baselines,
lm-eval tasks and a needle. Writes one JSON file per model, which benchmarks/frontier.py turns into table and plot.

    python benchmarks/quality.py SRC [MODEL ...] --texts wikitext2-valid.raw c4-sample.jsonl tinystories-valid.txt
                                 [--tasks local_piqa ... --include-path DIR] [--needle 1024 2048] --out DIR

Needs `pip install lm-eval` for --tasks, and wonderwords and nltk for --needle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import torch

from transmla.calibrate.tokens import read_text
from transmla.evaluation.cache import measured_bytes_per_token
from transmla.evaluation.perplexity import Perplexity, perplexity, ratio, text_windows
from transmla.evaluation.quantised_cache import bits_per_value, keys_by_channel, rounding_cache, values_by_token
from transmla.loading import is_converted, load_any, load_tokenizer

LENGTH, WINDOWS = 1024, 16
# positions are averaged over these ranges; a window spans the whole context
EDGES = (0, 512, 1024, 2048, 4096, 8192)
BITS = (8, 4, 2)


def code() -> str:
    """Python source of the standard library: a kind of text that nobody calibrated on."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((folder / name).read_text("utf-8") for name in ("argparse.py", "tarfile.py", "typing.py"))


def windows(text: str, tokenizer: Any, length: int, count: int) -> torch.Tensor:
    content = code() if text == "code" else read_text(text, 40 * length * count, evaluation=True)
    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    return text_windows(ids, length, count, text)


def by_position(model: Any, ids_NT: torch.Tensor) -> list[list[float]]:
    """Mean nats of each window in each range of positions."""
    found = []
    for ids_T in ids_NT:
        with torch.no_grad():
            hidden_TD = model.model(ids_T[None], use_cache=False).last_hidden_state[0]
            nats = []
            for part, labels in zip(hidden_TD[:-1].split(1024), ids_T[1:].split(1024), strict=True):
                logits = model.lm_head(part).float()
                nats.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        nats_T = torch.cat(nats)
        found.append([float(nats_T[a:b].mean()) for a, b in itertools.pairwise(EDGES)])
    return found


def quantised(model: Any, ids_NT: torch.Tensor, converted: bool, bytes_per_token: float) -> list[dict[str, Any]]:
    """The same windows with a rounded cache."""
    rows = []
    for bits in BITS:
        key = values_by_token(bits) if converted else keys_by_channel(bits)
        found = perplexity(model, ids_NT, cache=lambda key=key, bits=bits: rounding_cache(key, values_by_token(bits)))
        size = bytes_per_token * bits_per_value(bits) / 16
        rows.append({"bits": bits, "bytes_per_token": size, "nats": list(found.nats_N)})
        print(f"  {bits}-bit cache: {found.value:.3f}, {size:,.0f} bytes per token", flush=True)
    return rows


def tasks(model: Any, tokenizer: Any, names: list[str], include: str | None, limit: int | None) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=names,
        limit=limit,
        task_manager=TaskManager(include_path=include),
        verbosity="ERROR",
    )
    return {
        name: {key: value for key, value in row.items() if key != "alias"} for name, row in found["results"].items()
    }


def needle(model: Any, tokenizer: Any, name: str, lengths: list[int], limit: int) -> dict[str, Any]:
    """RULER's niah_single_1: share of needles found, by context length."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max(lengths) + 256),
        tasks=["niah_single_1"],
        limit=limit,
        task_manager=TaskManager(metadata={"max_seq_lengths": lengths, "tokenizer": name}),
        verbosity="ERROR",
    )
    row = found["results"]["niah_single_1"]
    return {str(length): row.get(f"{length},none") for length in lengths} | {"samples": limit}


def measure(name: str, source: str, arguments: argparse.Namespace) -> dict[str, Any]:
    tokenizer = load_tokenizer(source)
    model = load_any(name, dtype=torch.bfloat16)
    bytes_per_token = measured_bytes_per_token(model)
    result: dict[str, Any] = {"model": Path(name).name, "bytes_per_token": bytes_per_token, "texts": {}}
    print(f"{result['model']}: {bytes_per_token:,.0f} bytes per token", flush=True)
    for text in arguments.texts:
        ids_NT = windows(text, tokenizer, LENGTH, WINDOWS)
        found = perplexity(model, ids_NT)
        result["texts"][Path(text).stem] = list(found.nats_N)
        print(f"  {Path(text).stem}: {found.value:.3f} ± {found.standard_error:.3f}", flush=True)
    first = windows(arguments.texts[0], tokenizer, LENGTH, WINDOWS)
    if arguments.quantised:
        result["quantised"] = quantised(model, first, is_converted(Path(name)), bytes_per_token)
    if arguments.positions:
        long = windows(arguments.texts[0], tokenizer, EDGES[-1], arguments.positions)
        result["positions"] = {"edges": list(EDGES), "nats": by_position(model, long)}
        means = [sum(column) / len(column) for column in zip(*result["positions"]["nats"], strict=True)]
        print("  by position: " + ", ".join(f"{math.exp(mean):.2f}" for mean in means), flush=True)
    if arguments.tasks:
        result["tasks"] = tasks(model, tokenizer, arguments.tasks, arguments.include_path, arguments.limit)
        result["task_limit"] = arguments.limit
        for task, row in result["tasks"].items():
            print(f"  {task}: {row}", flush=True)
    if arguments.needle:
        result["needle"] = needle(model, tokenizer, source, arguments.needle, arguments.needle_samples)
        print(f"  needle: {result['needle']}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("models", nargs="*")
    parser.add_argument(
        "--texts", nargs="+", required=True, help="files, shipped texts or `code`; the first is in-domain"
    )
    parser.add_argument("--quantised", action="store_true", help="also with 8-, 4- and 2-bit caches")
    parser.add_argument("--positions", type=int, default=0, help="also by position, on so many windows of 8,192 tokens")
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--include-path")
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--needle", nargs="+", type=int, default=[])
    parser.add_argument("--needle-samples", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    base: dict[str, Any] | None = None
    for name in (arguments.source, *arguments.models):
        path = arguments.out / f"quality-{Path(name).name}.json"
        result = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        result |= measure(name, arguments.source, arguments)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if base is None:
            base = result
            continue
        for text, nats in result["texts"].items():
            found = ratio(Perplexity(tuple(nats), 0), Perplexity(tuple(base["texts"][text]), 0))
            print(f"  {text}: {found.value:.4f} ± {found.standard_error:.4f} of the source", flush=True)


if __name__ == "__main__":
    main()
