"""transmla bench."""

from __future__ import annotations

from typing import Any

import click

from transmla.cli.frame import (
    Scaled,
    as_json,
    command,
    device,
    emit,
    errors,
    integers,
    note_emulation,
    option,
    quiet,
    quiet_libraries,
    source_of,
)
from transmla.recipe import DTYPES

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@command(
    "bench",
    "transmla bench OUT",
    "transmla bench OUT --against SRC --context 512,4096 --batch 1,8 --stock",
    "transmla bench OUT --context 2048 --cache-budget 2GiB",
)
@click.argument("model", metavar="MODEL")
@option(
    "--against",
    metavar="SRC",
    help="The source; the two are timed in turns. none: MODEL alone. [default: as MODEL's provenance file says]",
    group="Models",
)
@option(
    "--context",
    "contexts",
    default="512,2048,8192",
    metavar="A,B",
    help="Cached tokens per text.",
    group="Timings",
)
@option(
    "--batch",
    "batches",
    default="1",
    metavar="A,B",
    help="Texts at once.",
    group="Timings",
)
@option(
    "--steps",
    type=click.IntRange(min=1),
    default=16,
    metavar="N",
    help="Decoding steps per timing.",
    group="Timings",
)
@option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    metavar="N",
    help="Timings, of which the median is shown.",
    group="Timings",
)
@option(
    "--stock",
    is_flag=True,
    help="Also time the stock transformers class of MODEL.",
    group="Models",
)
@option(
    "--cache",
    "caches",
    multiple=True,
    metavar="KIND",
    help="Also time MODEL with a cache of its own: latent, latent-int4, latent-coded3 ...; repeatable.",
    group="Models",
)
@option(
    "--cache-budget",
    type=Scaled("size", _UNITS, "bytes such as 2GiB, 512MiB or 1.5GB"),
    metavar="SIZE",
    help="Instead of --batch: as many texts as fit into caches of so much memory, as 2GiB, in each cache of MODEL and "
    "SRC; at 4 bits, SRC's texts are counted only.",
    group="Timings",
)
@option(
    "--dtype",
    type=click.Choice(DTYPES[1:]),
    default="bfloat16",
    help="Dtype to compute and to cache in.",
    group="Models",
)
@device
@as_json
@quiet
def bench_command(model: str, against: str | None, json_file: str | None, quiet: bool, **given: Any) -> None:
    """Time prefill and decoding of MODEL and SRC in alternating runs, and measure what they cache.

    "x floor" is the time of a decoding step over the time that its bytes and multiply-adds need on this machine.
    """
    with errors():
        import transmla

        quiet_libraries(bars=not quiet)
        from rich.console import Console

        from transmla.cli.progress import progress
        from transmla.evaluation.show_bench import show_bench

        for name, shown in (("contexts", "--context"), ("batches", "--batch")):
            given[name] = integers(given[name], shown)
        if not quiet:
            note_emulation(given["dtype"], given["device"])
        with progress(quiet) as update:
            report = transmla.bench(model, source_of(model, against), progress=update, **given)
        emit(report.plain, json_file, lambda: show_bench(report, Console()))
