"""transmla verify."""

from __future__ import annotations

import click

from transmla.cli.frame import as_json, command, emit, errors, quiet, quiet_libraries
from transmla.errors import VerificationError


@command("verify", "transmla verify OUT", "transmla verify OUT --json")
@click.argument("model", metavar="OUT")
@as_json
@quiet
def verify_command(model: str, json_file: str | None, quiet: bool) -> None:
    """Check that the folder OUT is what was written: SHA-256 of its files, shapes, finite values, tokenizer, a forward
    pass. Nothing is repaired; exit code 9 if a check fails, 3 if OUT cannot be read, 4 if it is no converted folder.
    """
    with errors():
        import transmla

        quiet_libraries()
        from rich.console import Console

        from transmla.cli.progress import progress
        from transmla.targets.show_verify import show_verified

        with progress(quiet) as update:
            found = transmla.verify(model, progress=update)
        emit(found.summary, json_file, lambda: show_verified(found, Console()))
        failed = [check for check in found.checks if check.passed is False]
        if failed:
            raise VerificationError(
                f"{len(failed)} of {len(found.checks)} checks failed",
                where=model,
                why="; ".join(f"{check.name}: {check.found}" for check in failed),
                remedy="nothing was changed; copy the folder again, or write it anew with the command that made it",
            )
