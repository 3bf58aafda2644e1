"""The summary that `transmla heal` ends with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transmla.tables import columns, is_narrow

if TYPE_CHECKING:
    from transmla.healing.flow import HealReport


def show_healing(report: HealReport, console: Console) -> None:
    console.print(_narrow(report) if is_narrow(console) else _wide(report))
    console.print(
        "[dim]divergence: nats per token; recovery: perplexity of the source over the model's, ± one standard error[/]",
        highlight=False,
    )
    best = "" if report.best_step == report.steps else f" of {report.steps:,}; later ones were worse"
    facts = columns("", " ")
    if report.raised:
        states = ", ".join(f"{count} raised {text}" for text, count in report.raised.items())
        facts.add_row("states that were passed over", f"{escape(states)} by more than the error")
    facts.add_row("trained on", f"{report.tokens:,} tokens, {report.best_step:,} steps{best}")
    if report.distinct < report.tokens:
        facts.add_row("distinct tokens", f"{report.distinct:,}")
    repeated = [f"{text} {count} times" for text, count in report.passes.items() if count > 1]
    if repeated:
        facts.add_row("texts that were repeated", escape(", ".join(repeated)))
    facts.add_row("trained", f"{report.num_trained:,} parameters, steps of at most {report.rate:g} of their size")
    if report.latent_bits is not None:
        facts.add_row("latents", f"rounded as in a cache latent-int{report.latent_bits}, here and in training")
    facts.add_row("time", f"{report.seconds:,.0f} s")
    if report.tokens_per_second:
        floor = f"{report.of_floor:.1f} times what its matrix products take"
        facts.add_row("steps", f"{report.tokens_per_second:,.0f} tokens/s, {floor}")
    facts.add_row("written", escape(str(report.destination)))
    console.print(facts)


def _wide(report: HealReport) -> Table:
    table = columns("held out", "divergence", "", "perplexity", "", "source", "recovery", "")
    for text in report.texts:
        before, after = report.before[text], report.after[text]
        table.add_row(
            escape(text),
            f"{before['divergence']:.4f}", f"-> {after['divergence']:.4f}",
            f"{math.exp(before['nats']):.3f}", f"-> {math.exp(after['nats']):.3f}",
            f"{math.exp(after['source_nats']):.3f}",
            f"{before['recovery']:.1%}", f"-> {after['recovery']:.1%} ± {after['recovery_error']:.1%}",
        )  # fmt: skip
    return table


def _narrow(report: HealReport) -> Table:
    """A text, and what became of it in the line below."""
    table = columns("held out", "before", "after", "source")
    for text in report.texts:
        before, after = report.before[text], report.after[text]
        table.add_row(escape(text), "", "", "")
        table.add_row("  divergence", f"{before['divergence']:.4f}", f"{after['divergence']:.4f}", "")
        source = f"{math.exp(after['source_nats']):.3f}"
        table.add_row("  perplexity", f"{math.exp(before['nats']):.3f}", f"{math.exp(after['nats']):.3f}", source)
        error = f" ± {after['recovery_error']:.1%}"
        table.add_row("  recovery", f"{before['recovery']:.1%}", f"{after['recovery']:.1%}{error}", "")
    return table
