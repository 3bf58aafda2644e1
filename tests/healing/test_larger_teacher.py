"""A larger model with the same tokenizer teaches, the source judges; and layers that learn for themselves."""

import contextlib
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import transmla
from tests.families import MakeSource, lively_config, lively_model
from transmla.errors import UnsupportedError
from transmla.healing.choice import check_teacher
from transmla.healing.student import teach
from transmla.healing.teacher import Judged, OnlineTeacher, resized
from transmla.model.loading import open_model
from transmla.text.packing import IGNORED
from transmla.train.losses import Objective, divergence

IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(24).repeat(2, 1)
BATCH: dict[str, Any] = {
    "input_ids": IDS, "position_ids": POSITIONS, "index": torch.arange(2),
    "labels": torch.cat([IDS[:, 1:], torch.full((2, 1), IGNORED)], dim=1),
}  # fmt: skip


def online(model: Any, **kwargs: Any) -> OnlineTeacher:
    return OnlineTeacher(model, contextlib.nullcontext, **kwargs)


@pytest.mark.parametrize("vocabulary", [448, 512, 576])
def test_vocabularies_that_differ_in_padding(vocabulary: int) -> None:
    """Cut or filled up, the divergence is that of the common tokens."""
    student = lively_model(lively_config(layers=1, vocab=512), seed=1)
    teacher = lively_model(lively_config(layers=2, vocab=vocabulary))
    made = teach(student, online(teacher, vocabulary=512), Objective())
    made.train()
    loss = made(**BATCH | {"input_ids": IDS % 448, "labels": BATCH["labels"].clamp_max(447)})["loss"]
    loss.backward()
    with torch.no_grad():
        wanted, own = (model(IDS % 448, position_ids=POSITIONS).logits.double() for model in (teacher, student))
        least = torch.finfo(torch.float16).min
        wanted = torch.nn.functional.pad(wanted, (0, 512 - vocabulary), value=least)
    expected = divergence(own, wanted)[:, :-1].mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5) and loss > 0.1
    assert all(weight.grad.isfinite().all() for weight in student.parameters() if weight.grad is not None)
    assert resized(torch.zeros(3, 5), 7).shape == (3, 7) and resized(torch.zeros(3, 5), 4).shape == (3, 4)


def test_the_larger_model_teaches_and_the_source_judges() -> None:
    source, larger = lively_model(lively_config(layers=1)), lively_model(lively_config(layers=2), seed=7)
    student = teach(copy.deepcopy(source), Judged(online(larger), online(source)), Objective())
    with torch.no_grad():
        measured = student(**BATCH)
    assert measured["divergence"].abs().max() < 1e-5, "the student is its source"
    loss = student(**BATCH)["loss"]
    with torch.no_grad():
        wanted, own = (model(IDS, position_ids=POSITIONS).logits for model in (larger, source))
    assert float(loss.detach()) == pytest.approx(float(divergence(own, wanted)[:, :-1].mean()), rel=1e-4) and loss > 0.1


def test_layers_learn_for_themselves() -> None:
    """A layer that is off gets the whole gradient, and those behind it are not blamed."""
    source = lively_model(lively_config(layers=3))
    student = teach(copy.deepcopy(source), online(source, streams=True), Objective())
    student.train()
    student.layerwise = True
    assert float(student(**BATCH)["loss"].detach()) < 1e-9
    with torch.no_grad():
        student.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
    loss = student(**BATCH)["loss"]
    loss.backward()
    gradients = [float(layer.self_attn.o_proj.weight.grad.abs().max()) for layer in student.model.layers]
    assert loss > 1e-4 and gradients[1] > 1e-4 and gradients[0] < 1e-6 * gradients[1] > gradients[2]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in student.model.layers)
    with torch.no_grad():
        assert "divergence" in student(**BATCH), "held-out windows are measured as ever"
    student.layerwise = False
    student.zero_grad()
    student(**BATCH)["loss"].backward()
    assert student.model.layers[0].self_attn.o_proj.weight.grad.abs().max() > 1e-3


def test_another_tokenizer_is_refused(lively: MakeSource, tmp_path: Path) -> None:
    source, same = open_model(str(lively())), open_model(str(lively(layers=2, vocab=576)))
    check_teacher(same, source)
    check_teacher(source, same)
    with pytest.raises(UnsupportedError, match="another tokenizer") as caught:
        check_teacher(open_model(str(lively(vocab=448))), source)
    assert "448 tokens" in caught.value.why
    folder = tmp_path / "other"
    shutil.copytree(lively(), folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = sorted(vocabulary, key=lambda word: vocabulary[word])[400:402]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UnsupportedError, match="another tokenizer") as caught:
        check_teacher(open_model(str(folder)), source)
    assert "2 tokens differ" in caught.value.why


def test_healing_with_all_of_it(lively: MakeSource, text_file: Path, tmp_path: Path) -> None:
    """A larger teacher, or layers first; long windows at last; everything is trained, the rest at its own rate."""
    source = lively()
    transmla.convert(
        str(source), tmp_path / "mla", latent=12, rope=4, refine="off", calibration=str(text_file), tokens=1024,
        window=64, theta=100.0,
    )  # fmt: skip
    common: dict[str, Any] = {
        "source": str(source),
        "data": str(text_file), "tokens": 3072, "window": 64, "batch": 2, "heldout": 2, "evaluations": 2, "rate": 2e-2,
        "precision": "float32", "long_share": 0.25, "long_window": 128, "train": "all", "rate_rest": 1e-3,
    }  # fmt: skip
    layered = transmla.heal(tmp_path / "mla", tmp_path / "layered", layerwise=0.25, **common)
    assert layered.after[str(text_file)]["divergence"] < layered.before[str(text_file)]["divergence"]
    # 18 steps of 128 tokens, then 3 of 256, and one more step until an evaluation
    assert layered.steps == 22 and layered.tokens in (11 * 128, 18 * 128 + 4 * 256, 19 * 128 + 3 * 256)
    curves = {}
    for name, teacher in (("itself", None), ("same", source), ("larger", lively(layers=4))):
        taught = transmla.heal(tmp_path / "mla", tmp_path / name, teacher=str(teacher) if teacher else None, **common)
        assert taught.before == layered.before, "the source judges"
        curves[name] = [one["loss"] for one in json.loads((tmp_path / name / "healing.json").read_text())["train"]]
    assert curves["same"] == pytest.approx(curves["itself"], rel=1e-5)
    assert curves["larger"][0] > 1.3 * curves["itself"][0]
