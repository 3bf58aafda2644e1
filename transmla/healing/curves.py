"""Training curves from the log of transformers' Trainer: a JSON file and a picture beside the healed weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transmla.checkpoint.destination import disk_errors
from transmla.evaluation.report.plots import COLOURS, GREY, MARKERS, styled

LOG_FILE, PLOT_FILE = "healing.json", "healing.png"
# what is measured on the held-out windows of each text
METRICS = ("divergence", "nats", "source_nats", "recovery", "recovery_error")


def healing_curve(log: list[dict[str, Any]], tokens: Callable[[int], int], texts: list[str]) -> dict[str, Any]:
    """The training curve as plain values, for JSON.

    log:             `log_history` of the Trainer
    tokens:          step -> tokens trained on until then
    texts:           names of the texts that held-out windows are taken from

    Returns a dict with two lists in the order of the steps. "train" has `step`, `tokens`, `loss` and, where it was
    logged, `grad_norm`. "heldout" has `step`, `tokens`, the mean `loss` over all held-out windows, and under `texts`
    the `METRICS` of each text. Losses, divergences and nats are per token; a loss is None
    where the model predicted nothing.
    """
    train = [
        {key: entry[key] for key in ("step", "loss", "grad_norm") if key in entry} | {"tokens": tokens(entry["step"])}
        for entry in log
        if math.isfinite(entry.get("loss", math.nan))
    ]
    heldout = [
        {"step": entry["step"], "tokens": tokens(entry["step"])}
        # of a state that predicts nothing the loss is infinite, for which JSON has no word
        | {"loss": entry["eval_loss"] if math.isfinite(entry["eval_loss"]) else None}
        | {"texts": {text: {key: entry[f"eval_{text}/{key}"] for key in METRICS} for text in texts}}
        for entry in log
        if "eval_loss" in entry
    ]
    return {"train": train, "heldout": heldout}


def write_curve(curve: dict[str, Any], path: Path) -> None:
    """Draw a curve of `healing_curve` to `path` (PNG): loss and recovery against tokens, side by side.

    Raises `DestinationError` if the file cannot be written.
    """
    figure, (left, right) = styled(2, 14.0)
    left.plot(
        [entry["tokens"] for entry in curve["train"]], [entry["loss"] for entry in curve["train"]],
        color=GREY, linewidth=0.8, label="training windows",
    )  # fmt: skip
    tokens = [entry["tokens"] for entry in curve["heldout"]]
    for number, text in enumerate(curve["heldout"][0]["texts"]):
        points = [entry["texts"][text] for entry in curve["heldout"]]
        style = {"color": COLOURS[number % 6], "marker": MARKERS[number % 6], "label": text}
        left.plot(tokens, [point["divergence"] for point in points], **style)
        right.errorbar(
            tokens, [100 * point["recovery"] for point in points],
            yerr=[100 * point["recovery_error"] for point in points], capsize=3, **style,
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
