"""Parts of the closed form left out or added, on one real model: which of them pay?

    python benchmarks/variants.py SRC --calibration TRAIN --text VALID [--tokens 16384] [--jobs 2] [--out DIR]

Writes variants.json and variants.md into DIR, a row as soon as it is measured; rows that are there are not run again.
Defaults are chosen by the held-out windows of the calibration text; the validation text is only reported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import transmla
from transmla.checkpoint.provenance import versions
from transmla.conversion import fit, theta
from transmla.families import rope_parameters
from transmla.maths import closed_form, rotary_split

# A variant changes numbers of `ClosedForm`, arguments of convert (theta_exponent: rope_theta of SRC to a power), or
# replaces a step of the method by another one.
HELD = 1e12  # a ridge that holds everything where it is


@dataclass(frozen=True)
class Variant:
    method: dict[str, float] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    steps: tuple[Callable[[], None], ...] = ()


def real_component() -> None:
    """A real direction per bucket of rotary pairs instead of a complex one (RoRoPE, 2502.07864, section 4.1)."""

    def top(gram_GBGB: Tensor, omega_GB: Tensor) -> Tensor:
        weighted = (omega_GB[..., None, None] * gram_GBGB * omega_GB).flatten(2).flatten(0, 1)
        return torch.linalg.eigh(weighted.real)[1][:, -1].to(torch.complex128).unflatten(0, omega_GB.shape)

    rotary_split._top_component = top


def pairs_alike() -> None:
    """Every pair that gains from turning counts alike, whatever the queries ask of it."""

    def by_gain(query_Hdd: Tensor, importance_H: Tensor, gain_HP: Tensor, num_groups: int) -> Tensor:
        return (gain_HP.unflatten(0, (num_groups, -1)).mean(dim=1) > 0).double()

    rotary_split._pair_weights = by_gain


def not_shrunk() -> None:
    """What is left over to the latent is read as if it did not turn."""
    leftover = rotary_split._leftover
    rotary_split._leftover = lambda still_P, *rest: leftover(torch.ones_like(still_P), *rest)


def not_weighted() -> None:
    """Errors of all keys and values count alike, whatever attention they receive."""
    fit_aimed = closed_form.fit_aimed

    def fitted(aimed: Any, moments: Any, *rest: Any) -> Any:
        plain = moments.converted_DD
        return fit_aimed(aimed, replace(moments, received_DD=plain, attended_DD=plain), *rest)

    fit.fit_aimed = theta.fit_aimed = fitted


VARIANTS: dict[str, Variant] = {
    "all parts": Variant(),
    "real component instead of complex": Variant(steps=(real_component,)),
    "pairs not weighted by queries": Variant(steps=(pairs_alike,)),
    "leftovers not shrunk": Variant(steps=(not_shrunk,)),
    "one stream, o_proj as in the source, errors not weighted by attention": Variant(
        {"stream_ridge": HELD, "output_ridge": HELD}, steps=(not_weighted,)
    ),
    "one stream, o_proj as in the source": Variant({"stream_ridge": HELD, "output_ridge": HELD}),
    "theta' = theta^0.7": Variant(given={"theta_exponent": 0.7}),
    "theta' = theta^(e/d)": Variant(given={"theta_exponent": 0.5}),
    "112 + 16": Variant(given={"latent": 112, "rope": 16}),
    "real, not weighted, not shrunk": Variant(steps=(real_component, pairs_alike, not_shrunk)),
    "errors not weighted by attention": Variant(steps=(not_weighted,)),
    "o_proj as in the source": Variant({"output_ridge": HELD}),
    "one stream": Variant({"stream_ridge": HELD}),
    "theta' = theta^0.85": Variant(given={"theta_exponent": 0.85}),
    "key_weight 1": Variant({"key_weight": 1.0}),
    "output_ridge 0.03": Variant({"output_ridge": 0.03}),
    "stream_ridge 0.01": Variant({"stream_ridge": 0.01}),
    "plain_share 0.1": Variant({"plain_share": 0.1}),
}
# measured, and not part of the program any more
PAST = ("3 alternating refits",)


def run_one(source: str, calibration: str, text: str, tokens: int, name: str) -> dict[str, Any]:
    """Convert and measure one variant in this process."""
    variant = VARIANTS[name]
    for change in variant.steps:
        change()
    given = {"latent": 96, "rope": 32, "refine": "off"} | variant.given
    own = float(rope_parameters(transmla.plan(source).source.config)["rope_theta"])
    given["theta"] = own ** given.pop("theta_exponent", 1.0)
    with tempfile.TemporaryDirectory() as folder:
        report = transmla.convert(
            source,
            Path(folder) / "out",
            calibration=calibration,
            tokens=tokens,
            context=1,  # windows as they are
            method=closed_form.ClosedForm(**variant.method),
            **given,
        )
        found = transmla.evaluate(Path(folder) / "out", text=text).model.perplexity
    heldout = report.heldout
    return {
        "name": name,
        "heldout_nats": heldout.converted - heldout.source,
        "stream_error": report.layers[-1].stream_loss_heldout,
        "perplexity": found.value,
        "standard_error": found.standard_error,
        "nats_N": found.nats_N,
        "seconds": report.seconds,
    }


def table(rows: list[dict[str, Any]], source: dict[str, Any], header: str) -> str:
    """Markdown, rows in the order of `VARIANTS`."""
    lines = [
        header,
        "",
        "| variant | held-out calibration loss over source (nats) | stream error | validation perplexity | x source "
        "| median window |",
        "|---|---|---|---|---|---|",
        f"| source | 0 | 0 | {source['perplexity']:.2f} ± {source['standard_error']:.2f} | 1 | 1 |",
    ]
    for row in sorted(rows, key=lambda row: [*VARIANTS, *PAST].index(row["name"])):
        ratio = row["perplexity"] / source["perplexity"]
        losses = [found - own for found, own in zip(row["nats_N"], source["nats_N"], strict=True)]
        lines.append(
            f"| {row['name']} | {row['heldout_nats']:.4f} | {row['stream_error']:.2%} "
            f"| {row['perplexity']:.2f} ± {row['standard_error']:.2f} | {ratio:.3f} "
            f"| {math.exp(statistics.median(losses)):.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(run_one(args.source, args.calibration, args.text, args.tokens, args.only)))
        return
    store = args.out / "variants.json"
    results = json.loads(store.read_text()) if store.is_file() else {"rows": []}
    found = transmla.evaluate(args.source, text=args.text).model.perplexity
    results |= {
        "source": {"perplexity": found.value, "standard_error": found.standard_error, "nats_N": found.nats_N},
        "tokens": args.tokens,
        "versions": versions(),
    }
    header = (
        f"# Variants of the closed form\n\nSmolLM2-135M-Instruct, 96 + 32 of 384 cached values, {args.tokens:,} "
        "calibration tokens of WikiText-2 train; perplexity on 16 windows of 1,024 tokens of WikiText-2 validation, "
        "bfloat16. Written by `benchmarks/variants.py`."
    )

    def measure(name: str) -> None:
        command = [sys.executable, __file__, args.source, "--calibration", args.calibration, "--text", args.text]
        command += ["--tokens", str(args.tokens), "--only", name]
        threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": threads}
        ).stdout
        results["rows"].append(json.loads(output.decode().splitlines()[-1]))
        store.write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "variants.md").write_text(table(results["rows"], results["source"], header))
        print(name, "done", flush=True)

    missing = [name for name in VARIANTS if name not in {row["name"] for row in results["rows"]}]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(measure, missing))


if __name__ == "__main__":
    main()
