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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# name -> (changes to ClosedForm, to SplitOptions, arguments of convert); theta_exponent: rope_theta of SRC to a power
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "all parts": ({}, {}, {}),
    "real component instead of complex": ({}, {"complex_component": False}, {}),
    "pairs not weighted by queries": ({}, {"query_weighted": False}, {}),
    "leftovers not shrunk": ({}, {"shrink": False}, {}),
    "one stream, o_proj as in the source, errors not weighted by attention": (
        {"two_streams": False, "refit_output": False, "attention_weighted": False},
        {},
        {},
    ),
    "one stream, o_proj as in the source": ({"two_streams": False, "refit_output": False}, {}, {}),
    "theta' = theta^0.7": ({}, {}, {"theta_exponent": 0.7}),
    "theta' = theta^(e/d)": ({}, {}, {"theta_exponent": 0.5}),
    "112 + 16": ({}, {}, {"latent": 112, "rope": 16}),
    "real, not weighted, not shrunk": ({}, {"complex_component": False, "query_weighted": False, "shrink": False}, {}),
    "errors not weighted by attention": ({"attention_weighted": False}, {}, {}),
    "o_proj as in the source": ({"refit_output": False}, {}, {}),
    "one stream": ({"two_streams": False}, {}, {}),
    "theta' = theta^0.85": ({}, {}, {"theta_exponent": 0.85}),
    "3 alternating refits": ({"sweeps": 3}, {}, {}),
    "key_weight 1": ({"key_weight": 1.0}, {}, {}),
    "output_ridge 0.03": ({"output_ridge": 0.03}, {}, {}),
    "stream_ridge 0.01": ({"stream_ridge": 0.01}, {}, {}),
    "plain_share 0.1": ({"plain_share": 0.1}, {}, {}),
}


def run_one(source: str, calibration: str, text: str, tokens: int, name: str) -> dict[str, Any]:
    """Convert and measure one variant in this process."""
    import transmla
    from transmla.families import rope_parameters
    from transmla.maths.closed_form import ClosedForm
    from transmla.maths.rotary_split import SplitOptions

    method, split, given = VARIANTS[name]
    given = {"latent": 96, "rope": 32, "refine": "off"} | given
    own = float(rope_parameters(transmla.plan(source).source.config)["rope_theta"])
    given["theta"] = own ** given.pop("theta_exponent", 1.0)
    with tempfile.TemporaryDirectory() as folder:
        report = transmla.convert(
            source,
            Path(folder) / "out",
            calibration=calibration,
            tokens=tokens,
            context=1,  # windows as they are
            method=ClosedForm(split=SplitOptions(**split), **method),
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
    for row in sorted(rows, key=lambda row: list(VARIANTS).index(row["name"])):
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
    import transmla
    from transmla.checkpoint.provenance import versions

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
