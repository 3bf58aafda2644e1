"""transmla bench."""

from __future__ import annotations

import json
from typing import Any

import click

from transmla.cli.frame import EPILOG, device, errors, integers, option, quiet_libraries, write_file
from transmla.recipe import DTYPES


@click.command("bench", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@option("--against", metavar="SRC", help="The source; the two are timed in turns.")
@option("--context", "contexts", default="512,2048,8192", metavar="A,B", help="Cached tokens per text.")
@option("--batch", "batches", default="1", metavar="A,B", help="Texts at once.")
@option("--steps", type=click.IntRange(min=1), default=16, metavar="N", help="Decoding steps per timing.")
@option("--repeats", type=click.IntRange(min=1), default=3, metavar="N", help="Timings, of which the median is shown.")
@option("--stock", is_flag=True, help="Also time the stock transformers class of MODEL.")
@option("--dtype", type=click.Choice(DTYPES[1:]), default="bfloat16", help="Dtype to compute and to cache in.")
@device
@option("--json", "json_file", metavar="FILE", help="Write the results here, - for stdout instead of the table.")
@option("-q", "--quiet", is_flag=True, help="Show no progress.")
def bench_command(model: str, json_file: str | None, quiet: bool, **given: Any) -> None:
    """Time prefill and decoding of MODEL and SRC in alternating runs, and measure what they cache.

    "x floor" is the time of a decoding step over the time that its bytes and multiply-adds need on this machine.
    """
    with errors():
        import transmla

        quiet_libraries(bars=not quiet)
        from rich.console import Console

        from transmla.cli.progress import progress
        from transmla.cli.show.bench import show_bench

        for name in ("contexts", "batches"):
            given[name] = integers(given[name], f"--{name}")
        with progress(quiet) as update:
            report = transmla.bench(model, progress=update, **given)
        content = json.dumps(report.plain(), indent=1)
        if json_file == "-":
            click.echo(content)
            return
        show_bench(report, Console())
        if json_file is not None:
            write_file(json_file, content + "\n")
