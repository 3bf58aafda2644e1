"""What the command line prints: results on stdout as tables, progress on stderr."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from transmla.evaluation.evaluate import quantised_sizes
from transmla.evaluation.perplexity import Perplexity, ratio
from transmla.evaluation.results import perplexity_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transmla.conversion.distil import BlockReport
    from transmla.conversion.flow import ConversionReport
    from transmla.conversion.plan import Plan
    from transmla.evaluation.evaluate import EvaluationReport
    from transmla.evaluation.speed import BenchReport
    from transmla.healing.flow import HealReport
    from transmla.targets.doctor import Diagnosis
    from transmla.targets.engines import EngineVerdict
    from transmla.targets.export import ExportReport

# headers of columns that are not right-aligned
_TEXT = ("source", "converted", "outcome", "known", "note", "what to do", "metric", "")
CONTEXTS = {"4K": 4096, "32K": 32768, "128K": 131072}


def size(num_bytes: float) -> str:
    """Bytes with a binary unit: 640 B, 30.0 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def show_plan(plan: Plan, console: Console) -> None:
    gqa, mla = plan.gqa, plan.mla
    console.print(f"[bold]{plan.resolved.name}[/]  {plan.family.model_type}, {plan.source.format}", highlight=False)
    geometry = _table("", "source", "converted")
    geometry.add_row("attention", f"{gqa.kind}, {gqa.num_key_value_heads} KV heads", "MLA")
    geometry.add_row("layers, hidden size", f"{gqa.num_hidden_layers}, {gqa.hidden_size}", "same")
    geometry.add_row("query heads", str(gqa.num_attention_heads), "same")
    geometry.add_row("head_dim", str(gqa.head_dim), f"nope {mla.qk_nope_head_dim}, v {mla.v_head_dim}")
    geometry.add_row("kv_lora_rank + qk_rope_head_dim", "", f"{mla.kv_lora_rank} + {mla.qk_rope_head_dim}")
    if mla.q_lora_rank:
        geometry.add_row("q_lora_rank", "", str(mla.q_lora_rank))
    geometry.add_row("cached values per token and layer", str(gqa.cache_values()), str(mla.cache_values()))
    geometry.add_row("max_position_embeddings", "", f"{plan.max_position_embeddings:,}")
    geometry.add_row("weights", "", plan.dtype)
    console.print(geometry)
    console.print(_cache_table(plan))
    console.print("[dim]values: per layer; bytes: all layers[/]", highlight=False)
    console.print(_engines_table(plan.engines))
    console.print(f"needs about {size(plan.memory_bytes)} of memory, {size(plan.disk_bytes)} of disk", highlight=False)
    for note in plan.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)


def show_diagnosis(found: Diagnosis, console: Console) -> None:
    console.print(
        f"[bold]{found.model}[/]  {found.geometry}, {found.values_per_token} cached values per token and layer, "
        f"{found.dtype}",
        highlight=False,
    )
    console.print(_engines_table(found.engines, remedies=True))


def show_export(report: ExportReport, console: Console) -> None:
    before, after = report.values_per_token
    made = f", quantised by {report.quantiser}" if report.quantiser else ""
    console.print(f"written   {report.path}  ({size(report.num_bytes)}, {report.format}{made})", highlight=False)
    cost = "as before" if before == after else f"{before} before ({after / before - 1:+.1%}); the same function"
    console.print(f"cached    {after} values per token and layer, {cost}", highlight=False)


def show_healing(report: HealReport, console: Console) -> None:
    table = _table("held out", "divergence", "", "perplexity", "", "source", "recovery", "")
    for text in report.texts:
        before, after = report.before[text], report.after[text]
        table.add_row(
            text,
            f"{before['divergence']:.4f}", f"-> {after['divergence']:.4f}",
            f"{math.exp(before['nats']):.3f}", f"-> {math.exp(after['nats']):.3f}",
            f"{math.exp(after['source_nats']):.3f}",
            f"{before['recovery']:.1%}", f"-> {after['recovery']:.1%} ± {after['recovery_error']:.1%}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "[dim]divergence: nats per token; recovery: perplexity of the source over the model's, ± one standard error[/]",
        highlight=False,
    )
    best = "" if report.best_step == report.steps else f" of {report.steps:,}; the later ones were worse"
    facts = _table("", " ")
    facts.add_row("trained on", f"{report.tokens:,} tokens, {report.best_step:,} steps{best}")
    if report.distinct < report.tokens:
        facts.add_row("of these distinct", f"{report.distinct:,}")
    repeated = [f"{text} {count} times" for text, count in report.passes.items() if count > 1]
    if repeated:
        facts.add_row("texts that began anew", ", ".join(repeated))
    facts.add_row("trained", f"{report.num_trained:,} parameters, steps of {report.rate:g} of their size")
    facts.add_row("time", f"{report.seconds:,.0f} s")
    facts.add_row("written", f"{report.destination}")
    console.print(facts)


def _engines_table(verdicts: tuple[EngineVerdict, ...], remedies: bool = False) -> Table:
    """One row per engine and finding; why it does not run, or what to know if it does."""
    table = _table("engine", "outcome", "known", "note", *(("what to do",) if remedies else ()))
    colours = {"runs": "green", "refuses": "red", "computes something else": "bold red"}
    for verdict in verdicts:
        first = (verdict.engine, f"[{colours[verdict.outcome]}]{verdict.outcome}[/]", f"[dim]{verdict.evidence}[/]")
        if not verdict.findings:
            table.add_row(*first, verdict.note, *(("",) if remedies else ()))
        for number, finding in enumerate(verdict.findings):
            cells = first if number == 0 else ("", "", "")
            table.add_row(*cells, finding.why, *((finding.remedy,) if remedies else ()))
    return table


def _cache_table(plan: Plan) -> Table:
    own = plan.cache[0].bytes_per_token
    table = _table("cache per token", "values", "bytes", "of source", *(f"at {name}" for name in CONTEXTS))
    for row in plan.cache:
        totals = (size(row.total_bytes(context)) for context in CONTEXTS.values())
        share = f"{row.bytes_per_token / own:.1%}"
        table.add_row(row.name, str(row.values_per_token), f"{row.bytes_per_token:,.0f}", share, *totals)
    return table


def show_conversion(report: ConversionReport, peak_memory: int, console: Console) -> None:
    gqa, mla, heldout = report.plan.gqa, report.plan.mla, report.heldout
    table = _table("", "source", "converted", "")
    values = (gqa.cache_values(), mla.cache_values())
    table.add_row("cached values per token and layer", *map(str, values), f"{report.plan.cache_ratio - 1:+.1%}")
    rows = report.plan.cache
    table.add_row(
        "cache bytes per token, bf16", f"{rows[0].bytes_per_token:,.0f}", f"{rows[-1].bytes_per_token:,.0f}", ""
    )
    for row in rows[1:3]:
        table.add_row(f"  beside: {row.name}", f"{row.bytes_per_token:,.0f}", "", f"{_share(row, rows[0]):+.1%}")
    table.add_row(
        f"perplexity, {heldout.num_windows} held-out calibration windows",
        f"{math.exp(heldout.source):.3f}",
        f"{math.exp(heldout.converted):.3f}",
        f"x{math.exp(heldout.converted - heldout.source):.3f}",
    )
    console.print(table)
    last = report.layers[-1]
    refined = {
        f"refined, layers {block.first_layer}-{block.last_layer}": _refined(block, block is report.blocks[-1])
        for block in report.blocks
    }
    lost = [layer.query_loss for layer in report.layers if layer.query_loss is not None]
    narrow = (
        {f"queries, rank {mla.q_lora_rank}": f"{sum(lost) / len(lost):.2%} of their energy dropped"} if lost else {}
    )
    facts = {
        "rope_theta": f"{report.theta:g}" + (" (chosen by measured error)" if report.theta_losses else ""),
        "stream error, fitted": f"{last.stream_loss_fitted:.2%} fitted, {last.stream_loss_heldout:.2%} held out",
        **narrow,
        **refined,
        "verified": f"stock deepseek_v3 class, relative error {report.verification.relative_error:.1e}",
        "calibration": f"{report.num_calibration_tokens:,} tokens of {report.plan.recipe.mix}",
        "time, peak memory": f"{report.seconds:.0f} s, {size(peak_memory)}",
        "written": f"{report.destination}  ({size(report.written_bytes)}, {report.plan.dtype})",
    }
    for name, value in facts.items():
        console.print(f"{name:<24} {value}", highlight=False, soft_wrap=True)


def _refined(block: BlockReport, last: bool) -> str:
    unit = "nats of KL" if last else "of the stream"
    found = f"{block.loss_before:.4f} -> {block.loss_after:.4f} {unit}, held out, {block.steps} steps"
    if block.steps < block.planned:
        found += f" of {block.planned}: then the loss or a gradient was not finite"
    return found if block.taken else f"{found}; not taken: no better than before"


def show_evaluation(report: EvaluationReport, console: Console) -> None:
    """One table per part that was measured; the first has what every evaluation has."""
    model, source = report.model, report.source
    first = perplexity_of(model, report.text)
    console.print(_perplexities(report))
    console.print(
        f"{report.text}: {len(first.nats_N)} windows of {report.made['length']:,} tokens, {report.made['dtype']}, "
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
    for made in (_positions(model, source), _tasks(report), _needles(model, source), _smoke(model, source)):
        if made is not None:
            console.print(made)
    for gate in report.gates:
        verdict = "[green]passed[/]" if gate.passed else "[red]missed[/]"
        console.print(f"gate {verdict}  {gate.name}: {gate.found:.3f} of {gate.wanted}", highlight=False)
    for one in report.skipped:
        console.print(f"[yellow]left out[/] {one.part} of {one.model}: {one.why}", highlight=False)


def _perplexities(report: EvaluationReport) -> Table:
    """First text, cache bytes; with rounded caches if they were measured, else with their sizes."""
    table = _table("model", "perplexity", "ratio to source", "bytes/token", "of source")
    source = report.source
    base = source["cache_bytes_per_token"] if source else None
    wanted = perplexity_of(source, report.text) if source else None

    def add(name: str, nats: Perplexity | None, size: float, is_source: bool = False) -> None:
        shown = "" if nats is None else _plus_minus(nats, 3)
        compared = "1" if is_source else _plus_minus(ratio(nats, wanted), 4) if nats and wanted else ""
        table.add_row(name, shown, compared, f"{size:,.0f}", f"{size / base:.1%}" if base else "")

    for one in filter(None, (source, report.model)):
        is_source = one is source
        add(_name(one), perplexity_of(one, report.text), one["cache_bytes_per_token"], is_source)
        for row in filter(None, one.get("quantised", [])):
            add(f"  {row['bits']}-bit cache", Perplexity(tuple(row["nats"]), 0), row["bytes_per_token"])
    if source and not source.get("quantised"):
        for name, size in quantised_sizes(source, report.made["dtype"]).items():
            add(f"source, {name} cache (size only)", None, size)
    return table


def _other_texts(report: EvaluationReport) -> Table:
    table = _table("text", "source perplexity", "model perplexity", "ratio to source")
    for text in report.model["texts"]:
        own = _plus_minus(perplexity_of(report.model, text), 3)
        if report.source is None or text not in report.source["texts"]:
            table.add_row(text, "", own, "")
            continue
        base = perplexity_of(report.source, text)
        table.add_row(text, _plus_minus(base, 3), own, _plus_minus(ratio(perplexity_of(report.model, text), base), 4))
    return table


def _positions(model: dict[str, Any], source: dict[str, Any] | None) -> Table | None:
    if not model.get("positions"):
        return None
    edges = model["positions"]["edges"]
    table = _table("perplexity by position", *(f"{a:,}-{b:,}" for a, b in itertools.pairwise(edges)))
    rows = {}
    for one in (source, model):
        # a window of another length has other ranges
        if one and one.get("positions") and one["positions"]["edges"] == edges:
            columns = zip(*one["positions"]["nats"], strict=True)
            rows[_name(one)] = [math.exp(sum(column) / len(column)) for column in columns]
            table.add_row(_name(one), *(f"{value:.2f}" for value in rows[_name(one)]))
    if len(rows) == 2:
        base, own = rows.values()
        table.add_row("ratio", *(f"{b / a:.3f}" for a, b in zip(base, own, strict=True)))
    return table


def _tasks(report: EvaluationReport) -> Table | None:
    if not report.model.get("tasks"):
        return None
    base = {(row["task"], row["metric"]): row for row in (report.source or {}).get("tasks", [])}
    compared = {(row["task"], row["metric"]): row for row in (report.comparison or {}).get("tasks", [])}
    table = _table("task", "metric", "source", "model", "difference", "recovery")
    for row in report.model["tasks"]:
        key = (row["task"], row["metric"])
        cells = [f"{one['value']:.4f} ± {one['standard_error']:.4f}" if one else "" for one in (base.get(key), row)]
        if key in compared:
            found = compared[key]
            cells += [f"{found['difference']:+.4f} ± {found['standard_error']:.4f}", f"{found['recovery']:.1%}"]
        table.add_row(*key, *cells)
    return table


def _needles(model: dict[str, Any], source: dict[str, Any] | None) -> Table | None:
    if not model.get("needles"):
        return None
    table = _table("needles found at", *model["needles"])
    for one in filter(None, (source, model)):
        found = one.get("needles") or {}
        cells = (found.get(size) for size in model["needles"])
        table.add_row(_name(one), *(f"{c['found']:.0%} ± {c['standard_error']:.0%}" if c else "" for c in cells))
    return table


def _smoke(model: dict[str, Any], source: dict[str, Any] | None) -> Table | None:
    if not model.get("smoke"):
        return None
    table = _table("greedy text of", "empty", "repeated 4-grams")
    for one in filter(None, (source, model)):
        found = one["smoke"]
        table.add_row(_name(one), f"{found['num_empty']}/{len(found['continuations'])}", f"{found['repeated']:.0%}")
    return table


def show_bench(report: BenchReport, console: Console) -> None:
    table = _table(
        "model", "batch", "context", "first token", "prefill tok/s", "decode tok/s", "speed", "x floor", "cache B/token"
    )
    for row in report.rows:
        head = (row.model, str(row.batch), f"{row.context:,}")
        if row.failed or row.tokens_per_second is None:
            table.add_row(*head, row.failed or "", "", "", "", "", "")
            continue
        table.add_row(
            *head,
            f"{row.first_token_seconds:.2f} s",
            f"{row.prefill_tokens_per_second:,.0f}",
            f"{row.tokens_per_second:.1f} ({row.slowest:.1f}-{row.fastest:.1f})",
            f"{row.speed_ratio:.2f}x" if row.speed_ratio else "",
            f"{row.of_floor:.1f}",
            f"{row.cache_bytes_per_token:,.0f}",
        )
    console.print(table)
    rates, setting = report.rates, report.setting
    console.print(
        f"{setting['dtype']} on {setting['device_name']}, {setting['threads']} threads; this machine multiplies "
        f"{rates.multiply_adds / 1e9:,.0f} G/s and copies {rates.bytes / 2**30:,.1f} GiB/s. Median of "
        f"{setting['repeats']} alternating timings (slowest-fastest)",
        highlight=False,
    )
    for note in report.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int, str], None] | None]:
    """A progress callback that draws one bar per stage on stderr; None when quiet."""
    if quiet:
        yield None
        return
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.completed:>4}/{task.total:<4}"))
    clocks = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("[dim]{task.fields[remark]}"))
    with Progress(*columns, *clocks, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int, remark: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, remark=remark)
            bars.update(tasks[stage], completed=done, total=total, remark=remark)

        yield update


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, header in enumerate(headers):
        numeric = index > 0 and header not in _TEXT
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    return table


def _share(row: Any, base: Any) -> float:
    return float(row.bytes_per_token / base.bytes_per_token - 1)


def _name(model: dict[str, Any]) -> str:
    """Without the folders around it."""
    return Path(model["name"]).name


def _plus_minus(found: Any, digits: int) -> str:
    return f"{found.value:.{digits}f} ± {found.standard_error:.{digits}f}"
