"""Result files as one page: no network, light and dark, readable on a phone and on paper."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transmla.checkpoint.destination import disk_errors
from transmla.errors import DataError
from transmla.evaluation.evaluate import quantised_sizes
from transmla.evaluation.report import plots
from transmla.evaluation.results import Result, frontier_rows, perplexity_of, read_published, read_results_and_timings


@dataclass(frozen=True)
class Table:
    """Cells are text; a `Cell` has a class of the style sheet as well."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Cell:
    text: str
    css: str


@dataclass(frozen=True)
class Picture:
    """label: what it shows, for those who do not see it;  svg: the drawing"""

    label: str
    svg: str


@dataclass(frozen=True)
class Section:
    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()
    quotes: Sequence[dict[str, str]] = field(default=())


def report(
    results: Sequence[str | Path],
    out: str | Path,
    *,
    pictures: str | Path | None = None,
    published: str | Path | None = None,
) -> Path:
    """Write the page `out` from files of `transmla eval --json` and `transmla bench --json`; returns its path.

    An existing page is replaced.
    pictures:  folder for a PNG and an SVG of every figure
    published: JSON file with rows of other methods for the frontier: name, bytes_per_token, ratio
    Raises `DataError` for other files, `DestinationError`.
    """
    found, timings = read_results_and_timings([Path(path) for path in results])
    if not found:
        raise DataError(
            "nothing to report",
            where="RESULTS",
            why="no file of `transmla eval` was given",
            remedy="give at least one; files of `transmla bench` are shown beside it",
        )
    drawn = _figures(found, timings, read_published(published))
    page = _page(found, timings, drawn)
    with disk_errors(Path(out)):
        Path(out).write_text(page, encoding="utf-8")
    if pictures is not None:
        with disk_errors(Path(pictures)):
            Path(pictures).mkdir(parents=True, exist_ok=True)
            for name, (_, figure) in drawn.items():
                figure.savefig(Path(pictures) / f"{name}.png", dpi=150, facecolor="white")
                figure.savefig(Path(pictures) / f"{name}.svg")
    return Path(out)


def _figures(
    results: list[Result], timings: list[Result], published: list[dict[str, Any]]
) -> dict[str, tuple[str, Any]]:
    """Name -> (what it shows, figure), of those that there is data for."""
    rows = frontier_rows(results, published)
    made = {
        "frontier": ("Perplexity against cache bytes per token", plots.frontier(rows) if rows else None),
        "positions": ("Perplexity, times the source, by position in the text", plots.positions(results)),
        "recovery": ("Task recovery: score as a share of the source's", plots.recovery(results)),
        "speed": ("Decoding speed against context", plots.speed(timings)),
        "spectrum": ("Energy of keys and values that each layer's latent keeps", plots.spectrum(results)),
        "layers": ("Error of the residual stream behind each layer, held out", plots.layers(results)),
    }
    return {name: (label, figure) for name, (label, figure) in made.items() if figure is not None}


def _page(results: list[Result], timings: list[Result], drawn: dict[str, tuple[str, Any]]) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("transmla.evaluation.report", ""), autoescape=True, trim_blocks=True)
    shown = {name: Picture(label, _svg(figure)) for name, (label, figure) in drawn.items()}
    first = results[0].content
    names = ", ".join(result.name for result in results)
    source = ", ".join(_sources(results)) or "no source"
    made = first["made"]
    sections = [
        _texts(results),
        _caches(results, shown),
        _tasks(results, shown),
        _positions(results, shown),
        _speed(timings, shown),
        _layers(shown),
        _texts_written(results),
        _gates(results),
        _provenance(results),
    ]
    content: str = environment.get_template("page.html.jinja").render(
        title=f"{names} beside {Path(source).name}",
        subtitle=f"transmla eval, {made['date']}, {made['dtype']} on {made['device']}. ± is one standard error; ratios "
        "and differences are paired on the same windows and documents.",
        cards=_cards(results),
        sections=[section for section in sections if section is not None],
    )
    return content


def _svg(figure: Any) -> str:
    """The drawing without XML prologue; text stays text, and the same figure gives the same characters."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transmla", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _cards(results: list[Result]) -> list[dict[str, str]]:
    cards = []
    for result in results:
        model, source, compared = (result.content[key] for key in ("model", "source", "comparison"))
        if not source:
            continue
        saved = model["cache_bytes_per_token"] / source["cache_bytes_per_token"] - 1
        text, found = next(iter(compared["texts"].items()))
        cards.append({"value": f"{saved:+.1%}", "label": f"cache of {result.name}"})
        cards.append({"value": f"×{found['ratio']:.3f}", "label": f"perplexity on {Path(text).name}, {result.name}"})
    return cards


def _texts(results: list[Result]) -> Section:
    rows = []
    for result in results:
        model, source, compared = (result.content[key] for key in ("model", "source", "comparison"))
        for text in model["texts"]:
            own = perplexity_of(model, text)
            base = perplexity_of(source, text) if source and text in source["texts"] else None
            found = (compared or {}).get("texts", {}).get(text)
            rows.append([
                result.name, Path(text).name,
                f"{base.value:.3f} ± {_error(base.standard_error)}" if base else "",
                f"{own.value:.3f} ± {_error(own.standard_error)}",
                f"{found['ratio']:.4f} ± {_error(found['standard_error'], 4)}" if found else "",
                f"{len(own.nats_N)} × {model['texts'][text]['length']:,}",
            ])  # fmt: skip
    agreed = [
        f"{result.name} follows its source with a KL divergence of {one['kl']['value']:.4f} ± "
        f"{_error(one['kl']['standard_error'], 4)} nats per token and the same first choice for "
        f"{one['top1']['value']:.1%} of the tokens."
        for result in results
        if (one := (result.content["comparison"] or {}).get("agreement"))
    ]
    head = ("model", "text", "source perplexity", "perplexity", "ratio", "windows")
    return Section("Perplexity", agreed, [Table("On the same windows as the source", head, rows)])


def _sources(results: list[Result]) -> list[str]:
    """Names, each once."""
    return list(dict.fromkeys(result.content["source"]["name"] for result in results if result.content["source"]))


def _caches(results: list[Result], shown: dict[str, Picture]) -> Section | None:
    rows = frontier_rows(results)
    if not rows:
        return None
    cells = [
        [row.name, f"{row.bytes_per_token:,.0f}", f"{row.perplexity:.3f} ± {_error(row.perplexity_error)}",
         f"{row.ratio:.4f} ± {_error(row.ratio_error, 4)}"]
        for row in rows
    ]  # fmt: skip
    sizes: dict[str, list[str]] = {}
    several = len(_sources(results)) > 1
    for result in results:
        source = result.content["source"]
        if source and not source.get("quantised"):
            for name, size in quantised_sizes(source, result.content["made"]["dtype"]).items():
                label = f"{source['name'] if several else 'source'}, {name} (size only)"
                sizes[label] = [label, f"{size:,.0f}", "", ""]
    head = ("cache", "bytes per token", "perplexity", "ratio")
    note = "Rounded caches beside it are what a user gets without converting anything."
    return Section(
        "Cache",
        [note],
        [Table("Every cache that was measured", head, [*cells, *sizes.values()])],
        _one(shown, "frontier"),
    )


def _tasks(results: list[Result], shown: dict[str, Picture]) -> Section | None:
    rows = []
    for result in results:
        compared = {
            (row["task"], row["metric"]): row for row in (result.content["comparison"] or {}).get("tasks") or []
        }
        base = {(row["task"], row["metric"]): row for row in (result.content["source"] or {}).get("tasks") or []}
        for own in result.content["model"].get("tasks") or []:
            key = (own["task"], own["metric"])
            one = compared.get(key)
            rows.append([
                result.name, *key,
                f"{base[key]['value']:.4f}" if key in base else "",
                f"{own['value']:.4f} ± {_error(own['standard_error'], 4)}",
                f"{one['difference']:+.4f} ± {_error(one['standard_error'], 4)}" if one else "",
                f"{one['recovery']:.1%}" if one and one["recovery"] is not None else "",
            ])  # fmt: skip
    if not rows:
        return None
    head = ("model", "task", "metric", "source", "model", "difference", "recovery")
    return Section("Tasks", [], [Table("One by one: an average hides losses", head, rows)], _one(shown, "recovery"))


def _positions(results: list[Result], shown: dict[str, Picture]) -> Section | None:
    tables = []
    for result in results:
        model, source = (result.content[key] for key in ("model", "source"))
        if model.get("positions"):
            edges = model["positions"]["edges"]
            rows = []
            for one in filter(None, (source, model)):
                if one.get("positions") and one["positions"]["edges"] == edges:
                    means = (sum(column) / len(column) for column in zip(*one["positions"]["nats"], strict=True))
                    rows.append([Path(one["name"]).name, *(f"{math.exp(mean):.2f}" for mean in means)])
            head = ("perplexity at", *(f"{a:,}-{b:,}" for a, b in itertools.pairwise(edges)))
            tables.append(Table(f"{result.name}, {len(model['positions']['nats'])} windows", head, rows))
    return Section("By position", [], tables, _one(shown, "positions")) if tables else None


def _layers(shown: dict[str, Picture]) -> Section | None:
    note = (
        "What the rank keeps of each layer's keys and values, in the metric of the scores, and what the closed form "
        "loses of the residual stream, before refinement."
    )
    figures = [*_one(shown, "spectrum"), *_one(shown, "layers")]
    return Section("By layer", [note], [], figures) if figures else None


def _speed(timings: list[Result], shown: dict[str, Picture]) -> Section | None:
    tables = []
    for timing in timings:
        setting, rates = timing.content["setting"], timing.content["rates"]
        rows = [
            [row["model"], str(row["batch"]), f"{row['context']:,}", f"{row['first_token_seconds']:.2f}",
             f"{row['prefill_tokens_per_second']:,.0f}",
             f"{row['tokens_per_second']:.1f} ({row['slowest']:.1f}-{row['fastest']:.1f})",
             f"{row['speed_ratio']:.2f}" if row["speed_ratio"] else "", f"{row['of_floor']:.1f}"]
            if row["tokens_per_second"] is not None
            else [row["model"], str(row["batch"]), f"{row['context']:,}", Cell(row["failed"] or "", "text")]
            for row in timing.content["rows"]
        ]  # fmt: skip
        caption = (
            f"{setting['dtype']} on {setting['device_name']}, {setting['threads']} threads, medians of "
            f"{setting['repeats']} alternating runs (slowest-fastest); this machine multiplies "
            f"{rates['multiply_adds'] / 1e9:,.0f} G/s and copies {rates['bytes'] / 2**30:,.1f} GiB/s"
        )
        head = (
            "model", "batch", "context", "first token, s", "prefill, tokens/s", "decoding, tokens/s",
            "times the source", "times the roofline's floor",
        )  # fmt: skip
        tables.append(Table(caption, head, rows))
    return Section("Speed", [], tables, _one(shown, "speed")) if tables else None


def _texts_written(results: list[Result]) -> Section | None:
    rows, quotes = [], []
    for result in results:
        for one in filter(None, (result.content["source"], result.content["model"])):
            found = one.get("smoke")
            if not found:
                continue
            name = Path(one["name"]).name
            total = len(found["continuations"])
            rows.append([name, f"{found['num_empty']} of {total}", f"{found['repeated']:.0%}"])
            quotes += [
                {"title": f"{name}: {text['prompt']}", "text": text["prompt"] + text["text"]}
                for text in found["continuations"]
            ]
    if not rows:
        return None
    head = ("greedy text of", "empty", "repeated four-token runs")
    return Section("What it writes", [], [Table("Continuations of a few prompts", head, rows)], [], quotes)


def _gates(results: list[Result]) -> Section | None:
    gates = [
        [result.name, gate["name"], f"{gate['wanted']}", _share(gate["found"]),
         Cell("passed", "good") if gate["passed"] else Cell("missed", "bad")]
        for result in results for gate in result.content["gates"]
    ]  # fmt: skip
    left_out = [
        f"Left out: {one['part']} of {one['model']}. {one['why']}"
        for result in results
        for one in result.content["skipped"]
    ]
    if not gates and not left_out:
        return None
    head = ("model", "gate", "wanted", "recovery", "")
    return Section("Gates", left_out, [Table("Smallest recoveries that pass", head, gates)] if gates else [])


def _provenance(results: list[Result]) -> Section:
    rows = []
    for result in results:
        made = result.content["made"]
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        if made.get("commit"):
            versions += f", commit {made['commit']}"
        rows.append([result.name, made["date"], made["device"], made["dtype"], Cell(versions, "text")])
    return Section("Made with", [], [Table("", ("result", "date", "device", "dtype", "versions"), rows)])


def _one(shown: dict[str, Picture], name: str) -> list[Picture]:
    return [shown[name]] if name in shown else []


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _error(value: float | None, digits: int = 3) -> str:
    return "?" if value is None or math.isnan(value) else f"{value:.{digits}f}"
