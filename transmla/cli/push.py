"""transmla push."""

from __future__ import annotations

import click

from transmla.cli.frame import command, errors, option, quiet, quiet_libraries


@command("push", "transmla push OUT you/name --private")
@click.argument("model", metavar="OUT")
@click.argument("repository", metavar="REPO")
@option(
    "--private",
    is_flag=True,
    group="Repository",
    help="Create the repository as a private one, if it is not there yet.",
)
@option(
    "--message", metavar="TEXT", group="Repository", help="Of the commit. [default: names the program and its version]"
)
@quiet
def push_command(model: str, repository: str, private: bool, message: str | None, quiet: bool) -> None:
    """Upload the converted folder OUT to REPO (owner/name) on the model hub, with its model card.

    Only what belongs to the model goes along. Paths of this machine are taken out of the model card and the
    provenance, and whatever looks like an access token stops the upload. Log in first: hf auth login.
    """
    with errors():
        import transmla

        quiet_libraries(bars=not quiet)
        click.echo(transmla.push(model, repository, private=private, message=message))
