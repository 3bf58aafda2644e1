"""transmla verify."""

from __future__ import annotations

import json

import click

from transmla.cli.frame import EPILOG, errors, option, quiet_libraries
from transmla.errors import VerificationError


@click.command("verify", epilog=EPILOG)
@click.argument("model", metavar="OUT")
@option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@option("-q", "--quiet", is_flag=True, help="Show no progress.")
def verify_command(model: str, as_json: bool, quiet: bool) -> None:
    """Check that the folder OUT is what was written: SHA-256 of its files, shapes, finite values, tokenizer, a forward
    pass. Nothing is repaired; exit code 9 if a check fails, 3 if OUT cannot be read, 4 if it is no converted folder.
    """
    with errors():
        import transmla

        quiet_libraries()
        from rich.console import Console

        from transmla.cli.progress import progress
        from transmla.cli.show.verify import show_verified

        with progress(quiet or as_json) as update:
            found = transmla.verify(model, progress=update)
        if as_json:
            click.echo(json.dumps(found.summary(), indent=2))
        else:
            show_verified(found, Console())
        failed = [check for check in found.checks if check.passed is False]
        if failed:
            raise VerificationError(
                f"{len(failed)} of {len(found.checks)} checks failed",
                where=model,
                why="; ".join(f"{check.name}: {check.found}" for check in failed),
                remedy="nothing was changed; copy the folder again, or write it anew with the command that made it",
            )
