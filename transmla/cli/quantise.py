"""transmla quantise."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from transmla.cli.frame import as_json, command, device, emit, errors, option, quiet, quiet_libraries


@command("quantise", "transmla quantise OUT OUT2", "transmla generate OUT2 PROMPT --cache latent-coded3")
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@option(
    "--text",
    metavar="TEXT",
    default="wikitext:2+synthetic+code",
    help="Text whose statistics are taken, as for convert --calibration.",
    group="Calibration text",
)
@option(
    "--tokens",
    type=click.IntRange(min=1024),
    default=16384,
    metavar="N",
    help="Tokens of it.",
    group="Calibration text",
)
@option(
    "--seed",
    type=int,
    default=0,
    help="Of the sampled predictions, and of the rotation.",
    group="Calibration text",
)
@option(
    "--basis",
    type=click.Choice(("coded", "spread")),
    default="coded",
    group="Result",
    help="coded: for caches that deal bits by importance (generate --cache latent-coded3); spread: a rotation of it, "
    "for caches that give every value the same, as those of engines.",
)
@device
@as_json
@quiet
def quantise_command(model: str, out: str, json_file: str | None, quiet: bool, **given: Any) -> None:
    """Write the converted folder MODEL with latents in a basis that is easy to round, to OUT.

    It computes what MODEL computes and runs wherever that runs. Its config also holds what a coded cache of any number
    of bits has to know: generate --cache latent-coded3, eval --quantised 3,2.5.
    """
    with errors():
        import transmla

        quiet_libraries()
        from rich.console import Console

        from transmla.cli.progress import progress
        from transmla.targets.show_quantise import show_quantised

        with progress(quiet) as update:
            report = transmla.quantise(model, out, progress=update, **given)
        emit(lambda: asdict(report), json_file, lambda: show_quantised(report, Console()))
