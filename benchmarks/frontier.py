"""Table and plot of what `transmla eval --json` has measured: perplexity against cache bytes per token.

    python benchmarks/frontier.py eval/results/smollm2-*.json --out benchmarks/results [--published published.json]

Writes frontier.md and frontier.png. Published methods come from a JSON file of rows with name, bytes_per_token and
ratio.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transmla.evaluation.report.plots import frontier
from transmla.evaluation.results import frontier_rows, frontier_table, read_published, read_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--published", type=Path)
    arguments = parser.parse_args()
    rows = frontier_rows(read_results(arguments.results), read_published(arguments.published))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "frontier.md").write_text(frontier_table(rows), encoding="utf-8")
    frontier(rows).savefig(arguments.out / "frontier.png", dpi=150, facecolor="white")
    print(frontier_table(rows))


if __name__ == "__main__":
    main()
