"""Tables of what the campaign has found, as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
from plan import STAGES

SCHEMA = Path(__file__).with_name("results.schema.json")


def markdown(content: dict[str, Any]) -> str:
    """All tables; raises `jsonschema.ValidationError` for what the campaign does not write."""
    jsonschema.validate(content, json.loads(SCHEMA.read_text("utf-8")))
    records = content["stages"]
    lines = [_machine(content), "", *_table(("stage", "outcome", "seconds", "estimate", ""), _outcomes(records))]
    for name, rows in _SECTIONS.items():
        if result := records.get(name, {}).get("result"):
            title = next(stage.title for stage in STAGES if stage.name == name)
            lines += ["", f"### {title[0].upper()}{title[1:]}", "", *rows(result)]
    return "\n".join(lines)


def _machine(content: dict[str, Any]) -> str:
    known = [record["machine"] for record in content["stages"].values() if "machine" in record]
    kind = "A dry run of everything, in small: no number here says anything of a GPU. " if content["tiny"] else ""
    if not known:
        return f"{kind}No stage has run."
    one = known[0]
    numbers = ", ".join(f"{name} {one['versions'][name]}" for name in ("torch", "transformers", "python"))
    return f"{kind}{one['device_name']}; {numbers}; revision {one['commit'] or 'unknown'}."


def _outcomes(records: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for stage in STAGES:
        if stage.name in records:
            one = records[stage.name]
            why = (one.get("why", "").strip().splitlines() or [""])[-1][:100]
            rows.append((stage.title, one["status"], f"{one['seconds']:.0f}", f"{stage.estimate:.0f}", why))
    return rows


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Text of the first column to the left, all else to the right."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)]


def _number(value: Any, digits: int = 3) -> str:
    if value is None:
        return ""
    return value.replace("|", "/") if isinstance(value, str) else f"{value:,.{digits}g}"


def _environment(result: dict[str, Any]) -> list[str]:
    rates = result["rates"]
    missing = ", ".join(result["missing"]) or "none"
    return [f"{rates['multiply_adds']:.3g} multiply-adds and {rates['bytes']:.3g} bytes a second; missing: {missing}."]


def _tests(result: dict[str, Any]) -> list[str]:
    return [f"`{result['summary'].strip('= ')}`", *(f"- {line}" for line in result["lines"] if "SKIPPED" not in line)]


def _own_form(result: dict[str, Any]) -> list[str]:
    head = ("family", "logits", "rows", "products", "heads", "generation", "static cache")
    rows = [
        (name, _number(one["logits"]), *(_number(one["cached_logits"][way]) for way in head[2:5]),
         *(one[f"{cache}_tokens_equal"] for cache in ("dynamic", "static")))
        for name, one in result.items()
    ]  # fmt: skip
    return ["Relative error against the CPU in float32; the same tokens or not.", "", *_table(head, rows)]


def _kernels(result: dict[str, Any]) -> list[str]:
    ways = ("floor_ms", "rows", "heads", "products", "split")
    rows = [
        (f"{one['rank']} + {one['rope']}", one["batch"], f"{one['context']:,}", one["chosen"],
         *(_number(one.get(way)) for way in ways))
        for one in result["decoding"]
    ]  # fmt: skip
    lines = _table(("latent + rotary", "batch", "context", "chosen", *ways), rows)
    ways = ("floor_ms", "as_it_is", "padded")
    backends = sorted({name for one in result["prefill"] for name in one.get("backends", {})})
    rows = [
        (f"{one['query_width']}, {one['value_width']}", f"{one['tokens']:,}", *(_number(one[way]) for way in ways),
         *(_number(one["backends"][name]) for name in backends))
        for one in result["prefill"]
    ]  # fmt: skip
    return [*lines, "", *_table(("prefill: widths of keys, values", "tokens", *ways, *backends), rows)]


def _speed(result: dict[str, Any]) -> list[str]:
    rows = []
    for one in result["rows"]:
        name = ", ".join([one["model"], *(one[key] for key in ("kernel", "cache") if one.get(key))])
        times = f" x{one['ms'] / one['floor_ms']:.1f}" if "ms" in one else ""
        measured = (_number(one.get("ms", one.get("failed"))), _number(one.get("floor_ms")) + times)
        peak = f"{one['peak'] / 2**30:.1f} GiB" if one.get("peak") else ""
        rows.append((one["kind"], name, one["batch"], f"{one['tokens']:,}", *measured, peak))
    return _table(("", "model", "batch", "tokens", "ms", "roofline, ms", "peak"), rows)


def _graphs(result: dict[str, Any]) -> list[str]:
    rows = [
        (one["model"], one["batch"], one["way"], _number(one.get("ms", one.get("failed"))),
         _number(one.get("first_seconds")))
        for one in result["rows"]
    ]  # fmt: skip
    return _table(("model", "batch", "way", "ms a step", "s before the first"), rows)


def _heal_rate(result: dict[str, Any]) -> list[str]:
    rows = [
        (one["way"], f"{one['tokens_per_second']:,.0f}", f"x{1 / one['of_floor']:.1f}",
         f"{one['peak'] / 2**30:.1f} GiB" if one.get("peak") else "")
        if "tokens_per_second" in one
        else (one["way"], _number(one["failed"]), "", "")
        for one in result["rows"]
    ]  # fmt: skip
    lines = _table(("way", "tokens a second", "times the floor of its products", "peak"), rows)
    for one in (result["rows"][0], result["rows"][-1]):
        if one.get("kernels"):
            kernels = [(f"`{name}`", f"{calls:,}", _number(ms)) for name, calls, ms in one["kernels"][:12]]
            lines += ["", f"A step, {one['way']}:", "", *_table(("kernel", "calls", "ms"), kernels)]
    return lines


def _conversion(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['seconds']:.0f} s."] if "seconds" in result else []
    if "tokens_per_second" in result:
        curve = ", ".join(f"{tokens:,}: {loss:.4f}" for tokens, loss in result["curve"] if loss is not None)
        told = f"{result['tokens']:,} tokens, {result['tokens_per_second']:,.0f} a second. Held-out loss: {curve}."
        lines.append(told)
    if "of_32_layers" in result:
        layers, spent, more = result["layers"], result["spent"], result["of_32_layers"]
        head = ("step", f"{layers} layers, s", "32 layers, s (extrapolated)")
        lines += ["", *_table(head, [(name, f"{spent[name]:.1f}", f"{more[name]:.0f}") for name in spent])]
        lines += ["", f"In all {sum(spent.values()):.0f} s, and {sum(more.values()):.0f} s for 32 layers."]
    else:
        lines += ["", " ".join(f"{name} {seconds:.0f} s;" for name, seconds in result.get("spent", {}).items())]
    if "quality" in result:
        rows = [(name, f"{one['ratio']:.4f} ± {one['standard_error']:.4f}") for name, one in result["quality"].items()]
        lines += ["", *_table(("text", "perplexity, x source"), rows)]
    return lines


_SECTIONS = {
    "environment": _environment,
    "tests": _tests,
    "own-form": _own_form,
    "heal-rate": _heal_rate,
    "convert-8b": _conversion,
    "speed-8b": _speed,
    "kernels": _kernels,
    "convert-96-32": _conversion,
    "speed": _speed,
    "heal": _conversion,
    "graphs": _graphs,
    "convert-160-32": _conversion,
}
