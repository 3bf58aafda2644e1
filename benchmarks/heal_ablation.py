"""What each setting of healing does to one converted model, with the same tokens: divergence and perplexity on held-out
text, and repetition in what is written. Every run is `transmla heal`'s and `transmla eval`'s own call.

    python benchmarks/heal_ablation.py CONVERTED SOURCE --settings '{"tokens": 400000}' --vary '{"a": {}, "b": {...}}' \
        --text tinystories-valid --out benchmarks/results/heal/NAME.json [--generation 128 --windows 64]

Runs that are in the file already are kept, so that it can be given again with more of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transmla
from transmla.errors import GateError


def measured(model: str, source: str, given: argparse.Namespace) -> dict[str, Any]:
    report = transmla.evaluate(
        model, source, text=given.text, windows=given.windows, generation=given.generation, dtype=given.dtype
    )
    assert report.comparison is not None
    compared = report.comparison
    return {key: compared[key] for key in ("texts", "generation", "acceptance")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converted")
    parser.add_argument("source")
    parser.add_argument("--settings", type=json.loads, default={}, help="of all runs, as JSON")
    parser.add_argument("--vary", type=json.loads, required=True, help="name -> settings of one run, as JSON")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--generation", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(given.out.read_text("utf-8")) if given.out.is_file() else {"runs": {}}
    found |= {"converted": Path(given.converted).name, "source": Path(given.source).name, "settings": given.settings}
    runs = found["runs"]

    def keep(name: str, row: dict[str, Any]) -> None:
        runs[name] = row
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        texts = ", ".join(f"{text} {one['ratio']:.4f}" for text, one in row.get("texts", {}).items())
        loops = {way: one["repeated_4"]["model"] for way, one in row.get("generation", {}).items()}
        print(name, texts, loops, row.get("why", ""), flush=True)

    if "before" not in runs:
        keep("before", measured(given.converted, given.source, given))
    for name, changed in given.vary.items():
        if name in runs:
            continue
        folder = Path(tempfile.mkdtemp()) / "healed"
        settings = given.settings | changed
        try:
            report = transmla.heal(given.converted, folder, **settings)
            row = measured(str(folder), given.source, given) | {
                "changed": changed, "tokens": report.tokens, "seconds": round(report.seconds),
                "best_step": report.best_step, "steps": report.steps, "before": report.before, "after": report.after,
                "raised": report.raised, "tokens_per_second": round(report.tokens_per_second),
            }  # fmt: skip
        except GateError as error:
            row = {"changed": changed, "why": error.why}
        keep(name, row)
        shutil.rmtree(folder.parent, ignore_errors=True)


if __name__ == "__main__":
    main()
