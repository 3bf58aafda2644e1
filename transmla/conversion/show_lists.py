"""The tables of `transmla recipes` and `transmla families`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from transmla.tables import columns
from transmla.targets.engines import ENGINES

if TYPE_CHECKING:
    from transmla.conversion.listing import FamilyRow, RecipeRow


def show_recipes(rows: tuple[RecipeRow, ...]) -> None:
    """One line for each recipe."""
    table = columns("recipe", "size", "values", "now", "saved", "engines", "state")
    for row in rows:
        engines = _short(row.engines)
        saved = f"{1 - row.after / row.before:.0%}"
        table.add_row(row.name, row.size, f"{row.before:,}", f"{row.after:,}", saved, engines, row.state)
    console = Console()
    console.print(table)
    console.print("values: cached per token and layer, before the conversion and now", highlight=False)


def show_families(rows: tuple[FamilyRow, ...]) -> None:
    """One line for each family."""
    table = columns("family", "form", "note")
    for row in rows:
        table.add_row(row.model_type, row.form, "; ".join(row.obstacles))
    console = Console()
    console.print(table)
    console.print("note: what deepseek_v3 cannot express of a model with the family's defaults", highlight=False)


def _short(engines: tuple[str, ...]) -> str:
    """All, all but a few, or those that are: transformers once, and what is not transformers."""
    missing = [engine for engine in ENGINES if engine not in engines]
    if len(missing) < len(engines) / 2:
        return f"all but {', '.join(missing)}" if missing else "all"
    others = [engine for engine in engines if not engine.startswith("transformers")]
    return ", ".join(["transformers", *others])
