"""transmla plan."""

from __future__ import annotations

from typing import Any

import click

from transmla.cli.convert import form_options, geometry_options, sizes
from transmla.cli.frame import as_json, command, emit, errors, quiet_libraries


@command(
    "plan",
    "transmla plan stories260k",
    "transmla plan llama-3-8b --latent 256",
    "transmla plan SRC --rope auto --total 576",
)
@click.argument("source", metavar="SRC")
@geometry_options
@form_options
@as_json
def plan_command(source: str, json_file: str | None, **given: Any) -> None:
    """Say what `convert` would do, from file headers alone: geometry, cache, memory, disk, engines.

    SRC is a Hugging Face folder, a .gguf file, a hub id, the name of a recipe, or stories260k. Nothing is written; of a
    hub id, config and headers alone are downloaded.
    """
    with errors():
        import transmla

        quiet_libraries(loading=False)
        found = transmla.plan(source, **sizes(given))
        from rich.console import Console

        from transmla.conversion.show_plan import show_plan

        emit(found.summary, json_file, lambda: show_plan(found, Console()))
