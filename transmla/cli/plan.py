"""transmla plan."""

from __future__ import annotations

import json
from typing import Any

import click

from transmla.cli.convert import geometry_options, sizes
from transmla.cli.frame import EPILOG, errors, option, quiet_libraries


@click.command("plan", epilog=EPILOG)
@click.argument("source", metavar="SRC")
@geometry_options
@option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def plan_command(source: str, as_json: bool, **given: Any) -> None:
    """Say what `convert` would do, from file headers alone: geometry, cache, memory, disk, engines."""
    with errors():
        import transmla

        quiet_libraries()
        found = transmla.plan(source, **sizes(given))
        if as_json:
            click.echo(json.dumps(found.summary(), indent=2))
            return
        from rich.console import Console

        from transmla.cli.show.plan import show_plan

        show_plan(found, Console())
