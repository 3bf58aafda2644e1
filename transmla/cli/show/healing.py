"""The summary that `transmla heal` ends with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console

from transmla.cli.show.tables import columns

if TYPE_CHECKING:
    from transmla.healing.flow import HealReport


def show_healing(report: HealReport, console: Console) -> None:
    table = columns("held out", "divergence", "", "perplexity", "", "source", "recovery", "")
    for text in report.texts:
        before, after = report.before[text], report.after[text]
        table.add_row(
            text,
            f"{before['divergence']:.4f}", f"-> {after['divergence']:.4f}",
            f"{math.exp(before['nats']):.3f}", f"-> {math.exp(after['nats']):.3f}",
            f"{math.exp(after['source_nats']):.3f}",
            f"{before['recovery']:.1%}", f"-> {after['recovery']:.1%} ± {after['recovery_error']:.1%}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "[dim]divergence: nats per token; recovery: perplexity of the source over the model's, ± one standard error[/]",
        highlight=False,
    )
    best = "" if report.best_step == report.steps else f" of {report.steps:,}; later ones were worse"
    facts = columns("", " ")
    facts.add_row("trained on", f"{report.tokens:,} tokens, {report.best_step:,} steps{best}")
    if report.distinct < report.tokens:
        facts.add_row("distinct tokens", f"{report.distinct:,}")
    repeated = [f"{text} {count} times" for text, count in report.passes.items() if count > 1]
    if repeated:
        facts.add_row("texts that were repeated", ", ".join(repeated))
    facts.add_row("trained", f"{report.num_trained:,} parameters, steps of at most {report.rate:g} of their size")
    facts.add_row("time", f"{report.seconds:,.0f} s")
    facts.add_row("written", f"{report.destination}")
    console.print(facts)
