"""What `transmla doctor` shows, and the table of engines that `plan` shows as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transmla.tables import columns, is_narrow

if TYPE_CHECKING:
    from transmla.targets.doctor import Diagnosis
    from transmla.targets.engines import EngineVerdict


def show_diagnosis(found: Diagnosis, console: Console) -> None:
    if found.form == "source":
        console.print(
            f"{found.model} is not converted. With the defaults, `transmla convert` would make:",
            highlight=False,
            markup=False,
        )
    console.print(
        f"[bold]{escape(str(found.model))}[/]  {found.geometry}, {found.values_per_token} cached values per token and "
        f"layer, {found.dtype}",
        highlight=False,
    )
    for note in found.notes:
        console.print(note, highlight=False, markup=False)
    console.print(engines_table(found.engines, remedies=True) if not is_narrow(console) else _narrow(found.engines))


def _narrow(verdicts: tuple[EngineVerdict, ...]) -> Table:
    """The same in three columns: what to do stands below the reason."""
    table = columns("engine", "outcome", "note")
    for verdict in verdicts:
        notes = [
            text for one in verdict.findings for text in (escape(one.why), f"[dim]fix:[/] {escape(one.remedy)}")
        ] or [escape(verdict.note)]
        cells = (verdict.engine, f"{_coloured(verdict)}\n[dim]{verdict.evidence}[/]")
        for number, note in enumerate(notes):
            table.add_row(*(cells if number == 0 else ("", "")), note)
    return table


def engines_table(verdicts: tuple[EngineVerdict, ...], remedies: bool = False) -> Table:
    """One row per engine and finding; why it does not run, or what to know if it does."""
    table = columns("engine", "outcome", "evidence", "note", *(("what to do",) if remedies else ()))
    for verdict in verdicts:
        first = (verdict.engine, _coloured(verdict), f"[dim]{verdict.evidence}[/]")
        if not verdict.findings:
            table.add_row(*first, escape(verdict.note), *(("",) if remedies else ()))
        for number, finding in enumerate(verdict.findings):
            cells = first if number == 0 else ("", "", "")
            table.add_row(*cells, escape(finding.why), *((escape(finding.remedy),) if remedies else ()))
    return table


def _coloured(verdict: EngineVerdict) -> str:
    colour = {"runs": "green", "refuses": "red", "computes something else": "bold red"}[verdict.outcome]
    return f"[{colour}]{verdict.outcome}[/]"
