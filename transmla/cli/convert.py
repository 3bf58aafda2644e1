"""transmla convert."""

from __future__ import annotations

import sys
from typing import Any

import click

from transmla.cli.frame import (
    NumberRange,
    as_json,
    command,
    device,
    emit,
    errors,
    is_first_process,
    number,
    option,
    quiet,
    quiet_libraries,
    rounding_options,
)
from transmla.recipe import BEGIN, CALIBRATION, DTYPES, FORMATS, REFINE_LEVELS, TOKENS


def geometry_options(decorated: Any) -> Any:
    for decorate in (
        option(
            "--recipe",
            metavar="R",
            help="Name of an installed recipe, or a TOML file.",
            group="Size of the cache",
        ),
        option(
            "--total",
            type=click.IntRange(min=1),
            metavar="N",
            help="kv_lora_rank + qk_rope_head_dim, where --latent, --rope or both are not given.",
            group="Size of the cache",
        ),
        option(
            "--rope",
            metavar="DIM",
            help="qk_rope_head_dim: cached rotary values per token and layer, an even number; auto: the division of "
            "--total with the smallest measured error. [default: depends on SRC; `plan` shows it]",
            group="Size of the cache",
        ),
        option(
            "--q-latent",
            type=int,
            metavar="RANK",
            help="q_lora_rank: rank of a latent for the queries, as in DeepSeek-V3. [default: no such latent]",
            group="Size of the cache",
        ),
        option(
            "--budget",
            metavar="X%",
            help="With --latent auto: the largest increase of perplexity on held-out calibration text, as 2% or 0.02.",
            group="Size of the cache",
        ),
        option(
            "--latent",
            metavar="RANK",
            help="kv_lora_rank: cached latent values per token and layer; auto: the smallest within --budget. "
            "[default: the largest engine-friendly size that saves at least half of the cache]",
            group="Size of the cache",
        ),
    ):
        decorated = decorate(decorated)
    return decorated


def form_options(decorated: Any) -> Any:
    for decorate in (
        option(
            "--lossy",
            is_flag=True,
            default=None,
            help="A deepseek_v3 folder without biases, for engines that have none (llama.cpp, SGLang, vLLM's own "
            "class): what those of SRC add is read from the input, approximately.",
            group="Result",
        ),
        option(
            "--format",
            type=click.Choice(FORMATS),
            help="deepseek_v3: for stock engines; transmla: the class of SRC with latent attention, for transformers "
            "and, where transmla is installed, vLLM; auto: deepseek_v3 where it can express SRC exactly. "
            "[default: auto]",
            group="Result",
        ),
    ):
        decorated = decorate(decorated)
    return decorated


@command(
    "convert",
    "transmla convert stories260k",
    "transmla convert llama-3-8b OUT --device cuda --dry-run",
    "transmla convert SRC OUT --latent 512 --refine full",
    "transmla convert SRC OUT --calibration wikitext+mine.jsonl:2",
    "transmla convert SRC OUT --latent auto --budget 2%",
)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="[DST]", required=False)
@geometry_options
@option(
    "--calibration",
    metavar="TEXT",
    help="Calibration text: FILE (.txt; .jsonl, .parquet, .csv with a `text` column), dataset id "
    "OWNER/NAME[:CONFIG][@SPLIT], wikitext, synthetic, continued, code, maths, stories (they ship with the program) "
    f"or self (sampled from SRC); A:3+B mixes three to one. [default: {CALIBRATION['fast']}, with --refine full "
    f"{CALIBRATION['full']}]",
    group="Calibration text",
)
@option(
    "--refine",
    type=click.Choice(REFINE_LEVELS),
    help="Gradient refinement on the calibration text after the closed form; full takes eight times the steps of "
    "fast, on "
    "three times the text. [default: fast]",
    group="Fit",
)
@option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Windows per step of the refinement. Processes share them, so at most N processes are busy. [default: 1]",
    group="Fit",
)
@rounding_options("Fit")
@option(
    "--tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Total calibration tokens, at least two windows of each text. "
    f"[default: with --refine off {TOKENS['off']}, fast {TOKENS['fast']}, full {TOKENS['full']}]",
    group="Calibration text",
)
@option(
    "--sampled",
    type=click.IntRange(min=0),
    metavar="N",
    help="Additional tokens that SRC itself writes, as continuations of the text; SRC must fit into memory. "
    "[default: 0]",
    group="Calibration text",
)
@option(
    "--window",
    type=click.IntRange(min=8),
    metavar="N",
    help="Tokens per calibration window. [default: 1024]",
    group="Calibration text",
)
@option(
    "--begin",
    type=click.Choice(BEGIN),
    help="Calibration windows that start with the begin token, where the tokenizer of SRC puts one first. "
    "[default: half]",
    group="Calibration text",
)
@option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help="Half of the windows skip positions in their middle, up to N, so that distances beyond the window count "
    "as well; "
    "1: none does. [default: the context of SRC, at most 8192]",
    group="Calibration text",
)
@option(
    "--theta",
    metavar="X",
    help="rope_theta of the result; auto measures a few values on a few layers. [default: auto]",
    group="Fit",
)
@option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the written weights; auto: that of SRC. [default: auto]",
    group="Result",
)
@form_options
@device
@option(
    "--seed",
    type=int,
    help="Seed for the order of windows, their gaps and sampled text. [default: 0]",
    group="Fit",
)
@option(
    "--offload",
    type=NumberRange(min=0),
    metavar="GIB",
    help="Keep calibration activations in a file beside DST if a process needs more than GIB for them. "
    "[default: half of the free memory]",
    group="Machine",
)
@option(
    "--block-layers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Layers that are refined together. [default: all that fit into half of the free memory]",
    group="Fit",
)
@option(
    "--restart",
    is_flag=True,
    help="Delete an unfinished conversion to DST instead of resuming it.",
    group="Result",
)
@option(
    "--dry-run",
    is_flag=True,
    help="Show the plan and check DST, but write nothing.",
    group="Result",
)
@as_json
@quiet
def convert_command(
    source: str,
    destination: str | None,
    dry_run: bool,
    json_file: str | None,
    quiet: bool,
    device: str,
    offload: float | None,
    block_layers: int | None,
    restart: bool,
    **given: Any,
) -> None:
    """Convert SRC and write DST: one folder for transformers and, where deepseek_v3 can express SRC, for other engines.

    SRC is a Hugging Face folder, a .gguf file, a hub id, the name of a recipe, or stories260k.

    DST defaults to NAME-mla-LATENT-ROPE in the working directory and is never overwritten. It appears only when all
    of it is written and the class that it is for computes from it what was converted. A conversion that was
    interrupted or killed keeps its finished layers in DST.partial, and the same command resumes there.
    """
    with errors():
        import transmla

        quiet_libraries(bars=not quiet)
        from rich.console import Console

        from transmla.cli.progress import progress
        from transmla.conversion.show import show_conversion
        from transmla.conversion.show_plan import show_plan

        given["theta"] = number(given["theta"], "--theta")
        sizes(given)
        console = Console()
        if dry_run:
            import torch

            from transmla.conversion.flow import default_destination
            from transmla.devices import named, usable

            planned = transmla.plan(source, **given)
            target = destination or default_destination(planned)
            checked = transmla.plan(source, target, **given)
            usable(named(device), torch.float64)
            emit(checked.summary, json_file, lambda: show_plan(checked, console))
            if json_file != "-":
                console.print(f"would write {target}", highlight=False, markup=False)
            return
        with progress(quiet or not is_first_process()) as update:
            report = transmla.convert(
                source,
                destination,
                device=device,
                progress=update,
                offload=offload,
                block_layers=block_layers,
                restart=restart,
                **given,
            )
        if is_first_process():
            emit(report.summary, json_file, lambda: show_conversion(report, console, _peak_memory()))


def sizes(given: dict[str, Any]) -> dict[str, Any]:
    """--latent, --rope and --budget from words to numbers, in place."""
    for key in ("latent", "rope"):
        size = given[key]
        if size not in (None, "auto"):
            try:
                given[key] = int(size)
            except ValueError:
                raise click.BadParameter(f"{size!r} is neither an integer nor auto", param_hint=f"--{key}") from None
    budget = given["budget"]
    if budget is not None:
        given["budget"] = _share(budget)
    return given


def _share(budget: str) -> float:
    """2% -> 0.02, as 0.02; a plain number that would more than double the perplexity was meant in percent."""
    found = float(number(budget.removesuffix("%"), "--budget", auto=False) or 0)
    if budget.endswith("%"):
        return found / 100
    if found >= 1:
        raise click.BadParameter(
            f"{budget} would be {found:.0%} more perplexity; did you mean {budget}%?", param_hint="--budget"
        )
    return found


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
