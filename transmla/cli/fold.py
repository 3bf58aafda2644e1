"""transmla unfold and transmla fold: the form for training, and back."""

from __future__ import annotations

from typing import Any

import click

from transmla.cli.frame import command, device, errors, option, quiet, quiet_libraries
from transmla.recipe import DTYPES

dtype = option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    group="Result",
    help="Dtype of the written weights; auto: that of MODEL.",
)


@command("unfold", "transmla unfold OUT TRAIN", "transmla unfold OUT TRAIN --dtype float32")
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@dtype
@quiet
def unfold_command(model: str, out: str, dtype: str, quiet: bool) -> None:
    """Write the converted folder MODEL in the form for training: weights of ordinary size, no norm on the latent.

    Any trainer takes it with trust_remote_code=True, or as transmla.load(OUT). `transmla fold` makes the stock form of
    the result. MODEL itself must not be trained: an optimizer step destroys its latent rows, which are about 1e-5.
    """
    with errors():
        import transmla

        quiet_libraries()
        from transmla.cli.progress import progress

        with progress(quiet) as update:
            click.echo(transmla.unfold(model, out, dtype=dtype, progress=update))


@command("fold", "transmla fold TRAINED OUT2")
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@option(
    "--text",
    metavar="TEXT",
    default="wikitext",
    group="Result",
    help="Of which a piece is run through both forms.",
)
@dtype
@device
@quiet
def fold_command(model: str, out: str, quiet: bool, **given: Any) -> None:
    """Write the unfolded folder MODEL in the stock form again, after training; verified through the stock class."""
    with errors():
        import transmla

        quiet_libraries()
        from transmla.cli.progress import progress

        with progress(quiet) as update:
            click.echo(transmla.fold(model, out, progress=update, **given))
