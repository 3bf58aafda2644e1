"""The table of `transmla bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from transmla.cli.show.tables import columns

if TYPE_CHECKING:
    from transmla.evaluation.speed import BenchReport


def show_bench(report: BenchReport, console: Console) -> None:
    table = columns(
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
