"""The table of `transmla bench`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transmla.tables import columns, is_narrow, short_names, size

if TYPE_CHECKING:
    from transmla.evaluation.budget import Budget, Held
    from transmla.evaluation.speed import BenchReport, Timing


def show_bench(report: BenchReport, console: Console) -> None:
    narrow = is_narrow(console)
    if report.budget is None:
        console.print(_grid(report.rows, narrow))
    else:
        console.print(_budget(report.budget, narrow))
        console.print(f"most texts whose caches fit into {size(report.budget.bytes)} together", highlight=False)
        for remark in dict.fromkeys(row.remark for row in report.budget.rows if row.remark and ":" in row.remark):
            console.print(remark, highlight=False)
    rates, setting = report.rates, report.setting
    console.print(
        f"{setting['dtype']} on {setting['device_name']}, {setting['threads']} threads; this machine multiplies "
        f"{rates.multiply_adds / 1e9:,.0f} G/s and copies {rates.bytes / 2**30:,.1f} GiB/s. Median of "
        f"{setting['repeats']} alternating timings (slowest-fastest)",
        highlight=False,
    )
    if narrow and report.budget is None:
        console.print("time to the first token and x floor: in a wider window, or with --json", highlight=False)
    for note in report.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)


def _called(rows: Sequence[Timing | Held]) -> dict[str, str]:
    """Models, the source first, and what they are called in tables."""
    models = list(dict.fromkeys(row.model for row in rows))
    return dict(zip(models, map(escape, short_names(models)), strict=True))


def _grid(rows: tuple[Timing, ...], narrow: bool) -> Table:
    wide = {"first token", "x floor"} if narrow else set()
    heads = (
        "model", "batch", "context", "first token", "prefill tok/s", "decode tok/s", "speed", "x floor", "cache B/token"
    )  # fmt: skip
    shown = [name not in wide for name in heads]
    table = columns(*itertools.compress(heads, shown))
    called = _called(rows)
    for row in rows:
        head = (called[row.model], str(row.batch), f"{row.context:,}")
        if row.failed or row.tokens_per_second is None:
            cells = (*head, "", row.failed or "", "", "", "", "")
        else:
            cells = (
                *head,
                f"{row.first_token_seconds:.2f} s",
                f"{row.prefill_tokens_per_second:,.0f}",
                f"{row.tokens_per_second:.1f} ({row.slowest:.1f}-{row.fastest:.1f})",
                f"{row.speed_ratio:.2f}x" if row.speed_ratio else "",
                f"{row.of_floor:.1f}",
                f"{row.cache_bytes_per_token:,.0f}",
            )
        table.add_row(*itertools.compress(cells, shown))
    return table


def _budget(budget: Budget, narrow: bool) -> Table:
    heads = ["model", "cache", "context", "texts", "tokens", "B/text", "decode tok/s", "speed"]
    shown = [not (narrow and name in ("tokens", "B/text")) for name in heads]
    table = columns(*itertools.compress(heads, shown))
    called = _called(budget.rows)
    for row in budget.rows:
        cells = (
            called[row.model], row.cache, f"{row.context:,}", f"{row.texts:,}", f"{row.tokens:,}",
            f"{row.bytes_per_text:,}",
            row.remark.partition(":")[0] if row.remark
            else f"{row.tokens_per_second:.1f} ({row.slowest:.1f}-{row.fastest:.1f})",
            f"{row.speed_ratio:.2f}x" if row.speed_ratio else "",
        )  # fmt: skip
        table.add_row(*itertools.compress(cells, shown))
    return table
