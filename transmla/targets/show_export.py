"""What `transmla export` says of what it wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from transmla.tables import size

if TYPE_CHECKING:
    from transmla.targets.export import ExportReport


def show_export(report: ExportReport, console: Console) -> None:
    before, after = report.values_per_token
    made = f", quantised by {report.quantiser}" if report.quantiser else ""
    written = f"written   {report.path}  ({size(report.num_bytes)}, {report.format}{made})"
    console.print(written, highlight=False, markup=False)
    if report.kept:
        kinds = sorted({(name.split(".")[2], kind) for name, kind in report.kept.items()})
        kept = ", ".join(f"{name} as {kind}" for name, kind in kinds)
        console.print(f"kept      {kept}: rows too small for {report.format}", highlight=False)
    cost = "as before" if before == after else f"{before} before ({after / before - 1:+.1%}); the same function"
    console.print(f"cached    {after} values per token and layer, {cost}", highlight=False)
