"""What Trainer has logged, as plain values and as a picture that lie beside the healed weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transmla.checkpoint.destination import disk_errors
from transmla.evaluation.report.plots import COLOURS, GREY, MARKERS, styled

LOG_FILE, PLOT_FILE = "healing.json", "healing.png"
# of the held-out windows of a text
METRICS = ("divergence", "nats", "source_nats", "recovery", "recovery_error")


def healing_curve(log: list[dict[str, Any]], tokens_per_step: int, texts: list[str]) -> dict[str, Any]:
    """train: loss by step;  heldout: `METRICS` of each text by step. Divergences and nats are per token; a loss is None
    where the model predicted nothing."""
    train = [
        {key: entry[key] for key in ("step", "loss", "grad_norm") if key in entry}
        | {"tokens": entry["step"] * tokens_per_step}
        for entry in log
        if "loss" in entry
    ]
    heldout = [
        {"step": entry["step"], "tokens": entry["step"] * tokens_per_step}
        # of a state that predicts nothing the loss is infinite, for which JSON has no word
        | {"loss": entry["eval_loss"] if math.isfinite(entry["eval_loss"]) else None}
        | {"texts": {text: {key: entry[f"eval_{text}/{key}"] for key in METRICS} for text in texts}}
        for entry in log
        if "eval_loss" in entry
    ]
    return {"train": train, "heldout": heldout}


def write_curve(curve: dict[str, Any], path: Path) -> None:
    """Loss and recovery against tokens, side by side."""
    figure, (left, right) = styled(2, 14.0)
    left.plot(
        [entry["tokens"] for entry in curve["train"]], [entry["loss"] for entry in curve["train"]],
        color=GREY, linewidth=0.8, label="trained on",
    )  # fmt: skip
    tokens = [entry["tokens"] for entry in curve["heldout"]]
    for number, text in enumerate(curve["heldout"][0]["texts"]):
        found = [entry["texts"][text] for entry in curve["heldout"]]
        style = {"color": COLOURS[number % 6], "marker": MARKERS[number % 6], "label": text}
        left.plot(tokens, [one["divergence"] for one in found], **style)
        right.errorbar(
            tokens, [100 * one["recovery"] for one in found],
            yerr=[100 * one["recovery_error"] for one in found], capsize=3, **style,
        )  # fmt: skip
    left.set_ylabel("divergence from the source, nats per token")
    right.set_ylabel("recovery: perplexity of the source over the model's, %")
    for axes in (left, right):
        axes.set_xlabel("tokens trained on")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
    left.set_yscale("log")
    left.legend(frameon=False, labelcolor=GREY)
    with disk_errors(path):
        figure.savefig(path, dpi=150)
