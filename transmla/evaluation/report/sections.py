"""What each section of the report page holds: tables and pictures, or None where there is nothing to show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transmla.evaluation.evaluate import quantised_sizes
from transmla.evaluation.results import Result, frontier_rows, perplexity_of
from transmla.tables import size


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
class Bar:
    """A bar in a cell; share: of the width"""

    share: float


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


def cards(results: list[Result]) -> list[dict[str, Any]]:
    """What is at the top of the page: one card for each model."""
    cards = []
    for result in results:
        model, source, compared = (result.content[key] for key in ("model", "source", "comparison"))
        if not source:
            continue
        saved = model["cache_bytes_per_token"] / source["cache_bytes_per_token"] - 1
        text, found = next(iter(compared["texts"].items()))
        facts = [f"{saved:+.1%} cache"]
        if model.get("smoke") and source.get("smoke"):
            repeated = [f"{one['smoke']['repeated']:.0%}" for one in (model, source)]
            facts.append(f"{repeated[0]} repeated four-grams in what it writes, source {repeated[1]}")
        requests = _requests(model["cache_bytes_per_token"]) / _requests(source["cache_bytes_per_token"])
        facts.append(f"{requests:.1f} times the texts of 32K in the same memory")
        cards.append({
            "title": result.name, "value": f"×{found['ratio']:.3f}", "label": f"perplexity on {Path(text).name}",
            "facts": facts,
        })  # fmt: skip
    return cards


def _requests(bytes_per_token: float) -> float:
    """Texts of 32K tokens whose caches fit into 80 GB."""
    return 80e9 / (bytes_per_token * 32768)


def texts(results: list[Result]) -> Section:
    """Perplexity of every model on every text, beside the source's."""
    rows = []
    for result in results:
        model, source, compared = (result.content[key] for key in ("model", "source", "comparison"))
        begun = " behind the begin token" if result.content["suite"].get("begin") else ""
        for text in model["texts"]:
            own = perplexity_of(model, text)
            base = perplexity_of(source, text) if source and text in source["texts"] else None
            found = (compared or {}).get("texts", {}).get(text)
            rows.append([
                result.name, Path(text).name,
                f"{base.value:.3f} ± {_error(base.standard_error)}" if base else "",
                f"{own.value:.3f} ± {_error(own.standard_error)}",
                f"{found['ratio']:.4f} ± {_error(found['standard_error'], 4)}" if found else "",
                f"{len(own.nats_N)} × {model['texts'][text]['length']:,}{begun}",
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


def sources(results: list[Result]) -> list[str]:
    """Names, each once."""
    return list(dict.fromkeys(result.content["source"]["name"] for result in results if result.content["source"]))


def caches(results: list[Result], shown: dict[str, Picture]) -> Section | None:
    """Every cache that was measured, by bytes per token."""
    rows = frontier_rows(results)
    if not rows:
        return None
    cells: list[list[Any]] = [
        [row.name, f"{row.bytes_per_token:,.0f}", f"{row.perplexity:.3f} ± {_error(row.perplexity_error)}",
         f"{row.ratio:.4f} ± {_error(row.ratio_error, 4)}", f"{_requests(row.bytes_per_token):,.0f}",
         Bar(row.bytes_per_token / rows[0].bytes_per_token)]
        for row in rows
    ]  # fmt: skip
    sizes: dict[str, list[Any]] = {}
    several = len(sources(results)) > 1
    for result in results:
        source = result.content["source"]
        if source and not source.get("quantised"):
            for name, size in quantised_sizes(source, result.content["made"]["dtype"]).items():
                label = f"{source['name'] if several else 'source'}, {name} (size only)"
                sizes[label] = [
                    label, f"{size:,.0f}", "", "", f"{_requests(size):,.0f}", Bar(size / rows[0].bytes_per_token)
                ]  # fmt: skip
    head = ("cache", "bytes per token", "perplexity", "ratio", "texts of 32K in 80 GB", "size")
    note = "Rounded caches beside it are what a user gets without converting anything."
    return Section(
        "Cache",
        [note],
        [Table("Every cache that was measured", head, [*cells, *sizes.values()])],
        _one(shown, "frontier"),
    )


def tasks(results: list[Result], shown: dict[str, Picture]) -> Section | None:
    """Scores of tasks and needles, beside the source's."""
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


def positions(results: list[Result], shown: dict[str, Picture]) -> Section | None:
    """Perplexity by position in the text."""
    tables = []
    for result in results:
        model, source = (result.content[key] for key in ("model", "source"))
        if model.get("positions"):
            edges = model["positions"]["edges"]
            rows = []
            for one in filter(None, (source, model)):
                if one.get("positions") and one["positions"]["edges"] == edges:
                    means = (sum(column) / len(column) for column in zip(*one["positions"]["nats"], strict=True))
                    rows.append([_name(result, one), *(f"{math.exp(mean):.2f}" for mean in means)])
            head = ("perplexity at", *(f"{a:,}-{b:,}" for a, b in itertools.pairwise(edges)))
            tables.append(Table(f"{result.name}, {len(model['positions']['nats'])} windows", head, rows))
    return Section("By position", [], tables, _one(shown, "positions")) if tables else None


def layers(shown: dict[str, Picture]) -> Section | None:
    """What each layer's latent keeps and loses."""
    note = (
        "What the rank keeps of each layer's keys and values, in the metric of the scores, and what the closed form "
        "loses of the residual stream, before refinement."
    )
    figures = [*_one(shown, "spectrum"), *_one(shown, "layers")]
    return Section("By layer", [note], [], figures) if figures else None


def speed(timings: list[Result], shown: dict[str, Picture]) -> Section | None:
    """Prefill and decoding as `transmla bench` timed them."""
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
        if rows:
            tables.append(Table(caption, head, rows))
        if timing.content.get("budget"):
            tables.append(_budget(timing.content["budget"], setting))
    return Section("Speed", [], tables, _one(shown, "speed")) if tables else None


def _budget(budget: dict[str, Any], setting: dict[str, Any]) -> Table:
    rows = [
        [row["model"], row["cache"], f"{row['context']:,}", f"{row['texts']:,}", f"{row['bytes_per_text']:,}",
         *([f"{row['tokens_per_second']:.1f} ({row['slowest']:.1f}-{row['fastest']:.1f})",
            f"{row['speed_ratio']:.2f}" if row["speed_ratio"] else ""]
           if row["tokens_per_second"] is not None else [Cell(row["remark"] or "", "text")])]
        for row in budget["rows"]
    ]  # fmt: skip
    caption = (
        f"As many texts as fit into {size(budget['bytes'])} of caches; {setting['dtype']} on {setting['device_name']}, "
        f"{setting['threads']} threads, medians of {setting['repeats']} alternating runs (slowest-fastest)"
    )
    head = ("model", "cache", "context", "texts", "bytes per text", "decoding, tokens/s", "times the source")
    return Table(caption, head, rows)


def texts_written(results: list[Result]) -> Section | None:
    """What the models write."""
    rows, quotes = [], []
    seen = set()
    for result in results:
        for one in filter(None, (result.content["source"], result.content["model"])):
            found = one.get("smoke")
            name = _name(result, one)
            if not found or name in seen:
                continue
            seen.add(name)
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


# measure of generated text -> how it is called, and its digits as a percentage; None: a number
_WRITTEN = {
    "repeated_2": ("repeated two-token runs", 1), "repeated_4": ("repeated four-token runs", 1),
    "distinct_1": ("distinct tokens, all texts", 1), "distinct_2": ("distinct two-token runs, all texts", 1),
    "ended": ("texts that end", 0), "length": ("tokens", None),
}  # fmt: skip


def generation(results: list[Result]) -> Section | None:
    """Repetition, length and end of what models write behind the same prompts, and what the source accepts of it."""
    rows = []
    for result in results:
        compared = result.content["comparison"] or {}
        for way, measures in (compared.get("generation") or {}).items():
            for name, (called, digits) in _WRITTEN.items():
                row = measures[name]
                cells = [_percent(row[key], digits) for key in ("source", "model")]
                difference = _percent(row["difference"], digits, sign="+")
                rows.append([
                    result.name, way, called, *cells, f"{difference} ± {_percent(row['standard_error'], digits)}",
                ])  # fmt: skip
            if accepted := (compared.get("acceptance") or {}).get(way):
                value, error = (_percent(accepted[key], 1) for key in ("value", "standard_error"))
                rows.append([result.name, way, "tokens that the source accepts", "", f"{value} ± {error}", ""])
    if not rows:
        return None
    head = ("model", "text", "measure", "source", "model's", "difference")
    note = "Likelihood does not show whether a model repeats itself; what it writes does."
    return Section("Generated text", [note], [Table("Behind the same prompts", head, rows)])


def gates(results: list[Result]) -> Section | None:
    """Which gates were passed and which were missed."""
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


def provenance(results: list[Result]) -> Section:
    """What the numbers were measured with."""
    rows = []
    for result in results:
        made = result.content["made"]
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        if made.get("commit"):
            versions += f", commit {made['commit']}"
        rows.append([result.name, made["date"], made["device"], made["dtype"], Cell(versions, "text")])
    return Section("Made with", [], [Table("", ("result", "date", "device", "dtype", "versions"), rows)])


def _name(result: Result, one: dict[str, Any]) -> str:
    """A model has one name on the page, that of its result; a source has its own."""
    return result.name if one is result.content["model"] else Path(one["name"]).name


def _one(shown: dict[str, Picture], name: str) -> list[Picture]:
    return [shown[name]] if name in shown else []


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _percent(value: float | None, digits: int | None, sign: str = "") -> str:
    if value is None:
        return "?"
    return f"{value:{sign}.0f}" if digits is None else f"{value:{sign}.{digits}%}"


def _error(value: float | None, digits: int = 3) -> str:
    return "?" if value is None or math.isnan(value) else f"{value:.{digits}f}"
