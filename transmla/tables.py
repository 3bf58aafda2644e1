"""What all tables share: their look, how sizes and errors are written, and reports that print as their tables."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# of a report that is printed from Python; narrower consoles get fewer columns
WIDTH = 100

# headers of columns that are not right-aligned
_TEXT = (
    "engines that run it",
    "source",
    "converted",
    "outcome",
    "evidence",
    "note",
    "what to do",
    "metric",
    "engines",
    "state",
    "form",
    "",
    " ",
)


def columns(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, header in enumerate(headers):
        numeric = index > 0 and header not in _TEXT
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    return table


def is_narrow(console: Console) -> bool:
    """Whether a table of many columns has to do with less."""
    return console.width < WIDTH


def size(num_bytes: float) -> str:
    """Bytes with a binary unit: 640 B, 30.0 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def short_names(models: Iterable[str]) -> list[str]:
    """Models without the folders around them, the source first: it says so where another one is called alike."""
    first, *others = (Path(model).name for model in models)
    return [f"{first} (source)" if first in others else first, *others]


def plus_minus(found: Any, digits: int) -> str:
    return f"{found.value:.{digits}f} ± {found.standard_error:.{digits}f}"


class Shown:
    """A report that prints as the tables of its command, and in a notebook as well."""

    def show(self, console: Console) -> None:
        """Print it."""
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, no_color=True, highlight=False)
        self.show(console)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, record=True, highlight=False)
        self.show(console)
        style = "font-family: ui-monospace, monospace; line-height: 1.3; overflow-x: auto"
        return console.export_html(inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>')
