"""transmla doctor."""

from __future__ import annotations

import json

import click

from transmla.cli.frame import EPILOG, errors, option, quiet_libraries


@click.command("doctor", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor_command(model: str, as_json: bool) -> None:
    """Say for each inference engine whether it runs the folder MODEL, refuses it, or would compute something else."""
    with errors():
        import transmla

        quiet_libraries()
        found = transmla.doctor(model)
        if as_json:
            click.echo(json.dumps(found.summary(), indent=2))
            return
        from rich.console import Console

        from transmla.cli.show.doctor import show_diagnosis

        show_diagnosis(found, Console())
