"""What all tables share: their look, and how sizes and errors are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

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
)


def columns(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, header in enumerate(headers):
        numeric = index > 0 and header not in _TEXT
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    return table


def size(num_bytes: float) -> str:
    """Bytes with a binary unit: 640 B, 30.0 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def name_of(model: dict[str, Any]) -> str:
    """Without the folders around it."""
    return Path(model["name"]).name


def plus_minus(found: Any, digits: int) -> str:
    return f"{found.value:.{digits}f} ± {found.standard_error:.{digits}f}"
