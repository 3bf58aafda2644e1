"""transmla unfold and transmla fold: the form for training, and back."""

from __future__ import annotations

from typing import Any

import click

from transmla.cli.frame import EPILOG, device, errors, option, quiet_libraries
from transmla.recipe import DTYPES


@click.command("unfold", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@option("--dtype", type=click.Choice(DTYPES), default="auto", help="Dtype of the written weights; auto: that of MODEL.")
@option("-q", "--quiet", is_flag=True, help="Show no progress.")
def unfold_command(model: str, out: str, dtype: str, quiet: bool) -> None:
    """Write the converted folder MODEL in the form for training: weights of ordinary size, no norm on the latent.

    Any trainer takes it with trust_remote_code=True, or as transmla.load(OUT). `transmla fold` makes the stock form of
    the result. MODEL itself must not be trained: an optimizer step destroys its latent rows, which are about 1e-6.
    """
    with errors():
        import transmla

        quiet_libraries()
        from transmla.cli.progress import progress

        with progress(quiet) as update:
            click.echo(transmla.unfold(model, out, dtype=dtype, progress=update))


@click.command("fold", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@option("--text", metavar="TEXT", default="wikitext", help="On which the size of the latents is measured.")
@option("--dtype", type=click.Choice(DTYPES), default="auto", help="Dtype of the written weights; auto: that of MODEL.")
@device
@option("-q", "--quiet", is_flag=True, help="Show no progress.")
def fold_command(model: str, out: str, quiet: bool, **given: Any) -> None:
    """Write the unfolded folder MODEL in the stock form again, after training; verified through the stock class."""
    with errors():
        import transmla

        quiet_libraries()
        from transmla.cli.progress import progress

        with progress(quiet) as update:
            click.echo(transmla.fold(model, out, progress=update, **given))
