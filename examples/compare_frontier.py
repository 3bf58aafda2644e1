"""What does a smaller cache cost? Convert at several sizes, measure each beside rounded caches, draw the frontier.

    python examples/compare_frontier.py [SOURCE] [--sizes 24+8,10+6] [--out FOLDER] [--windows 16]

Writes the folders, a result file for each, and frontier.png (needs `pip install 'transmla[report]'`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import transmla
from transmla.evaluation.report.plots import frontier
from transmla.evaluation.results import frontier_rows, frontier_table, read_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="stories260k")
    parser.add_argument("--sizes", default="24+8,10+6")
    parser.add_argument("--out", type=Path, default=Path("frontier"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--refine", default="fast")
    arguments = parser.parse_args()

    arguments.out.mkdir(exist_ok=True)
    files = []
    for size in arguments.sizes.split(","):
        latent, rope = map(int, size.split("+"))
        folder = arguments.out / f"mla-{latent}-{rope}"
        if not folder.exists():
            transmla.convert(arguments.source, folder, latent=latent, rope=rope, refine=arguments.refine)
        report = transmla.evaluate(folder, arguments.source, windows=arguments.windows, quantised=(8, 4, 2))
        print(report)
        files.append(arguments.out / f"{folder.name}.json")
        files[-1].write_text(json.dumps(report.plain(), allow_nan=False), encoding="utf-8")
    rows = frontier_rows(read_results(files))
    print(frontier_table(rows))
    frontier(rows).savefig(arguments.out / "frontier.png", dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
