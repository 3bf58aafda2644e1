"""What `transmla verify` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from transmla.tables import columns

if TYPE_CHECKING:
    from transmla.targets.verify import Verified

_WORDS = {True: "[green]passed[/]", False: "[bold red]failed[/]", None: "[dim]not checked[/]"}


def show_verified(found: Verified, console: Console) -> None:
    table = columns("check", "outcome", "found")
    for check in found.checks:
        table.add_row(check.name, _WORDS[check.passed], escape(check.found))
    console.print(table)
