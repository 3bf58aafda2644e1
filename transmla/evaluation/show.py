"""The tables of `transmla eval`."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transmla.evaluation.evaluate import quantised_sizes
from transmla.evaluation.perplexity import Perplexity, ratio
from transmla.evaluation.results import perplexity_of
from transmla.tables import columns, plus_minus, short_names

if TYPE_CHECKING:
    from transmla.evaluation.evaluate import EvaluationReport


def show_evaluation(report: EvaluationReport, console: Console) -> None:
    """One table per part that was measured; the first has what every evaluation has."""
    model, source = report.model, report.source
    first = perplexity_of(model, report.text)
    console.print(_perplexities(report))
    console.print(
        f"{escape(report.text)}: {len(first.nats_N)} windows of {report.made['length']:,} tokens{_begin(report)}, "
        f"{report.made['dtype']}, "
        f"{report.made['device']}. ± one standard error over windows, for the ratio that of the paired difference",
        highlight=False,
    )
    if len(model["texts"]) > 1:
        console.print(_other_texts(report))
    agreed = (report.comparison or {}).get("agreement")
    if agreed:
        kl, top1 = (agreed[name] for name in ("kl", "top1"))
        console.print(
            f"KL to the source {kl['value']:.4f} ± {kl['standard_error']:.4f} nats per token, same first choice "
            f"{top1['value']:.1%} ± {top1['standard_error']:.1%}",
            highlight=False,
        )
    parts = (
        _positions(model, source),
        _tasks(report),
        _needles(model, source),
        _smoke(model, source),
        _written(report),
    )
    for made in parts:
        if made is not None:
            console.print(made)
    for gate in report.gates:
        verdict = "[green]passed[/]" if gate.passed else "[red]missed[/]"
        found = "not measured" if math.isnan(gate.found) else f"recovery {gate.found:.3f}"
        console.print(
            f"gate {verdict}  {escape(gate.name)}: {found}, at least {gate.wanted} is wanted", highlight=False
        )
    for one in report.skipped:
        console.print(f"[yellow]left out[/] {escape(f'{one.part} of {one.model}: {one.why}')}", highlight=False)


def _begin(report: EvaluationReport) -> str:
    if not report.suite["begin"]:
        return ""
    ids = ", ".join(map(str, report.made["begin"]))
    return f" behind the begin token ({ids})" if ids else " (the tokenizer adds no begin token)"


def _named(model: dict[str, Any], source: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """The source, if there is one, and the model, as they are called in tables."""
    found = [one for one in (source, model) if one]
    return list(zip(map(escape, short_names(one["name"] for one in found)), found, strict=True))


def _perplexities(report: EvaluationReport) -> Table:
    """First text, cache bytes; with rounded caches if they were measured, else with their sizes."""
    table = columns("model", "perplexity", "ratio to source", "bytes/token", "of source")
    source = report.source
    base = source["cache_bytes_per_token"] if source else None
    wanted = perplexity_of(source, report.text) if source else None

    def add(name: str, nats: Perplexity | None, size: float, is_source: bool = False) -> None:
        shown = "" if nats is None else plus_minus(nats, 3)
        compared = "1" if is_source else plus_minus(ratio(nats, wanted), 4) if nats and wanted else ""
        table.add_row(name, shown, compared, f"{size:,.0f}", f"{size / base:.1%}" if base else "")

    for called, one in _named(report.model, source):
        is_source = one is source
        add(called, perplexity_of(one, report.text), one["cache_bytes_per_token"], is_source)
        for row in filter(None, one.get("quantised", [])):
            kind = str(row.get("cache") or row["bits"])
            # a longer name would be broken into two lines
            shown = kind if kind.endswith("bits") else f"{kind} cache"
            add(f"  {shown}", Perplexity(tuple(row["nats"]), 0), row["bytes_per_token"])
    if source and not source.get("quantised"):
        for name, size in quantised_sizes(source, report.made["dtype"]).items():
            add(f"source, {name} cache (size only)", None, size)
    return table


def _other_texts(report: EvaluationReport) -> Table:
    table = columns("text", "source perplexity", "model perplexity", "ratio to source")
    for text in report.model["texts"]:
        own = plus_minus(perplexity_of(report.model, text), 3)
        if report.source is None or text not in report.source["texts"]:
            table.add_row(escape(text), "", own, "")
            continue
        base = perplexity_of(report.source, text)
        compared = ratio(perplexity_of(report.model, text), base)
        table.add_row(escape(text), plus_minus(base, 3), own, plus_minus(compared, 4))
    return table


def _positions(model: dict[str, Any], source: dict[str, Any] | None) -> Table | None:
    if not model.get("positions"):
        return None
    edges = model["positions"]["edges"]
    table = columns("perplexity by position", *(f"{a:,}-{b:,}" for a, b in itertools.pairwise(edges)))
    rows = []
    for called, one in _named(model, source):
        # a window of another length has other ranges
        if one.get("positions") and one["positions"]["edges"] == edges:
            ranges = zip(*one["positions"]["nats"], strict=True)
            rows.append([math.exp(sum(nats) / len(nats)) for nats in ranges])
            table.add_row(called, *(f"{value:.2f}" for value in rows[-1]))
    if len(rows) == 2:
        base, own = rows
        table.add_row("ratio", *(f"{b / a:.3f}" for a, b in zip(base, own, strict=True)))
    return table


def _tasks(report: EvaluationReport) -> Table | None:
    if not report.model.get("tasks"):
        return None
    base = {(row["task"], row["metric"]): row for row in (report.source or {}).get("tasks", [])}
    compared = {(row["task"], row["metric"]): row for row in (report.comparison or {}).get("tasks", [])}
    table = columns("task", "metric", "source", "model", "difference", "recovery")
    for row in report.model["tasks"]:
        key = (row["task"], row["metric"])
        cells = [f"{one['value']:.4f} ± {_error(one)}" if one else "" for one in (base.get(key), row)]
        if key in compared:
            found = compared[key]
            cells += [f"{found['difference']:+.4f} ± {_error(found)}", f"{found['recovery']:.1%}"]
        table.add_row(*key, *cells)
    return table


def _error(row: dict[str, Any]) -> str:
    return "?" if math.isnan(row["standard_error"]) else f"{row['standard_error']:.4f}"


def _needles(model: dict[str, Any], source: dict[str, Any] | None) -> Table | None:
    if not model.get("needles"):
        return None
    table = columns("needles found at", *model["needles"])
    for called, one in _named(model, source):
        found = one.get("needles") or {}
        cells = (found.get(size) for size in model["needles"])
        table.add_row(called, *(f"{c['found']:.0%} ± {c['standard_error']:.0%}" if c else "" for c in cells))
    return table


# measure of generated text -> how it is called, and written
_WRITTEN = {
    "repeated_2": ("repeated 2-grams", "{:.1%}"), "repeated_4": ("repeated 4-grams", "{:.1%}"),
    "distinct_1": ("distinct tokens, all texts", "{:.1%}"), "distinct_2": ("distinct 2-grams, all texts", "{:.1%}"),
    "ended": ("texts that end", "{:.0%}"), "length": ("tokens", "{:.0f}"),
}  # fmt: skip


def _written(report: EvaluationReport) -> Table | None:
    """Text behind the prompts that ship, of source and model; of a model alone, means."""
    made = report.model.get("generation")
    if not made:
        return None
    compared = (report.comparison or {}).get("generation")
    accepted = (report.comparison or {}).get("acceptance") or {}
    table = columns(f"text behind {len(made['prompts'])} prompts", "", "source", "model", "difference")
    for way in ("greedy", "sampled"):
        for name, (called, form) in _WRITTEN.items():
            if compared:
                row = compared[way][name]
                signed = form.replace("{:", "{:+")
                error = form.format(row["standard_error"])
                cells = [form.format(row["source"]), form.format(row["model"])]
                table.add_row(way, called, *cells, f"{signed.format(row['difference'])} ± {error}")
            elif name in made[way]:
                table.add_row(way, called, "", form.format(sum(made[way][name]) / len(made[way][name])), "")
        if way in accepted:
            one = accepted[way]
            table.add_row(way, "accepted by the source", "", f"{one['value']:.1%} ± {one['standard_error']:.1%}", "")
    return table


def _smoke(model: dict[str, Any], source: dict[str, Any] | None) -> Table | None:
    if not model.get("smoke"):
        return None
    table = columns("greedy text of", "empty", "repeated 4-grams")
    for called, one in _named(model, source):
        found = one["smoke"]
        table.add_row(called, f"{found['num_empty']}/{len(found['continuations'])}", f"{found['repeated']:.0%}")
    return table
