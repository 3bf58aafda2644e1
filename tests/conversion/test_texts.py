"""What is calibrated on: own text, few windows, windows with gaps."""

import json
from importlib import resources
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conversion.made import Convert, digest
from tests.families import THETA, MakeSource


def test_text_that_the_source_writes_joins_the_calibration(lively: MakeSource, run: Convert) -> None:
    source = lively(layers=1)
    report = run(source, "more", sampled=300, theta=100.0)
    assert report.num_calibration_tokens == 512 + 320
    assert report.heldout.num_windows == run(source, "plain", theta=100.0).heldout.num_windows == 1
    provenance = json.loads((report.destination / "transmla.json").read_text())
    assert provenance["calibration"]["text"].endswith("+320 sampled tokens")
    assert provenance["recipe"]["sampled"] == 300


def test_calibration_on_the_model_s_own_text(lively: MakeSource, run: Convert) -> None:
    """The only step with chance in it: the seed decides."""
    digests = [
        digest(run(lively(), f"out{place}", calibration="self", theta=THETA, seed=seed).destination)
        for place, seed in enumerate((3, 3, 4))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_windows_behind_the_begin_token(lively: MakeSource, run: Convert) -> None:
    """Said in the plan, the provenance file and the card; another choice is another text."""
    digests = set()
    for begin, said in (("half", "Half of the calibration"), ("all", "All calibration"), ("none", "")):
        report = run(lively(layers=1), begin, begin=begin, sampled=64, theta=100.0)
        provenance = json.loads((report.destination / "transmla.json").read_text("utf-8"))["calibration"]
        assert provenance["begin"] == {"tokens": [] if begin == "none" else [1], "windows": begin}
        card = (report.destination / "README.md").read_text("utf-8")
        assert said in card and ("puts first (token 1)" in card) == bool(said)
        assert any("begin token" in note for note in report.plan.notes) == (begin != "half")
        digests.add(provenance["sha256"])
    assert len(digests) == 3


def test_two_windows_are_enough(lively: MakeSource, run: Convert) -> None:
    """One to fit to and one held out, also where theta is chosen."""
    report = run(lively(), tokens=128, window=64)
    assert report.heldout.num_windows == 1 and report.num_calibration_tokens == 128
    losses = [loss for found in report.theta_losses.values() for loss in found]
    assert losses and all(0 < loss < 10 for loss in losses)


def test_gaps_teach_distances_beyond_the_window(lively: MakeSource, run: Convert) -> None:
    """Windows of 32 tokens, texts of 256: with gaps, a tenth less is lost behind the window, as much inside."""
    text = (resources.files("transmla.data") / "wikitext2-train-excerpt.txt").read_text("utf-8")[20000:25000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(lively())(text).input_ids[:2048]).view(8, 256)
    with torch.no_grad():
        target = (
            AutoModelForCausalLM.from_pretrained(lively(), dtype=torch.float32)(ids).logits.double().log_softmax(-1)
        )
    lost = {}
    for context in (1, 256):
        given: dict[str, Any] = {"context": context, "tokens": 2048, "window": 32, "theta": 100.0}
        done = run(lively(), f"context-{context}", latent=24, rope=8, **given)
        model = AutoModelForCausalLM.from_pretrained(done.destination, dtype=torch.float32)
        with torch.no_grad():
            found = model(ids).logits.double().log_softmax(-1)
        lost[context] = (target.exp() * (target - found)).sum(-1).mean(0)
    assert lost[256][32:].mean() < 0.95 * lost[1][32:].mean()
    assert lost[256][:32].mean() < 1.06 * lost[1][:32].mean()
