"""Padded folders and the doctor, on a converted lively model."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

import transmla
from tests.families import MakeSource
from transmla.checkpoint.provenance import read_provenance
from transmla.checkpoint.read import open_source
from transmla.errors import DestinationError, GeometryError, SourceError, UnsupportedError
from transmla.maths.pad import Widths
from transmla.model.loading import is_converted
from transmla.targets.engines import LLAMA_CPP, MLX, OWN, REFUSES, RUNS, SGLANG, STOCK, VLLM_CPU, VLLM_GPU
from transmla.targets.padding import padded_widths, widths_of

IDS = torch.arange(3, 67)[None]


@pytest.fixture(scope="module")
def converted(lively: MakeSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 16, a rotary key of 8."""
    folder = tmp_path_factory.mktemp("export") / "mla"
    source = lively(head_dim=16, layers=2)
    transmla.convert(str(source), folder, latent=20, rope=8, refine="off", calibration=str(text_file), tokens=1024,
                     window=128, theta=100.0)  # fmt: skip
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(IDS).logits


@pytest.mark.parametrize(("size", "shape"), [(None, "256+64"), ("512+64", "512+64")])
def test_padded_folder_is_the_same_model(converted: Path, tmp_path: Path, size: str | None, shape: str) -> None:
    out = tmp_path / "padded"
    report = transmla.export(converted, out, to="vllm", size=size)
    rank = int(shape.split("+")[0])
    assert (report.format, report.values_per_token) == (shape, (28, rank + 64))
    # against the form without any norm on the latent: more zeros under the root bring the real norm nearer to it
    transmla.unfold(converted, tmp_path / "unfolded")
    with torch.no_grad():
        wanted = transmla.load(tmp_path / "unfolded", dtype=torch.float64)(IDS).logits
        own = transmla.load(out, dtype=torch.float64)(IDS).logits
    before, after = ((logits(folder) - wanted).norm() / wanted.norm() for folder in (converted, out))
    assert after < 1e-4 and after < before / 5
    assert (own - wanted).norm() < 1e-5 * wanted.norm()
    assert read_provenance(out)["padded"]["from"]["rank"] == 20
    assert {path.name for path in out.iterdir()} == {path.name for path in converted.iterdir()}
    outcome = {verdict.engine: verdict.outcome for verdict in transmla.doctor(out).engines}
    assert outcome[VLLM_GPU] == outcome[SGLANG] == RUNS
    assert outcome[VLLM_CPU] == (RUNS if size else REFUSES)


def test_a_padded_folder_padded_again(converted: Path, tmp_path: Path) -> None:
    """As the doctor advises owners of 256 + 64 for vLLM on CPUs."""
    transmla.export(converted, tmp_path / "once", to="vllm")
    transmla.export(tmp_path / "once", tmp_path / "twice", to="vllm", size="512+64")
    assert read_provenance(tmp_path / "twice")["padded"] == {
        "from": asdict(widths_of(open_source(tmp_path / "once").config)),
        "to": asdict(widths_of(open_source(tmp_path / "twice").config)),
    }
    wanted, found = (
        transmla.load(folder, dtype=torch.float64)(IDS).logits for folder in (converted, tmp_path / "twice")
    )
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_what_was_measured_of_other_values_is_not_kept(converted: Path, text_file: Path, tmp_path: Path) -> None:
    transmla.quantise(converted, tmp_path / "coded", text=str(text_file), tokens=1024)
    padded = transmla.export(tmp_path / "coded", tmp_path / "padded", to="vllm")
    config = json.loads((tmp_path / "padded" / "config.json").read_text("utf-8"))
    assert "latent_code" not in config and "quantised_for" not in read_provenance(padded.path)
    assert "latent_code" in json.loads((tmp_path / "coded" / "config.json").read_text("utf-8"))


def test_geometries_without_a_kernel() -> None:
    assert padded_widths(Widths(4, 200, 32, 64, 64)) == Widths(4, 256, 64, 64, 128)
    assert padded_widths(Widths(4, 200, 32, 128, 128)) == Widths(4, 256, 64, 128, 128)
    assert padded_widths(Widths(4, 257, 32, 64, 64)) == Widths(4, 512, 64, 128, 128)
    for impossible in (Widths(4, 513, 64, 128, 128), Widths(4, 96, 24, 64, 64), Widths(4, 96, 32, 192, 128)):
        with pytest.raises(GeometryError, match="no GPU kernel"):
            padded_widths(impossible)
    with pytest.raises(GeometryError, match=r"no GPU kernel is built for 100\+64") as caught:
        padded_widths(Widths(4, 96, 32, 64, 64), "100+64")
    assert caught.value.where == "--size" and "256+64, 512+64" in caught.value.why
    with pytest.raises(GeometryError, match="cannot be padded to 256"):
        padded_widths(Widths(4, 257, 32, 64, 64), "256+64")


def test_doctor_reads_the_folder(converted: Path, tmp_path: Path) -> None:
    found = transmla.doctor(converted)
    assert (found.geometry, found.values_per_token, found.dtype) == ("20+8", 28, "float32")
    assert json.loads(json.dumps(found.summary()))["engines"][0]["outcome"] == RUNS
    damaged = tmp_path / "damaged"
    shutil.copytree(converted, damaged)
    (damaged / "modeling_transmla.py").unlink()
    (damaged / "tokenizer.json").unlink()
    (damaged / "tokenizer_config.json").unlink()
    outcome = {verdict.engine: verdict for verdict in transmla.doctor(damaged).engines}
    assert outcome[OWN].outcome == REFUSES and "transmla.load" in outcome[OWN].findings[0].remedy
    assert outcome[LLAMA_CPP].outcome == REFUSES and "tokenizer" in outcome[LLAMA_CPP].findings[0].why


@pytest.mark.parametrize("to", ["gguf", "vllm"])
def test_biases_have_no_place_in_an_export(lively: MakeSource, text_file: Path, tmp_path: Path, to: str) -> None:
    transmla.convert(str(lively(model_type="qwen2", layers=2)), tmp_path / "mla", latent=16, rope=8, refine="off",
                     calibration=str(text_file), tokens=256, window=64)  # fmt: skip
    with pytest.raises(UnsupportedError, match="biases") as caught:
        transmla.export(tmp_path / "mla", tmp_path / "out", to=to)
    assert "MLX-LM" in caught.value.remedy and not (tmp_path / "out").exists()
    accepting = {verdict.engine for verdict in transmla.doctor(tmp_path / "mla").engines if verdict.accepts}
    assert accepting == {STOCK, OWN, MLX}


def test_a_gguf_file_has_its_ending(converted: Path, tmp_path: Path) -> None:
    """Without it, no other command would take the file."""
    with pytest.raises(DestinationError, match=r"ends in \.gguf") as caught:
        transmla.export(converted, tmp_path / "P2")
    assert "P2.gguf" in caught.value.remedy and "--to vllm" in caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_is_called_as_its_source(converted: Path, tmp_path: Path) -> None:
    """llama.cpp knows by that name that the markers of Phi-3 take the spaces behind them."""

    def name_of(folder: str, source: Any) -> str:
        shutil.copytree(converted, tmp_path / folder)
        path = tmp_path / folder / "transmla.json"
        written = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(written | {"source": {"name": source}}), encoding="utf-8")
        transmla.export(tmp_path / folder, tmp_path / f"{folder}.gguf", type="f32")
        field = GGUFReader(tmp_path / f"{folder}.gguf").get_field("general.name")
        assert field is not None
        return str(field.contents())

    assert name_of("OUT", "microsoft/Phi-3-mini-4k-instruct") == "Phi-3-mini-4k-instruct (OUT)"
    assert name_of("Phi-3-mini-mla", "~/models/phi-3-mini") == "Phi-3-mini-mla"
    assert name_of("unnamed", None) == "unnamed"


def test_the_form_for_training_is_folded_first(converted: Path, tmp_path: Path) -> None:
    trained = transmla.unfold(converted, tmp_path / "T 1")
    for refused in (
        lambda: transmla.export(trained, tmp_path / "out.gguf"),
        lambda: transmla.heal(trained, tmp_path / "out"),
    ):
        with pytest.raises(UnsupportedError, match="form for training") as caught:
            refused()
        assert f"transmla fold '{trained}' OUT2" in caught.value.remedy


def test_what_is_no_converted_folder(converted: Path, lively: MakeSource, tmp_path: Path) -> None:
    assert transmla.doctor(lively()).form == "source", "planned"
    other = tmp_path / "other"
    shutil.copytree(lively(), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UnsupportedError, match="not a converted model"):
        transmla.doctor(other)
    with pytest.raises(UnsupportedError, match="not a converted folder"):
        transmla.export(lively(), tmp_path / "model.gguf")
    damaged = tmp_path / "damaged"
    shutil.copytree(converted, damaged)
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 21}))
    for call in (transmla.doctor, lambda folder: transmla.export(folder, tmp_path / "model.gguf")):
        with pytest.raises(SourceError, match="other shapes"):
            call(damaged)


@pytest.mark.parametrize(
    ("changes", "refusing"),
    [
        ({"rope_parameters": None}, ""),
        ({"kv_lora_rank": "20"}, "doctor gguf unfold"),
        ({"intermediate_size": ...}, "doctor gguf unfold"),
        ({"max_position_embeddings": ...}, "gguf"),
        ({"rope_theta": ...}, "gguf"),
        ({"unfolded_rms_norm_eps": "small"}, "unfold"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_damaged_config_is_a_clear_error(
    converted: Path, tmp_path: Path, changes: dict[str, Any], refusing: str
) -> None:
    """...: without that key."""
    damaged = tmp_path / "damaged"
    shutil.copytree(converted, damaged)
    config = json.loads((damaged / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (damaged / "config.json").write_text(json.dumps(kept))
    calls = {
        "doctor": lambda: transmla.doctor(damaged),
        "gguf": lambda: transmla.export(damaged, tmp_path / "model.gguf"),
        "unfold": lambda: transmla.unfold(damaged, tmp_path / "train"),
    }
    for name, call in calls.items():
        if name in refusing:
            with pytest.raises(SourceError, match="description cannot be used"):
                call()
        else:
            call()


def test_a_damaged_config_of_the_form_for_training(converted: Path, text_file: Path, tmp_path: Path) -> None:
    path = transmla.unfold(converted, tmp_path / "train") / "config.json"
    config = json.loads(path.read_text())
    for key in ("intermediate_size", "max_position_embeddings", "rms_norm_eps"):
        path.write_text(json.dumps({name: value for name, value in config.items() if name != key}))
        with pytest.raises(SourceError, match=f"description cannot be used[^$]*{key}"):
            transmla.fold(tmp_path / "train", tmp_path / "out", text=str(text_file))


def test_a_path_in_the_home_folder(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(converted.parent))
    assert transmla.doctor("~/mla").geometry == "20+8"
    assert is_converted(Path("~/mla")) and "recipe" in read_provenance(Path("~/mla"))
    assert transmla.load("~/mla").config.kv_lora_rank == 20


def test_the_room_that_padding_takes(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = []
    monkeypatch.setattr("transmla.targets.padding.check_destination", lambda path, size: needed.append(size))
    transmla.export(converted, tmp_path / "padded", to="vllm")
    assert needed == [sum(info.num_bytes for info in open_source(tmp_path / "padded").tensors.values())]
