"""transmla generate."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from transmla.cli.frame import NumberRange, command, device, errors, option, quiet_libraries
from transmla.recipe import DTYPES


@command(
    "generate",
    'transmla generate OUT "Once upon a time"',
    'transmla generate OUT "What is a latent?" --chat --temperature 0',
)
@click.argument("model", metavar="MODEL")
@click.argument("prompt", metavar="PROMPT")
@option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    metavar="N",
    help="Tokens to generate at most.",
    group="Text",
)
@option(
    "--temperature",
    type=NumberRange(min=0),
    default=0.8,
    metavar="T",
    help="0: most likely token.",
    group="Text",
)
@option(
    "--top-p",
    type=NumberRange(min=0, max=1),
    default=0.95,
    metavar="P",
    help="Nucleus to sample from.",
    group="Text",
)
@option(
    "--seed",
    type=int,
    default=0,
    help="Of the sampling.",
    group="Text",
)
@option(
    "--chat",
    is_flag=True,
    help="Put PROMPT through the chat template as a user's message.",
    group="Text",
)
@option(
    "--cache",
    metavar="KIND",
    help="Of a converted folder: latent (as computed), latent-int8, -int4, -int3, -int2, or with a folder of `transmla "
    "quantise` latent-coded3, latent-coded2.5 ... [default: that of transformers]",
    group="Machine",
)
@option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    help="To compute in; auto: as stored.",
    group="Machine",
)
@device
def generate_command(model: str, prompt: str, chat: bool, **given: Any) -> None:
    """Stream a continuation of PROMPT from MODEL, a converted folder or a source."""
    with errors():
        import transmla

        quiet_libraries()
        with closing(transmla.generate(model, prompt, chat=chat, **given)) as pieces:
            first = next(pieces, "")  # or an error, which has no prompt in front of it
            click.echo(f"{'' if chat else prompt}{first}", nl=False)
            for piece in pieces:
                click.echo(piece, nl=False)
        click.echo()
