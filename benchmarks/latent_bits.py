"""Refinement with latents rounded as in a packed cache and without, read through that cache on the same windows.

    python benchmarks/latent_bits.py FOLDER --out benchmarks/results/quantised/stories-latent-bits.json

Does for sizes 24 + 8 and 16 + 8, seeds 0 to 2, and no, 2 and 3 bits

    transmla convert stories260k OUT --recipe stories260k --latent L --rope 8 --theta 10000 --seed S [--latent-bits N]
    transmla eval OUT --against none --quantised N --dtype float32 --windows 48 --length 512 --json OUT.json

with N 2 and 3 where no bits were given, and prints a table. The theta is the one that `auto` chooses at 24 + 8; to
choose it takes half of the time. FOLDER keeps conversions and results; what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import transmla
from transmla.evaluation.perplexity import Perplexity, ratio

SIZES, ROPE, SEEDS, BITS = (24, 16), 8, (0, 1, 2), (2, 3)
WINDOWS, LENGTH = 48, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for latent in SIZES:
        runs = {(bits, seed): _run(arguments.folder, latent, bits, seed) for bits in (None, *BITS) for seed in SEEDS}
        rows += [_row(latent, bits, runs) for bits in BITS]
        for row in rows[-len(BITS) :]:
            print("|", " | ".join(_cells(row)), "|", flush=True)
    arguments.out.write_text(json.dumps({"windows": WINDOWS, "length": LENGTH, "rows": rows}, indent=2) + "\n", "utf-8")


def _run(folder: Path, latent: int, bits: int | None, seed: int) -> dict[str, Perplexity]:
    """What one conversion comes to, by cache."""
    out = folder / f"{latent}-{ROPE}-bits-{bits}-seed-{seed}"
    result = out.with_suffix(".json")
    if not out.exists():
        transmla.convert(
            "stories260k", out, recipe="stories260k", latent=latent, rope=ROPE, theta=10000.0, seed=seed,
            latent_bits=bits, device="cpu",
        )  # fmt: skip
    if not result.exists():
        report = transmla.evaluate(
            out, quantised=BITS if bits is None else (bits,), windows=WINDOWS, length=LENGTH, dtype="float32",
            device="cpu",
        )  # fmt: skip
        result.write_text(json.dumps(report.plain()), "utf-8")
    model: Any = json.loads(result.read_text("utf-8"))["model"]
    (text,) = model["texts"].values()
    found = {row["cache"]: Perplexity(tuple(row["nats"]), text["num_tokens"]) for row in model["quantised"]}
    return found | {"exact": Perplexity(tuple(text["nats"]), text["num_tokens"])}


def _row(latent: int, bits: int, runs: dict[tuple[int | None, int], dict[str, Perplexity]]) -> dict[str, Any]:
    """Perplexities with `--latent-bits` over those without, seeds together and each."""
    cache = f"int{bits}"

    def over_seeds(trained: int | None, kind: str) -> Perplexity:
        by_seed = [runs[trained, seed][kind] for seed in SEEDS]
        return Perplexity(
            tuple(statistics.fmean(nats) for nats in zip(*(one.nats_N for one in by_seed), strict=True)),
            by_seed[0].num_tokens,
        )

    def both(model: Perplexity, other: Perplexity) -> list[float]:
        found = ratio(model, other)
        return [round(found.value, 5), round(found.standard_error, 5)]

    return {
        "latent": latent,
        "rope": ROPE,
        "bits": bits,
        "rounding_without": both(over_seeds(None, cache), over_seeds(None, "exact")),
        "rounding_with": both(over_seeds(bits, cache), over_seeds(bits, "exact")),
        "packed": both(over_seeds(bits, cache), over_seeds(None, cache)),
        "exact": both(over_seeds(bits, "exact"), over_seeds(None, "exact")),
        "packed_by_seed": [both(runs[bits, seed][cache], runs[None, seed][cache]) for seed in SEEDS],
        "perplexity": [over_seeds(None, cache).value, over_seeds(bits, cache).value],
    }


def _cells(row: dict[str, Any]) -> list[str]:
    values = (row[key] for key in ("rounding_without", "rounding_with", "packed", "exact"))
    seeds = ", ".join(f"{value:.4f}" for value, _ in row["packed_by_seed"])
    errors = [f"{value:.4f} ± {error:.4f}" for value, error in values]
    return [f"{row['latent']} + {row['rope']}", str(row["bits"]), *errors, seeds]


if __name__ == "__main__":
    main()
