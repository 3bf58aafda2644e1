"""A first visit to a GPU in a few minutes: convert, measure, heal and time one model; results are written after every
stage.

    python benchmarks/gpu.py SRC --texts DIR --latent 96 --rope 32 --seconds 440 --out DIR [--device cpu --tiny]

DIR holds wikitext2-train-part.txt and docs.txt (any large text) to train on, and the texts that are measured on:
wikitext2-valid.raw, c4-sample.txt, tinystories-valid.txt, stdlib-code.txt. What does not fit into the time is left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import transmla

MEASURED = ("wikitext2-valid.raw", "c4-sample.txt", "tinystories-valid.txt", "stdlib-code.txt")
# bytes per second of a large copy on an H100, read and written, as measured there
BANDWIDTH = 3.0e12


class Stages:
    """What is found, stage by stage; a stage that fails leaves its traceback, and the next one runs."""

    def __init__(self, device: str, seconds: float, out: Path) -> None:
        self.device, self.out, self.found = device, out, {}  # type: ignore[var-annotated]
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def run(self, name: str, work: Callable[[], Any], needs: float = 0) -> None:
        """needs: seconds that must be left, else the stage is skipped"""
        if self.left < needs:
            self.found[name] = {"skipped": f"{self.left:.0f} s were left"}
            return
        started, on_gpu = time.monotonic(), self.device == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            self.found[name] = {"result": work()}
        except Exception:
            self.found[name] = {"error": traceback.format_exc()}
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = {"host": host, "gpu": torch.cuda.max_memory_allocated() if on_gpu else 0}
        self.found[name] |= {"seconds": round(time.monotonic() - started, 2), "peak": peak}
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        (self.out / "gpu.json").write_text(json.dumps(self.found, indent=1, default=str) + "\n", encoding="utf-8")
        print(name, str(self.found[name])[:300], flush=True)


def watch() -> tuple[Callable[[str, int, int, str], None], dict[str, float]]:
    """A progress function, and the seconds that it has seen go by in each stage."""
    spent: dict[str, float] = {}
    last = time.monotonic()

    def progress(stage: str, done: int, total: int, remark: str) -> None:
        nonlocal last
        now = time.monotonic()
        spent[stage] = spent.get(stage, 0.0) + now - last
        last = now

    return progress, spent


def milliseconds(work: Callable[[], Any], device: str, repeats: int = 20) -> float:
    """Median of repeats, after three to warm up."""
    for _ in range(3):
        work()
    taken = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            work()
            taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def attention(device: str, contexts: list[int]) -> list[dict[str, Any]]:
    """One query per head against a latent cache, 32 heads: fused calls and plain products, beside the time it takes to
    read the cache once."""
    attend, rows = torch.nn.functional.scaled_dot_product_attention, []
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for rank, rope in ((512, 64), (256, 64), (96, 32)):
        for batch in (1, 16):
            for size in contexts:
                query = torch.randn(batch, 32, 1, rank + rope, device=device, dtype=dtype)
                key = torch.randn(batch, 1, size, rank + rope, device=device, dtype=dtype)
                value, scale = key[..., :rank], (rank + rope) ** -0.5

                def products(query: Any = query, key: Any = key, value: Any = value, scale: float = scale) -> Any:
                    scores = (query[:, :, 0] @ key[:, 0].mT).float() * scale
                    return scores.softmax(-1).to(value.dtype) @ value[:, 0]

                ways = {
                    "heads": lambda q=query, k=key, v=value, s=scale: attend(q, k, v, scale=s, enable_gqa=True),
                    "rows": lambda q=query, k=key, v=value, s=scale: attend(q.transpose(1, 2), k, v, scale=s),
                    "products": products,
                }
                row: dict[str, Any] = {"rank": rank, "rope": rope, "batch": batch, "context": size}
                row["floor_ms"] = 1e3 * key.numel() * key.itemsize / BANDWIDTH
                for name, way in ways.items():
                    try:
                        row[name] = milliseconds(way, device)
                    except torch.OutOfMemoryError:
                        row[name] = "out of memory"
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--latent", type=int, default=96)
    parser.add_argument("--rope", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=440)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few tokens of everything, to try the script")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stages, work = Stages(args.device, args.seconds, args.out), Path(tempfile.mkdtemp())
    window, batch = (256, 4) if args.tiny else (1024, 16)
    texts = [str(args.texts / name) for name in MEASURED]

    def convert() -> dict[str, Any]:
        progress, spent = watch()
        mix = f"{args.texts / 'wikitext2-train-part.txt'}:2+synthetic+code"
        report = transmla.convert(
            args.source, work / "fast", latent=args.latent, rope=args.rope, device=args.device, calibration=mix,
            progress=progress, **({"tokens": 8192, "window": 256} if args.tiny else {}),
        )  # fmt: skip
        ratio = math.exp(report.heldout.converted - report.heldout.source)
        return {"heldout_ratio": ratio, "seconds": report.seconds, "spent": spent}

    def quality(name: str) -> dict[str, Any]:
        settings: dict[str, Any] = {"windows": 2 if args.tiny else 16, "length": window, "device": args.device}
        found = transmla.evaluate(work / name, against=args.source, text=texts, **settings).plain()
        return {Path(text).name: ratio for text, ratio in found["comparison"]["texts"].items()}

    def heal(name: str, tokens: int, data: str, evaluations: int) -> dict[str, Any]:
        progress, spent = watch()
        report = transmla.heal(
            work / "fast", work / name, source=args.source, device=args.device, tokens=tokens, window=window,
            batch=batch, micro=batch, rate=1e-3, data=data, watch=texts[0], evaluations=evaluations,
            heldout=2 if args.tiny else 8, progress=progress,
        )  # fmt: skip
        (args.out / f"{name}.json").write_bytes((work / name / "healing.json").read_bytes())
        rates = {"tokens_per_second": report.tokens / spent["heal"], "trained": report.num_trained}
        return {"tokens": report.tokens, "before": report.before, "after": report.after, "spent": spent} | rates

    def heal_as_long_as_there_is_time() -> dict[str, Any]:
        probed = stages.found["heal, probe"].get("result", {})
        rate = probed.get("tokens_per_second", 20_000)
        tokens = 8192 if args.tiny else int(rate * (stages.left - 75) * 0.9)
        data = f"{args.texts / 'wikitext2-train-part.txt'}:3+{args.texts / 'docs.txt'}:4+synthetic:2+continued+code:2"
        return heal("healed", tokens, data, 6)

    def bench() -> dict[str, Any]:
        contexts, batches = ([128], [1]) if args.tiny else ([2048, 8000], [1, 16])
        grid: dict[str, Any] = {"contexts": contexts, "batches": batches, "steps": 8, "device": args.device}
        return transmla.bench(work / "fast", against=args.source, **grid).plain()

    stages.run("convert", convert)
    stages.run("quality, converted", lambda: quality("fast"))
    stages.run("attention", lambda: attention(args.device, [256] if args.tiny else [2048, 8192, 32768, 65536]), 20)
    stages.run("heal, probe", lambda: heal("probe", 8192 if args.tiny else 2**19, "synthetic+code", 2), 40)
    stages.run("heal", heal_as_long_as_there_is_time, 90)
    stages.run("quality, healed", lambda: quality("healed"), 15)
    stages.run("bench", bench, 40)


if __name__ == "__main__":
    main()
