"""Table and plot of what benchmarks/quality.py has measured: perplexity against cache bytes per token.

    python benchmarks/frontier.py RESULTS_DIR --source NAME --text wikitext2-valid [--published published.json]

Writes frontier.md and frontier.png beside the results. Published methods come from a JSON file of rows with name,
bytes_per_token and ratio.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from transmla.evaluation.perplexity import Perplexity, ratio


def row(name: str, group: str, size: float, nats: list[float], source: list[float]) -> dict[str, Any]:
    found, base = Perplexity(tuple(nats), 0), Perplexity(tuple(source), 0)
    compared = ratio(found, base)
    return {
        "name": name, "group": group, "bytes_per_token": size, "perplexity": found.value,
        "perplexity_error": found.standard_error, "ratio": compared.value, "ratio_error": compared.standard_error,
    }  # fmt: skip


def collect(folder: Path, source: str, text: str) -> list[dict[str, Any]]:
    results = {
        path.stem.removeprefix("quality-"): json.loads(path.read_text("utf-8"))
        for path in folder.glob("quality-*.json")
    }
    base = results.pop(source)
    nats = base["texts"][text]
    rows = [row("source, bf16", "source", base["bytes_per_token"], nats, nats)]
    for entry in base.get("quantised", []):
        name = f"source, {entry['bits']}-bit K and V"
        rows.append(row(name, "source, quantised", entry["bytes_per_token"], entry["nats"], nats))
    for name, result in sorted(results.items()):
        group = "refined" if "off" not in name else "closed form"
        rows.append(row(name, group, result["bytes_per_token"], result["texts"][text], nats))
        for entry in result.get("quantised", []):
            label = f"{name}, {entry['bits']}-bit latent"
            rows.append(row(label, f"{group}, quantised", entry["bytes_per_token"], entry["nats"], nats))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| cache | bytes per token | perplexity | times the source |", "|---|---:|---:|---:|"]
    for entry in sorted(rows, key=lambda entry: -entry["bytes_per_token"]):
        error = f" ± {entry['perplexity_error']:.2f}" if "perplexity_error" in entry else ""
        spread = f" ± {entry['ratio_error']:.4f}" if entry.get("ratio_error") else ""
        lines.append(
            f"| {entry['name']} | {entry['bytes_per_token']:,.0f} | {entry['perplexity']:.2f}{error} "
            f"| {entry['ratio']:.4f}{spread} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    groups = list(dict.fromkeys(entry["group"] for entry in rows))
    for group in groups:
        part = sorted((entry for entry in rows if entry["group"] == group), key=lambda entry: entry["bytes_per_token"])
        axes.errorbar(
            [entry["bytes_per_token"] for entry in part],
            [entry["ratio"] for entry in part],
            yerr=[entry.get("ratio_error", 0) for entry in part],
            marker="o", capsize=3, label=group, linestyle="-" if len(part) > 1 else "none",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20]
    highest = max(entry["ratio"] for entry in rows)
    axes.set_yticks([tick for tick in ticks if tick <= 1.2 * highest], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    sizes = sorted({2 ** round(math.log2(entry["bytes_per_token"])) for entry in rows})
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("cache bytes per token, all layers")
    axes.set_ylabel("perplexity, times the source")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--source", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--published", type=Path)
    arguments = parser.parse_args()
    rows = collect(arguments.results, arguments.source, arguments.text)
    if arguments.published:
        for entry in json.loads(arguments.published.read_text("utf-8")):
            rows.append({"group": "published", "perplexity": entry["ratio"] * rows[0]["perplexity"]} | entry)
    (arguments.results / "frontier.md").write_text(table(rows), encoding="utf-8")
    plot(rows, arguments.results / "frontier.png")
    print(table(rows))


if __name__ == "__main__":
    main()
