"""transmla export."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from transmla.checkpoint.gguf.types import GGUF_TYPES
from transmla.cli.frame import as_json, command, emit, errors, option, quiet, quiet_libraries


@command("export", "transmla export OUT OUT.gguf --type q8_0", "transmla export OUT PADDED --to vllm")
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@option(
    "--to",
    type=click.Choice(("gguf", "vllm")),
    default="gguf",
    group="Form",
    help="gguf: one file for llama.cpp, OUT.gguf; vllm: a folder, padded with zeros to a size that GPU kernels are "
    "built for.",
)
@option(
    "--type",
    type=click.Choice(GGUF_TYPES),
    metavar="TYPE",
    group="Form",
    help=f"Of the GGUF weights: {', '.join(GGUF_TYPES)}; from q6_k on with llama.cpp's own quantiser, if that is "
    "installed. [default: bf16]",
)
@option(
    "--size",
    metavar="RANK+ROPE",
    group="Form",
    help="With --to vllm: 256+64 or 512+64. [default: the smallest that is large enough]",
)
@as_json
@quiet
def export_command(model: str, out: str, json_file: str | None, quiet: bool, **given: Any) -> None:
    """Write the converted folder MODEL in another form to OUT, which must not exist. MODEL stays as it is.

    transformers and MLX-LM run MODEL itself; `transmla doctor MODEL` says what every engine takes.
    """
    with errors():
        import transmla

        quiet_libraries()
        from rich.console import Console

        from transmla.cli.progress import progress
        from transmla.targets.show_export import show_export

        with progress(quiet) as update:
            report = transmla.export(model, out, progress=update, **given)
        emit(lambda: asdict(report), json_file, lambda: show_export(report, Console()))
