"""transmla recipes and transmla families."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from transmla.cli.frame import EPILOG, errors, option, quiet_libraries


@click.command("recipes", epilog=EPILOG)
@option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def recipes_command(as_json: bool) -> None:
    """List the installed recipes: what they convert, how much cache is left, and which engines run the result.

    A recipe's name can stand for SRC in every command. Measured: there are results in eval/results; planned: not yet.
    """
    _listed("recipes", as_json)


@click.command("families", epilog=EPILOG)
@option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def families_command(as_json: bool) -> None:
    """List the model families that can be converted, and the form that each of them gets.

    deepseek_v3 runs in all engines; transmla is the family's own class with latent attention, for transformers.
    """
    _listed("families", as_json)


def _listed(what: str, as_json: bool) -> None:
    """Print what `transmla.list_recipes` or `transmla.list_families` returns."""
    with errors():
        import transmla

        quiet_libraries()
        rows = getattr(transmla, f"list_{what}")()
        if as_json:
            click.echo(json.dumps([asdict(row) for row in rows], indent=2))
            return
        from transmla.cli.show import lists

        getattr(lists, f"show_{what}")(rows)
