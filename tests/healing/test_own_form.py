"""Folders in the form of their source's class: healed, evaluated, diagnosed like any other."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import transmla
from tests.families import MakeSource
from tests.healing.test_flow import IDS, PROGRAM, SETTINGS, SHARDED, SHARDING, curve, launch, logits
from transmla import devices
from transmla.checkpoint.read import read_config
from transmla.errors import UnsupportedError
from transmla.healing import result
from transmla.model.head import head_of
from transmla.targets import own

# the second process is still at the end of the training when the first could have written the folder
LATE = """
import os, time
from transmla.healing import flow
judged = flow._require_gain
def late(*given):
    time.sleep(6 * int(os.environ["RANK"]))
    judged(*given)
flow._require_gain = late
"""
FAMILIES = ("qwen2", "qwen3", "gemma2", "gpt_neox")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, lively: MakeSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A source and its conversion."""
    sizes = {"kv_heads": 6, "head_dim": 8} if request.param == "gpt_neox" else {"head_dim": 8}
    source = lively(model_type=request.param, **sizes)
    folder = tmp_path_factory.mktemp("own") / "mla"
    transmla.convert(
        str(source), folder, latent=8, rope=4, refine="off", calibration=str(text_file), tokens=1024, window=64,
        format="transmla",
    )  # fmt: skip
    return source, folder


def test_a_head_gives_the_logits_of_its_model(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            found = head_of(model).logits(model.base_model(IDS).last_hidden_state)
            assert torch.allclose(found, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"train": "all", "hidden": 0.1}, {"lora": 4}], ids=str)
def test_healing(pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    """On what the source writes: whoever comes nearer to it predicts that better as well."""
    source, folder = pair
    report = transmla.heal(
        folder, tmp_path / "out", source=str(source), data="self", **SETTINGS | {"rate": 3e-4} | changes
    )
    (text,) = report.texts
    assert report.after[text]["divergence"] < report.before[text]["divergence"]
    made = transmla.model.loading.load(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("healing")
    )
    assert made.config.kv_lora_rank == 8


def test_one_model_at_a_time_is_in_memory(
    lively: MakeSource, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained one has gone before what was written is loaded to be compared with it."""
    folder, source = tmp_path / "mla", str(lively(model_type="qwen3", layers=1))
    given: dict[str, Any] = {"latent": 8, "rope": 4, "refine": "off", "tokens": 1024, "window": 64}
    transmla.convert(source, folder, calibration=str(text_file), **given)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    left: list[int] = []
    make, free = result._merged, devices.release

    def made(*values: Any) -> Any:
        alive.add(model := make(*values))
        return model

    monkeypatch.setattr(result, "_merged", made)

    def freed(device: str) -> None:
        free(device)
        left.append(len(alive))

    monkeypatch.setattr(own, "release", freed)
    given = SETTINGS | {"tokens": 512, "rate": 3e-4}
    transmla.heal(folder, tmp_path / "out", source=source, data=str(text_file), **given)
    assert left == [0]


def test_two_processes_heal_like_one(lively: MakeSource, text_file: Path, tmp_path: Path, free_port: int) -> None:
    """With everything sharded, the norms on queries and keys, which are vectors, as well."""
    folder, source = tmp_path / "mla", str(lively(model_type="qwen3", layers=2))
    transmla.convert(
        source, folder, latent=8, rope=4, refine="off", calibration=str(text_file),
        tokens=1024, window=64,
    )  # fmt: skip
    options = SETTINGS | {"source": source, "data": "self", "rate": 3e-4}
    transmla.heal(folder, tmp_path / "one", **options)
    launch(LATE + SHARDED + PROGRAM, [str(folder), str(tmp_path / "two"), json.dumps(options)], free_port, **SHARDING)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-3)
    before, one, two = (logits(tmp_path / name) for name in ("mla", "one", "two"))
    assert torch.allclose(two, one, atol=2e-2) and not torch.allclose(one, before, atol=2e-2)


def test_evaluating(pair: tuple[Path, Path], text_file: Path) -> None:
    source, folder = pair
    settings: dict[str, Any] = {"text": str(text_file), "windows": 2, "length": 64, "dtype": "float32"}
    report = transmla.evaluate(folder, source, quantised=(8,), positions=1, **settings)
    assert report.ratio is not None and report.comparison is not None
    assert 0 < report.comparison["texts"][str(text_file)]["ratio"] < 2
    # layers with a window do not grow beyond it
    growing = report.source["cache_bytes_per_token"] / report.model["cache_bytes_per_token"]
    assert growing == report.source["cache_bytes_per_token"] / 48 / (1 if windowed(folder) else 3)
    assert report.model["quantised"][0]["bytes_per_token"] == 3 * (12 + 8)
    timed = transmla.bench(folder, source, contexts=(16,), steps=2, repeats=1, dtype="float32")
    # of 16 tokens a window of 8 holds 7
    held = [7 / 16 if kind == "sliding_attention" else 1 for kind in kinds_of_layers(folder)]
    assert [row.cache_bytes_per_token for row in timed.rows][1] == 12 * 4 * sum(held)


def windowed(folder: Path) -> bool:
    return len(set(kinds_of_layers(folder))) > 1


def kinds_of_layers(folder: Path) -> list[str]:
    return read_config(folder / "config.json")["text_config"].get("layer_types") or ["full_attention"] * 3


def test_generating(pair: tuple[Path, Path]) -> None:
    _, folder = pair
    pieces = transmla.generate(folder, "Once upon a time", max_new_tokens=4, temperature=0)
    assert isinstance("".join(pieces), str)


def test_no_engine_is_promised(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = pair
    found = transmla.doctor(folder)
    assert (found.geometry, found.values_per_token) == ("8+4", 12)
    assert [verdict.engine for verdict in found.engines if verdict.accepts] == ["transformers, own class"]
    for target in ("gguf", "vllm"):
        with pytest.raises(UnsupportedError, match="own class"):
            transmla.export(folder, tmp_path / "out", to=target)
    with pytest.raises(UnsupportedError, match="train it as it is"):
        transmla.unfold(folder, tmp_path / "out")
    card = (folder / "README.md").read_text("utf-8")
    assert "trust_remote_code=True" in card and "stock deepseek_v3" not in card and "1e-6" not in card
