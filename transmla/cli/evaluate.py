"""transmla eval."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from transmla.cli.frame import (
    as_json,
    command,
    device,
    emit,
    errors,
    integers,
    keeps_beside,
    note_emulation,
    number,
    option,
    quiet,
    quiet_libraries,
    source_of,
)
from transmla.errors import GateError
from transmla.recipe import DTYPES


@command(
    "eval",
    "transmla eval OUT",
    "transmla eval OUT --suite standard --json out.json",
    "transmla eval OUT --against SRC --text mine.txt --windows 64",
    "transmla eval OUT --tasks piqa,arc_easy --limit 100 --gate tasks=0.98",
)
@click.argument("model", metavar="MODEL")
@option(
    "--against",
    metavar="SRC",
    help="The source, or any model with the same tokenizer, measured beside it. none: MODEL alone. "
    "[default: as MODEL's provenance file says]",
    group="Compared with",
)
@option(
    "--suite",
    metavar="SUITE",
    help="quick (minutes), standard, full (hours on a CPU), or a TOML file. [default: perplexity and cache bytes]",
    group="What is measured",
)
@option(
    "--text",
    multiple=True,
    metavar="TEXT",
    help="FILE, dataset id, wikitext-valid or tinystories-valid; repeatable. [default: of the suite or the recipe]",
    group="What is measured",
)
@option(
    "--windows",
    type=click.IntRange(min=1),
    metavar="N",
    help="Windows of each text. [default: 16]",
    group="What is measured",
)
@option(
    "--length",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens per window. [default: 1024, or the shorter context]",
    group="What is measured",
)
@option(
    "--begin",
    is_flag=True,
    default=None,
    help="Put the begin token, if the tokenizer adds one, in the place of each window's first token, which is not "
    "scored.",
    group="What is measured",
)
@option(
    "--tasks",
    metavar="A,B",
    help="Tasks of lm-eval, separated by commas.",
    group="Tasks",
)
@option(
    "--include-path",
    metavar="DIR",
    help="Folder of more lm-eval task files.",
    group="Tasks",
)
@option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Documents of each task. [default: all]",
    group="Tasks",
)
@option(
    "--quantised",
    metavar="8,4,2",
    help="Also measure source and model with packed caches of so many bits per value; numbers like 2.5 are for folders "
    "of `transmla quantise` and for --coded-source.",
    group="What is measured",
)
@option(
    "--coded-source",
    is_flag=True,
    default=None,
    help="With --quantised: also measure SRC with a transform coded cache, as KVTC has it, the hardest to beat at few "
    "bits; calibrated on 16,384 tokens, forward and backward.",
    group="What is measured",
)
@option(
    "--positions",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also measure perplexity by position, on N texts as long as the context.",
    group="What is measured",
)
@option(
    "--needles",
    metavar="1024,2048",
    help="Context lengths of RULER's needle test.",
    group="What is measured",
)
@option(
    "--generation",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also let both write up to N tokens behind each of 32 prompts, greedily and sampled: repeated and distinct "
    "runs of tokens, length, end of text, and the share of MODEL's tokens that SRC accepts.",
    group="What is measured",
)
@option(
    "--gate",
    multiple=True,
    metavar="NAME=SHARE",
    help="Smallest recovery of perplexity, tasks, needles or loops (greedy four-token runs that are new) that "
    "passes; below it the exit code is 5. Repeatable; the others are the suite's. [default: of the suite]",
    group="Compared with",
)
@option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="bfloat16",
    help="Dtype to compute and to cache in; auto: as stored.",
    group="Machine",
)
@device
@option(
    "--reuse",
    metavar="FILE",
    help="Earlier result of the same SRC and suite: SRC is not measured again.",
    group="Compared with",
)
@as_json
@quiet
def eval_command(model: str, against: str | None, json_file: str | None, quiet: bool, **given: Any) -> None:
    """Measure MODEL beside SRC: perplexity ± standard error, their paired ratio, cache bytes per token.

    A suite adds agreement, rounded caches, positions, tasks, needles and generated text; an option adds one of them.
    With --json FILE an evaluation that was interrupted resumes from FILE.partial.
    """
    with errors():
        import transmla

        quiet_libraries(bars=False)
        from rich.console import Console

        from transmla.cli.progress import progress
        from transmla.evaluation.show import show_evaluation

        to_file = keeps_beside(json_file)
        if not quiet:
            note_emulation(given["dtype"], given["device"])
        with progress(quiet) as update:
            kept = f"{json_file}.partial" if to_file else None
            report = transmla.evaluate(model, source_of(model, against), progress=update, kept=kept, **_lists(given))
        emit(report.plain, json_file, lambda: show_evaluation(report, Console()))
        if kept is not None:
            Path(kept).unlink(missing_ok=True)  # not before the result is on the disk
        missed = [gate for gate in report.gates if not gate.passed]
        if missed:
            remedy = "use a larger latent, more refinement or healing; or set the gate with --gate"
            if all(math.isnan(gate.found) for gate in missed):
                remedy = "see what was left out, and why; or set the gate with --gate"
            raise GateError(
                f"{len(missed)} of {len(report.gates)} gates missed",
                where=", ".join(gate.name for gate in missed),
                why=", ".join(f"{_recovery(gate.found)}, at least {gate.wanted} is wanted" for gate in missed),
                remedy=remedy,
            )


def _recovery(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.3f}"


def _lists(given: dict[str, Any]) -> dict[str, Any]:
    """Words of eval's options as lists and numbers."""
    given["text"] = list(given["text"]) or None
    if given["limit"] is not None and not (given["tasks"] or given["suite"]):
        why = "without --tasks or --suite there are no documents of tasks to leave out"
        raise click.BadParameter(why, param_hint="--limit")
    given["tasks"] = given["tasks"].split(",") if given["tasks"] else None
    given["needles"] = integers(given["needles"], "--needles") if given["needles"] else None
    if given["quantised"]:
        given["quantised"] = [number(word, "--quantised", auto=False) for word in given["quantised"].split(",")]
    from transmla.evaluation.suite import GATES

    gates = {}
    for gate in given.pop("gate"):
        name, _, share = gate.partition("=")
        if not share:
            why = f"{gate!r} has no share, as in {name or 'perplexity'}=0.95"
            raise click.BadParameter(why, param_hint="--gate")
        if name not in GATES:
            why = f"there is no gate {name!r}; gates are {', '.join(GATES)}"
            raise click.BadParameter(why, param_hint="--gate")
        gates[name] = number(share, "--gate", auto=False)
    return given | {"gates": gates or None}
