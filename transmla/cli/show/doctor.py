"""What `transmla doctor` shows, and the table of engines that `plan` shows as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from transmla.cli.show.tables import columns

if TYPE_CHECKING:
    from transmla.targets.doctor import Diagnosis
    from transmla.targets.engines import EngineVerdict


def show_diagnosis(found: Diagnosis, console: Console) -> None:
    console.print(
        f"[bold]{found.model}[/]  {found.geometry}, {found.values_per_token} cached values per token and layer, "
        f"{found.dtype}",
        highlight=False,
    )
    console.print(engines_table(found.engines, remedies=True))


def engines_table(verdicts: tuple[EngineVerdict, ...], remedies: bool = False) -> Table:
    """One row per engine and finding; why it does not run, or what to know if it does."""
    table = columns("engine", "outcome", "evidence", "note", *(("what to do",) if remedies else ()))
    colours = {"runs": "green", "refuses": "red", "computes something else": "bold red"}
    for verdict in verdicts:
        first = (verdict.engine, f"[{colours[verdict.outcome]}]{verdict.outcome}[/]", f"[dim]{verdict.evidence}[/]")
        if not verdict.findings:
            table.add_row(*first, verdict.note, *(("",) if remedies else ()))
        for number, finding in enumerate(verdict.findings):
            cells = first if number == 0 else ("", "", "")
            table.add_row(*cells, finding.why, *((finding.remedy,) if remedies else ()))
    return table
