"""What is done with a converted folder: doctor, export, unfold, fold, generate."""

from __future__ import annotations

import json
from typing import Any

import click

from transmla.cli.frame import EPILOG, device, errors, option, quiet_libraries
from transmla.recipe import DTYPES

# those of checkpoint/write_gguf.py, which must not be imported for --help
GGUF_TYPES = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "iq4_nl", "q3_k_l",
    "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip


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

        from transmla.cli.show.evaluation import show_diagnosis

        show_diagnosis(found, Console())


@click.command("export", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@option(
    "--to",
    type=click.Choice(("gguf", "vllm")),
    default="gguf",
    help="gguf: one file for llama.cpp; vllm: a folder, padded with zeros to a size that GPU kernels are built for.",
)
@option(
    "--type",
    type=click.Choice(GGUF_TYPES),
    help="Of the GGUF weights; from q6_k on with llama.cpp's own quantiser, if that is installed. [default: bf16]",
)
@option(
    "--size",
    metavar="RANK+ROPE",
    help="With --to vllm: 256+64 or 512+64. [default: the smallest that is large enough]",
)
@option("-q", "--quiet", is_flag=True, help="No progress bars.")
def export_command(model: str, out: str, quiet: bool, **given: Any) -> None:
    """Write the converted folder MODEL in another form to OUT, which must not exist. MODEL stays as it is.

    transformers and MLX-LM run MODEL itself; `transmla doctor MODEL` says what every engine takes.
    """
    with errors():
        import transmla

        quiet_libraries()
        from rich.console import Console

        from transmla.cli.show.evaluation import progress, show_export

        with progress(quiet) as update:
            report = transmla.export(model, out, progress=update, **given)
        show_export(report, Console())


@click.command("unfold", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@option("--dtype", type=click.Choice(DTYPES), default="auto", help="Of the written weights; auto: as in MODEL.")
@option("-q", "--quiet", is_flag=True, help="No progress bars.")
def unfold_command(model: str, out: str, dtype: str, quiet: bool) -> None:
    """Write the converted folder MODEL in the form for training: weights of ordinary size, no norm on the latent.

    Any trainer takes it with trust_remote_code=True, or as transmla.load(OUT). `transmla fold` makes the stock form of
    the result. MODEL itself must not be trained: an optimizer step destroys its latent rows, which are about 1e-6.
    """
    with errors():
        import transmla

        quiet_libraries()
        from transmla.cli.show.evaluation import progress

        with progress(quiet) as update:
            click.echo(transmla.unfold(model, out, dtype=dtype, progress=update))


@click.command("fold", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@option("--text", metavar="TEXT", default="wikitext", help="On which the size of the latents is measured.")
@option("--dtype", type=click.Choice(DTYPES), default="auto", help="Of the written weights; auto: as in MODEL.")
@device
@option("-q", "--quiet", is_flag=True, help="No progress bars.")
def fold_command(model: str, out: str, quiet: bool, **given: Any) -> None:
    """Write the unfolded folder MODEL in the stock form again, after training; verified through the stock class."""
    with errors():
        import transmla

        quiet_libraries()
        from transmla.cli.show.evaluation import progress

        with progress(quiet) as update:
            click.echo(transmla.fold(model, out, progress=update, **given))


@click.command("generate", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@click.argument("prompt", metavar="PROMPT")
@option("--max-new-tokens", type=click.IntRange(min=1), default=128, metavar="N", help="Tokens to generate at most.")
@option("--temperature", type=click.FloatRange(min=0), default=0.8, metavar="T", help="0: most likely token.")
@option("--top-p", type=click.FloatRange(min=0, max=1), default=0.95, metavar="P", help="Nucleus to sample from.")
@option("--seed", type=int, default=0, help="Of the sampling.")
@option("--chat", is_flag=True, help="Put PROMPT through the chat template as a user's message.")
@option("--dtype", type=click.Choice(DTYPES), default="auto", help="To compute in; auto: as stored.")
@device
def generate_command(model: str, prompt: str, chat: bool, **given: Any) -> None:
    """Stream a continuation of PROMPT from MODEL, a converted folder or a source."""
    with errors():
        import transmla

        quiet_libraries()
        if not chat:
            click.echo(prompt, nl=False)
        for piece in transmla.generate(model, prompt, chat=chat, **given):
            click.echo(piece, nl=False)
        click.echo()
