"""Out of the stock form and back: the same function, and only the unfolded form survives an optimizer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import transmla
from tests.families import MakeSource
from transmla.checkpoint.read import open_source
from transmla.cli import main
from transmla.errors import DataError, UnsupportedError, VerificationError
from transmla.model.loading import is_converted
from transmla.targets.fold import open_unfolded

IDS = torch.arange(3, 67)[None]


KINDS: dict[str, tuple[dict[str, Any], int | None]] = {
    "plain queries": ({}, None),
    "latent queries": ({}, 20),
    "biases": ({"model_type": "qwen2"}, None),
    "biases, latent queries": ({"model_type": "qwen2"}, 20),
}


@pytest.fixture(scope="module", params=list(KINDS)[:2])
def converted(
    request: pytest.FixtureRequest, lively: MakeSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("folding") / "mla"
    settings, q_latent = KINDS[request.param]
    transmla.convert(
        str(lively(**settings)), folder, latent=16, rope=8, q_latent=q_latent, refine="off", calibration=str(text_file),
        tokens=1024, window=128, theta=100.0,
    )  # fmt: skip
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def stock(folder: Path, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("converted", KINDS, indirect=True)
def test_there_and_back(converted: Path, text_file: Path, tmp_path: Path) -> None:
    train, again = tmp_path / "train", tmp_path / "again"
    transmla.unfold(converted, train)
    model = transmla.load(train, dtype=torch.float64)
    assert type(model).__name__ == "UnfoldedForCausalLM" and model.config.rms_norm_eps == 1e-5
    assert relative(logits(model), stock(converted)) < 1e-3
    for name, weight in model.named_parameters():
        if name.endswith("q_a_proj.bias"):  # only what is folded has a constant
            assert not weight.any()
            continue
        assert 1e-2 < float(weight.detach().square().mean().sqrt()) < 20, f"{name} has no ordinary size"
    transmla.fold(train, again, text=str(text_file))
    assert relative(stock(again), logits(model)) < 1e-3
    configs = [json.loads((folder / "config.json").read_text()) for folder in (converted, again)]
    assert configs[0] == configs[1]
    assert {path.name for path in again.iterdir()} == {path.name for path in converted.iterdir()}
    assert all(one.outcome == two.outcome for one, two in zip(
        transmla.doctor(converted).engines, transmla.doctor(again).engines, strict=True))  # fmt: skip


@pytest.mark.parametrize("converted", KINDS, indirect=True)
def test_only_the_unfolded_form_survives_an_optimizer(converted: Path, text_file: Path, tmp_path: Path) -> None:
    transmla.unfold(converted, tmp_path / "train")

    def after_a_step(folder: Path) -> tuple[Any, float]:
        model = transmla.load(folder, dtype=torch.float32).train()
        before = logits(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        return model.eval(), relative(logits(model), before)

    _, destroyed = after_a_step(converted)
    model, moved = after_a_step(tmp_path / "train")
    assert moved < 0.02 and destroyed > 0.2
    model.save_pretrained(tmp_path / "trained")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "trained" / name).write_bytes((converted / name).read_bytes())
    # gains of the latent are trained, too, and kept
    with torch.no_grad():
        gains = model.model.layers[0].self_attn.kv_a_layernorm.weight
        assert gains.std() > 0
    transmla.fold(tmp_path / "trained", tmp_path / "folded", text=str(text_file))
    assert relative(stock(tmp_path / "folded").float(), logits(model)) < 1e-3
    # the trainer has not kept where it came from
    assert transmla.verify(tmp_path / "folded").passed and is_converted(tmp_path / "folded")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (converted, tmp_path / "folded")]
    # save_pretrained merges and adds keys, which engines do not read or would misread
    assert configs[1].items() >= configs[0].items() and not configs[1].keys() & {"rope_parameters", "head_dim"}
    transmla.unfold(tmp_path / "folded", tmp_path / "again")
    assert relative(logits(transmla.load(tmp_path / "again", dtype=torch.float32)), logits(model)) < 2e-3


def test_stock_classes_refuse_the_unfolded_form(converted: Path, tmp_path: Path) -> None:
    transmla.unfold(converted, tmp_path / "train")
    # in a process that does not import transmla; in others the Auto classes know the form
    code = """import sys, torch; from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "yes", dtype=torch.float64)
print("transmla" in sys.modules, float(model(torch.arange(3, 67)[None]).logits.square().sum()))"""
    command = [sys.executable, "-c", code, str(tmp_path / "train")]
    refused, remote = (
        subprocess.run([*command, answer], capture_output=True, text=True, check=False) for answer in ("no", "yes")
    )
    assert refused.returncode and "trust_remote_code" in refused.stderr
    energy = float(logits(transmla.load(tmp_path / "train", dtype=torch.float64)).square().sum())
    found = remote.stdout.split()
    assert found[0] == "False" and float(found[1]) == pytest.approx(energy, rel=1e-9)
    known = AutoModelForCausalLM.from_pretrained(tmp_path / "train", dtype=torch.float64)
    assert float(logits(known).square().sum()) == pytest.approx(energy, rel=1e-9)
    with pytest.raises(UnsupportedError, match="not an unfolded model"):
        open_unfolded(converted)
    with pytest.raises(UnsupportedError, match="not a converted folder"):
        transmla.unfold(tmp_path / "train", tmp_path / "other")
    with pytest.raises(UnsupportedError, match=f"transmla fold {tmp_path / 'train'} OUT2"):
        transmla.doctor(tmp_path / "train")


def test_weights_that_the_dtype_cannot_hold(converted: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    model = transmla.load(converted, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 3e4  # times sqrt(10) when unfolded
    model.save_pretrained(large)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (large / name).write_bytes((converted / name).read_bytes())
    with pytest.raises(VerificationError, match="does not fit"):
        transmla.unfold(large, tmp_path / "train", dtype="float16")
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("converted", ["plain queries", "biases"], indirect=True)
def test_the_room_that_the_other_form_takes(
    converted: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr("transmla.targets.fold.check_destination", lambda path, size: needed.append(size))
    train = transmla.unfold(converted, tmp_path / "train", dtype="bfloat16")
    folded = transmla.fold(train, tmp_path / "folded", text=str(text_file), dtype="float32")
    written = [sum(info.num_bytes for info in open_source(one).tensors.values()) for one in (train, folded)]
    assert needed == written and written[1] >= 2 * written[0]


def test_command_line(converted: Path, text_file: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["unfold", str(converted), str(tmp_path / "train"), "-q"])
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "train")
    (tmp_path / "short.txt").write_text("a", encoding="utf-8")
    words = ["fold", str(tmp_path / "train"), str(tmp_path / "folded"), "-q", "--text"]
    done = CliRunner().invoke(main, [*words, str(tmp_path / "short.txt")])
    assert done.exit_code == DataError.exit_code and "too short" in done.output
    words.append(str(text_file))
    done = CliRunner().invoke(main, [*words, "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert relative(stock(tmp_path / "folded"), stock(converted)) < 0.05
    assert CliRunner().invoke(main, words).exit_code == 8
