"""transmla eval."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from transmla.cli.frame import EPILOG, device, errors, integers, number, option, quiet_libraries, write_file
from transmla.errors import GateError
from transmla.recipe import DTYPES


@click.command("eval", epilog=EPILOG)
@click.argument("model", metavar="MODEL")
@option("--against", metavar="SRC", help="The source, or any model with the same tokenizer, measured beside it.")
@option(
    "--suite",
    metavar="SUITE",
    help="quick (minutes), standard, full (hours on a CPU), or a TOML file. [default: perplexity and cache bytes]",
)
@option(
    "--text",
    multiple=True,
    metavar="TEXT",
    help="FILE, dataset id, wikitext-valid or tinystories-valid; repeatable. [default: of the suite or the recipe]",
)
@option("--windows", type=click.IntRange(min=1), metavar="N", help="Windows of each text. [default: 16]")
@option("--length", type=click.IntRange(min=2), metavar="N", help="Tokens per window. [default: 1024, or the context]")
@option(
    "--begin",
    is_flag=True,
    default=None,
    help="Put the begin token, if the tokenizer adds one, in the place of each window's first token, which is not "
    "scored.",
)
@option("--tasks", metavar="A,B", help="Tasks of lm-eval, separated by commas.")
@option("--include-path", metavar="DIR", help="Folder of more lm-eval task files.")
@option("--limit", type=click.IntRange(min=1), metavar="N", help="Documents of each task. [default: all]")
@option(
    "--quantised", metavar="8,4,2", help="Also measure source and model with caches rounded to these numbers of bits."
)
@option(
    "--positions",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also measure perplexity by position, on N texts as long as the context.",
)
@option("--needles", metavar="1024,2048", help="Context lengths of RULER's needle test.")
@option(
    "--gate",
    multiple=True,
    metavar="NAME=SHARE",
    help="Smallest recovery of perplexity, tasks or needles that passes; below it the exit code is 5. Repeatable. "
    "[default: of the suite]",
)
@option(
    "--dtype", type=click.Choice(DTYPES), default="bfloat16", help="Dtype to compute and to cache in; auto: as stored."
)
@device
@option(
    "--json",
    "json_file",
    metavar="FILE",
    help="Write the results here, - for stdout instead of tables. An interrupted evaluation resumes from FILE.partial.",
)
@option("--reuse", metavar="FILE", help="Earlier result of the same SRC and suite: SRC is not measured again.")
@option("-q", "--quiet", is_flag=True, help="Show no progress.")
def eval_command(model: str, json_file: str | None, quiet: bool, **given: Any) -> None:
    """Measure MODEL beside SRC: perplexity ± standard error, their paired ratio, cache bytes per token.

    A suite adds agreement, rounded caches, positions, tasks and needles; an option adds one of them.
    """
    with errors():
        import transmla

        quiet_libraries(bars=not quiet)
        from rich.console import Console

        from transmla.cli.progress import progress
        from transmla.cli.show.evaluation import show_evaluation

        to_file = json_file not in (None, "-")
        with progress(quiet) as update:
            kept = f"{json_file}.partial" if to_file else None
            report = transmla.evaluate(model, progress=update, kept=kept, **_lists(given))
        content = json.dumps(report.plain(), indent=1, allow_nan=False)
        if json_file == "-":
            click.echo(content)
        else:
            show_evaluation(report, Console())
        if json_file is not None and to_file:
            write_file(json_file, content + "\n")
            Path(f"{json_file}.partial").unlink(missing_ok=True)  # not before the result is on the disk
        missed = [gate for gate in report.gates if not gate.passed]
        if missed:
            raise GateError(
                f"{len(missed)} of {len(report.gates)} gates missed",
                where=", ".join(gate.name for gate in missed),
                why=", ".join(f"{_recovery(gate.found)}, at least {gate.wanted} is wanted" for gate in missed),
                remedy="use a larger latent, more refinement or healing; or set the gate with --gate",
            )


def _recovery(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.3f}"


def _lists(given: dict[str, Any]) -> dict[str, Any]:
    """Words of eval's options as lists and numbers."""
    given["text"] = list(given["text"]) or None
    given["tasks"] = given["tasks"].split(",") if given["tasks"] else None
    for name in ("quantised", "needles"):
        given[name] = integers(given[name], f"--{name}") if given[name] else None
    gates = {}
    for gate in given.pop("gate"):
        name, _, share = gate.partition("=")
        if not share:
            why = f"{gate!r} has no share, as in {name or 'perplexity'}=0.95"
            raise click.BadParameter(why, param_hint="--gate")
        gates[name] = number(share, "--gate", auto=False)
    return given | {"gates": gates or None}
