"""Figures of result files. Colours are readable on white and on black; every series has a marker of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from transmla.evaluation.results import FrontierRow, Result

COLOURS = ("#3b7dd8", "#e0812a", "#3a9d5d", "#b455c8", "#c8443e", "#7a7a7a")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#8a8a8a"
# of names at points, in points
NAME_SIZE = 7.5
# of the frontier: caches that cost more are not worth a look
HIGHEST = 30


def frontier(
    rows: list[FrontierRow],
    labels: dict[str, str] | None = None,
) -> Figure:
    """Perplexity against cache bytes per token, both logarithmic; what lies above HIGHEST is only counted.

    labels: what stands at a point, by the name of its row; None: the name, the best of each kind and size alone
    """
    figure, axes = _axes()
    above = sum(row.ratio > HIGHEST for row in rows)
    rows = [row for row in rows if row.ratio <= HIGHEST]
    groups = list(dict.fromkeys((row.group, row.source) for row in rows))
    sources = list(dict.fromkeys(source for _, source in groups))
    kinds = list(dict.fromkeys(group for group, _ in groups))
    for group, source in groups:
        marker = MARKERS[kinds.index(group) % 6]
        # of one source, every kind has a colour; of several, every source
        colour = COLOURS[(kinds.index(group) if len(sources) == 1 else sources.index(source)) % 6]
        part = [row for row in rows if (row.group, row.source) == (group, source)]
        errors = [0.0 if math.isnan(row.ratio_error) else row.ratio_error for row in part]
        axes.errorbar(
            [row.bytes_per_token for row in part], [row.ratio for row in part], yerr=errors, capsize=3,
            marker=marker, color=colour, linestyle="none",
            label=f"{group} ({source})" if source else group,
        )  # fmt: skip
        # rounded caches of converted models are of different models: no line joins them
        if group in ("source, quantised", "converted"):
            best = _best_by_size(part)
            axes.plot(list(best), list(best.values()), color=colour, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    highest = max(row.ratio for row in rows)
    ticks = (1, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2) if highest < 2 else (1, 1.2, 1.5, 2, 3, 5, 10, 20)
    axes.set_yticks([tick for tick in ticks if tick <= 1.1 * highest])
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks(sorted({2 ** round(math.log2(row.bytes_per_token)) for row in rows}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("cache bytes per token, all layers")
    axes.set_ylabel("perplexity, times the source")
    title = f"{above} more above {HIGHEST} times the source" if above else None
    axes.legend(frameon=False, labelcolor=GREY, title=title).get_title().set_color(GREY)
    _name_points(figure, rows, labels)
    return figure


def _name_points(
    figure: Figure,
    rows: list[FrontierRow],
    labels: dict[str, str] | None,
) -> None:
    """Names at points; without labels those of the best of each kind at each size. Of a few places around a point the
    first at which the name covers neither another one nor a point, if there is one."""
    (axes,) = figure.axes
    if labels is None:
        best: dict[tuple[str, str, float], FrontierRow] = {}
        for row in sorted(rows, key=lambda row: -row.ratio):
            best[row.source, row.group, row.bytes_per_token] = row
        labels = _short_names([row.name for row in best.values()])
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    points = {}
    for row in rows:
        x, y = axes.transData.transform((row.bytes_per_token, row.ratio))
        points[row.name] = (scale * float(x), scale * float(y))
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points.values()]
    right = scale * float(axes.bbox.x1)
    for row in rows:
        if row.name not in labels:
            continue
        width, (x, y) = 0.5 * NAME_SIZE * len(labels[row.name]), points[row.name]
        left, middle = -width - 6, -width / 2
        tried = [(6, 4), (left, 4), (6, -11), (left, -11), (middle, 9), (middle, -16), (6, 14), (6, -21)]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + NAME_SIZE) for dx, dy in tried]
        free = [not any(_overlap(box, other) for other in taken) and box[2] < right for box in boxes]
        chosen = boxes[free.index(True) if True in free else 0]
        taken.append(chosen)
        axes.annotate(
            labels[row.name], (row.bytes_per_token, row.ratio), xytext=(chosen[0] - x, chosen[1] - y),
            textcoords="offset points", fontsize=NAME_SIZE, color=GREY,
        )  # fmt: skip


def _short_names(names: list[str]) -> dict[str, str]:
    """Without what the names of all models begin with, and without what goes without saying."""
    models = [name.split("-") for name in names if not name.startswith("source") and " " not in name.partition(",")[0]]
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*models, strict=False))
    shared = "-".join(parts[0] for parts in alike) if len(models) > 1 else ""
    prefix = f"{shared}-" if shared else ""
    return {name: name.removesuffix(", as stored").removeprefix(prefix) for name in names}


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _best_by_size(rows: list[FrontierRow]) -> dict[float, float]:
    """Bytes per token -> the lowest ratio there, largest first."""
    best: dict[float, float] = {}
    for row in sorted(rows, key=lambda row: -row.bytes_per_token):
        best[row.bytes_per_token] = min(row.ratio, best.get(row.bytes_per_token, math.inf))
    return best


def positions(results: list[Result]) -> Figure | None:
    """Ratio of perplexities by position; None if nothing was measured by position."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for result in results:
        own, source = (result.content[key] for key in ("model", "source"))
        if not source or not own.get("positions") or not source.get("positions"):
            continue
        if own["positions"]["edges"] != source["positions"]["edges"]:  # contexts of different lengths
            continue
        means = [_column_means(one["positions"]["nats"]) for one in (source, own)]
        series[result.name] = (
            own["positions"]["edges"],
            [math.exp(b - a) for a, b in zip(*means, strict=True)],
        )
    if not series:
        return None
    figure, axes = _axes()
    for number, (name, (edges, ratios)) in enumerate(series.items()):
        middles = [math.sqrt(max(a, 64) * b) for a, b in itertools.pairwise(edges)]
        axes.plot(middles, ratios, marker=MARKERS[number % 6], color=COLOURS[number % 6], label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel("perplexity, times the source")
    axes.legend(frameon=False, labelcolor=GREY)
    return figure


def layers(results: list[Result]) -> Figure | None:
    """Held-out stream error of every layer, from the provenance of converted models."""
    return _by_layer(
        results,
        lambda layer: layer.get("stream_loss_heldout"),
        "squared error of the stream, share of its energy",
        bottom=0,
    )


def spectrum(results: list[Result]) -> Figure | None:
    """Share of the weighted energy of keys and values that the latent of each layer keeps."""
    return _by_layer(
        results,
        lambda layer: 1 - layer["latent_loss"] if "latent_loss" in layer else None,
        "energy that the rank keeps",
    )


def _by_layer(
    results: list[Result], value: Callable[[dict[str, Any]], float | None], label: str, bottom: float | None = None
) -> Figure | None:
    figure, axes = _axes()
    for number, result in enumerate(results):
        found = [value(layer) for layer in result.content["model"].get("layers") or []]
        if found and None not in found:
            axes.plot(
                range(len(found)), found, marker=MARKERS[number % 6], markersize=4, color=COLOURS[number % 6],
                label=result.name,
            )  # fmt: skip
    if not axes.lines:
        return None
    axes.set_ylim(bottom=bottom)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.legend(frameon=False, labelcolor=GREY)
    return figure


def speed(timings: list[Result]) -> Figure | None:
    """Decoding speed against context, at the smallest batch of each file; bars from the slowest to the fastest."""
    series: dict[str, list[dict[str, Any]]] = {}
    for timing in timings:
        rows = [row for row in timing.content["rows"] if row["tokens_per_second"] is not None]
        smallest = min((row["batch"] for row in rows), default=0)
        for row in rows:
            if row["batch"] == smallest:
                series.setdefault(f"{row['model']}, batch {smallest}", []).append(row)
    if not series:
        return None
    figure, axes = _axes()
    for number, (name, rows) in enumerate(series.items()):
        middle = [row["tokens_per_second"] for row in rows]
        spread = [
            [value - row["slowest"] for value, row in zip(middle, rows, strict=True)],
            [row["fastest"] - value for value, row in zip(middle, rows, strict=True)],
        ]
        axes.errorbar(
            [row["context"] for row in rows], middle, yerr=spread, capsize=3, marker=MARKERS[number % 6],
            color=COLOURS[number % 6], label=name,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["context"] for rows in series.values() for row in rows}))
    axes.set_xticks([], minor=True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("decoding, tokens per second")
    axes.legend(frameon=False, labelcolor=GREY)
    return figure


def recovery(results: list[Result]) -> Figure | None:
    """Bars of task recovery with the error of the paired difference; None if no task was measured."""
    series: dict[str, dict[str, tuple[float, float]]] = {}
    for result in results:
        rows = (result.content["comparison"] or {}).get("tasks") or []
        base = {(row["task"], row["metric"]): row["value"] for row in (result.content["source"] or {}).get("tasks", [])}
        if rows:
            series[result.name] = {
                f"{row['task']}\n{row['metric']}": (row["recovery"] or 0.0, _recovery_error(row, base)) for row in rows
            }
    if not series:
        return None
    names = list(dict.fromkeys(name for rows in series.values() for name in rows))
    figure, axes = _axes(max(8.0, 1.1 * len(names)))
    bar = 0.8 / len(series)
    for number, (label, rows) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * bar for place in range(len(names))]
        heights, errors = zip(*(rows.get(name, (0.0, 0.0)) for name in names), strict=True)
        axes.bar(
            places, heights, bar, yerr=errors, capsize=2, ecolor=GREY, color=COLOURS[number % 6], label=label,
        )  # fmt: skip
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set_ylim(bottom=0)
    crowded = len(names) > 6
    axes.set_xticks(
        range(len(names)), names, fontsize=8, rotation=30 if crowded else 0, ha="right" if crowded else "center"
    )
    axes.set_ylabel("recovery, share of the source")
    axes.legend(frameon=False, labelcolor=GREY)
    return figure


def _recovery_error(row: dict[str, Any], base: dict[tuple[str, str], float]) -> float:
    """Of the recovery: that of the paired difference over the source's score; 0 where it is not known."""
    score = base.get((row["task"], row["metric"]))
    return row["standard_error"] / score if score and row["standard_error"] is not None else 0.0


def _axes(width: float = 8.0) -> tuple[Figure, Any]:
    figure, (axes,) = styled(1, width)
    return figure, axes


def styled(columns: int, width: float) -> tuple[Figure, tuple[Any, ...]]:
    """Axes side by side: no global state, and nothing but grey that depends on the background."""
    figure = Figure(figsize=(width, 4.8), layout="constrained")
    figure.patch.set_alpha(0)
    found = figure.subplots(1, columns, squeeze=False)[0]
    for axes in found:
        axes.patch.set_alpha(0)
        axes.grid(color=GREY, alpha=0.25)
        axes.tick_params(colors=GREY, which="both")
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(GREY)
        for spine in axes.spines.values():
            spine.set_color(GREY)
    return figure, tuple(found)


def _column_means(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
