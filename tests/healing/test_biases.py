"""Healing a deepseek_v3 folder with biases: trained where they belong, folded as before."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import transmla
from tests.conversion.made import weights
from tests.families import MakeSource
from tests.healing.test_flow import SETTINGS
from tests.maths.weights import relative
from transmla.checkpoint.read import read_config


@pytest.fixture(scope="module", params=[None, 20], ids=["plain queries", "latent queries"])
def converted(
    request: pytest.FixtureRequest, lively: MakeSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("biases") / "mla"
    shutil.copytree(lively(model_type="qwen2"), folder.with_name("model"))  # where heal finds it
    transmla.convert(
        str(folder.with_name("model")), folder, latent=8, rope=4, refine="off", calibration=str(text_file),
        tokens=1024, window=64, q_latent=request.param,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("changes", [{}, {"lora": 4}, {"train": "all", "precision": "bfloat16"}], ids=str)
def test_healing(converted: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    report = transmla.heal(converted, tmp_path / "out", data="self", **SETTINGS | {"rate": 3e-4} | changes)
    (text,) = report.texts
    assert report.after[text]["divergence"] < report.before[text]["divergence"]
    assert read_config(converted / "config.json") == read_config(tmp_path / "out" / "config.json")
    before, after = weights(converted), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    prefix = "model.layers.1.self_attn."
    # the constant is one, and the bias of the queries has moved unless only adapters did
    down, constant = (after[f"{prefix}q_a_proj.{kind}"] for kind in ("weight", "bias"))
    assert not down[-1].any() and constant[-1] > 0
    if len(down) == 49:
        assert torch.equal(down[:-1], torch.eye(48) * down[0, 0]) and not constant[:-1].any()
    biases = [tensors[f"{prefix}q_b_proj.weight"][:, -1] for tensors in (after, before)]
    assert (relative(*biases) > 1e-4) == ("lora" not in changes)
