"""The closed form of two checkouts on the first layers of one model, in alternating runs: seconds, and what came out.

    python benchmarks/closed_form_speed.py SMOLLM2 --before CHECKOUT --layers 3 --tokens 131072 --out results/NAME.json

Processor time is what counts on a shared machine: of the stage that fits the layers, all threads together. Errors are
those of the last layer, so that a faster way that loses something is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHILD = """
import json, sys, time
import transmla
settings, result = json.loads(sys.argv[1]), sys.argv[2]
spent, last = {}, (time.monotonic(), time.process_time())
def progress(stage, done, total, remark):
    global last
    now = (time.monotonic(), time.process_time())
    wall, cpu = spent.get(stage, (0.0, 0.0))
    spent[stage] = (wall + now[0] - last[0], cpu + now[1] - last[1])
    last = now
found = transmla.convert(progress=progress, **settings)
layer = found.layers[-1]
report = {"seconds": spent["convert layers"][0], "processor_seconds": spent["convert layers"][1],
          "fitted": layer.stream_loss_fitted, "heldout": layer.stream_loss_heldout}
open(result, "w").write(json.dumps(report))
"""


def first_layers(model: Path, count: int, folder: Path) -> Path:
    """A folder with the files of `model` and a config of so many layers."""
    folder.mkdir()
    for file in model.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text("utf-8")) | {"num_hidden_layers": count}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def converted(checkout: Path, source: Path, work: Path, tokens: int, threads: int) -> dict[str, Any]:
    shutil.rmtree(work / "out", ignore_errors=True)
    settings = {
        "source": str(source), "destination": str(work / "out"), "latent": 96, "rope": 32, "refine": "off",
        "tokens": tokens, "theta": 10000.0,
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": str(threads)}
    result = work / "result.json"
    command = [sys.executable, "-c", CHILD, json.dumps(settings), str(result)]
    subprocess.run(command, env=environment, cwd=work, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = first_layers(args.model, args.layers, work / "source")
        checkouts = {"before": args.before, "after": Path(__file__).parents[1]}
        for _ in range(args.repeats):
            for which, checkout in checkouts.items():
                runs[which].append(converted(checkout, source, work, args.tokens, args.threads))
    ratios = {
        key: statistics.median(run[key] for run in runs["after"])
        / statistics.median(run[key] for run in runs["before"])
        for key in ("seconds", "processor_seconds", "heldout")
    }
    settings = {key: getattr(args, key) for key in ("layers", "tokens", "repeats", "threads")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(settings | {"after over before": ratios, "runs": runs}, indent=1) + "\n")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
