"""The refinement inside a conversion: its steps, its gain, and no gain."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conversion.made import QUICK, Convert
from tests.families import THETA, MakeSource
from transmla.conversion.levels import Descent, Refinement
from transmla.conversion.show import show_conversion
from transmla.text.windows import calibration_tokens, shuffled


def test_windows_of_a_step(lively: MakeSource, run: Convert) -> None:
    """Two of the seven fitted ones, three steps and a half a pass."""
    done = run(lively(), refine="fast", batch=2, theta=THETA)
    assert (done.blocks[0].windows, done.blocks[0].steps) == (7, 4)
    assert json.loads((done.destination / "transmla.json").read_text())["recipe"]["batch"] == 2
    assert run(lively(), "one", refine="fast", theta=THETA).blocks[0].steps == 7


@pytest.mark.parametrize(
    ("descent", "end"),
    [
        (Descent(1.0, 8, 0.0), " 1 steps;"),
        (Descent(6.0, 8, 1e30), " of 6, until the loss or a gradient was not finite;"),
    ],
)
def test_a_refinement_that_is_no_gain_is_said_to_be_none(
    lively: MakeSource, run: Convert, descent: Descent, end: str
) -> None:
    report = run(lively(), theta=THETA, refine="fast", refinement=Refinement(descent))
    written = io.StringIO()
    show_conversion(report, Console(file=written, width=200))
    assert end in written.getvalue() and "discarded, since it is no better" in written.getvalue()
    assert "Closed form, no gradient steps" in (report.destination / "README.md").read_text("utf-8")
    plain = run(lively(), "plain", theta=THETA)
    assert report.heldout.converted == pytest.approx(plain.heldout.converted, abs=1e-9)


@pytest.mark.parametrize("block_layers", [None, 2])
def test_the_distilled_loss_is_that_of_the_written_model(
    lively: MakeSource, run: Convert, text_file: Path, block_layers: int | None
) -> None:
    """KL to the source's predictions on the held-out windows, computed from two loaded models."""
    source = lively()
    report = run(source, refine="fast", refinement=QUICK, latent=12, rope=8, block_layers=block_layers)
    tokenizer = AutoTokenizer.from_pretrained(source)
    made = shuffled(calibration_tokens(str(text_file), tokenizer, 512, 64), 0)
    ids = made.ids_NT[-report.heldout.num_windows :]
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, report.destination)
    ]
    with torch.no_grad():
        target, found = (model(ids).logits.double().log_softmax(-1) for model in models)
    divergence = float((target.exp() * (target - found)).sum(-1).mean())
    assert report.blocks[-1].loss_after == pytest.approx(divergence, rel=0.05)  # the streams may run in bfloat16
    assert report.blocks[-1].loss_after < report.blocks[-1].loss_before
    written = json.loads((report.destination / "transmla.json").read_text())["distilled_blocks"][-1]
    assert 0 < written["training"][-1] < written["training"][0]  # QUICK passes over few windows again and again
    assert [(block.first_layer, block.last_layer) for block in report.blocks] == (
        [(0, 2)] if block_layers is None else [(0, 1), (2, 2)]
    )


def test_refinement_is_worth_it(lively: MakeSource, run: Convert) -> None:
    nats = {}
    for name, refinement in (("off", Refinement(None)), ("on", QUICK)):
        heldout = run(lively(), name, tokens=2048, latent=12, rope=8, refinement=refinement).heldout
        nats[name] = heldout.converted - heldout.source
    assert nats["on"] < 0.8 * nats["off"]
