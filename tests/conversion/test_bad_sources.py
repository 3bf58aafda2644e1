"""Sources that cannot be converted are refused before or during the work, in words, and nothing is left behind."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.made import check
from tests.families import MakeSource
from transmla.conversion import measure as measuring
from transmla.conversion.flow import convert
from transmla.conversion.plan import plan
from transmla.errors import (
    SourceError,
    TransmlaError,
    UnsupportedError,
    VerificationError,
)

Change = Callable[[Path], Any]


def config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        stored = json.loads(path.read_text("utf-8")) | values
        path.write_text(json.dumps({key: value for key, value in stored.items() if value is not ...}), encoding="utf-8")

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """edit changes the named tensors in place"""

    def change(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        edit(stored)
        save_file(stored, folder / "model.safetensors")

    return change


def shards(edit: Callable[[Path, dict[str, Any]], Any]) -> Change:
    """Put the weights into two shards; edit gets the folder and the index before it is written"""

    def change(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(stored)
        files = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: stored[name] for name in names if files[name] == file}, folder / file)
        index = {"metadata": {}, "weight_map": files}
        edit(folder, index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return change


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def as_pickle(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(stored, file)


K_PROJ, UP_PROJ = "model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight"
# name: (what was done to a good folder, error, where, words of the message)
SOURCES: dict[str, tuple[Change, type[TransmlaError], str, tuple[str, ...]]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), SourceError, "", ("model.safetensors",)),
    "no config": (lambda folder: (folder / "config.json").unlink(), SourceError, "config.json", ("config.json",)),
    "unknown family": (
        config(model_type="qwen9"),
        UnsupportedError,
        "config.json",
        ("'qwen9'", "qwen2, qwen3, qwen3_moe"),
    ),
    "encoder-decoder": (
        config(model_type="t5", is_encoder_decoder=True),
        UnsupportedError,
        "config.json",
        ("encoder-decoder", "decoder-only", "qwen2, qwen3, qwen3_moe"),
    ),
    "no rotary positions": (config(model_type="gpt2"), UnsupportedError, "config.json", ("gpt2", "RoPE")),
    "already latent": (
        config(model_type="deepseek_v3", kv_lora_rank=512),
        UnsupportedError,
        "config.json",
        ("already", "nothing to convert"),
    ),
    "unknown rope": (
        config(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}),
        UnsupportedError,
        "config.json",
        ("'proportional'", "length of the text", "llama3"),
    ),
    "incomplete llama3": (
        config(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "high_freq_factor": 4.0}),
        UnsupportedError,
        "config.json",
        ("incomplete", "factor, low_freq_factor"),
    ),
    "rope settings that are none": (
        config(rope_parameters="fast"),
        UnsupportedError,
        "config.json",
        ("of 'fast'", "llama3"),
    ),
    "biases that are not there": (config(attention_bias=True), SourceError, "", ("missing", "q_proj.bias")),
    "quantised": (
        config(quantization_config={"quant_method": "gptq"}),
        UnsupportedError,
        "config.json",
        ("quantised", "gptq"),
    ),
    "impossible heads": (config(num_key_value_heads=4), UnsupportedError, "config.json", ("4 key/value heads",)),
    "incomplete config": (config(vocab_size=...), UnsupportedError, "config.json", ("vocab_size",)),
    "epsilon of zero": (config(rms_norm_eps=0.0), UnsupportedError, "config.json", ("rms_norm_eps",)),
    "missing shard": (
        shards(lambda folder, _: (folder / "model-00002-of-00002.safetensors").unlink()),
        SourceError,
        "model.safetensors.index.json",
        ("model-00002-of-00002.safetensors", "download"),
    ),
    "truncated shard": (
        shards(lambda folder, _: truncate(folder / "model-00002-of-00002.safetensors")),
        SourceError,
        "model-00002-of-00002.safetensors",
        ("truncated", "download"),
    ),
    "index that points outside": (
        shards(lambda _, index: index["weight_map"].update({K_PROJ: "../other.safetensors"})),
        SourceError,
        "model.safetensors.index.json",
        ("outside its folder", K_PROJ),
    ),
    "pickle": (as_pickle, SourceError, "pytorch_model.bin", ("unpickling", "safetensors")),
    "mis-shaped tensor": (
        tensors(lambda stored: stored.update({K_PROJ: torch.zeros(36, 48)})),
        SourceError,
        "",
        (f"{K_PROJ} is [36, 48] instead of [24, 48]", "config"),
    ),
    "missing tensor": (tensors(lambda stored: stored.pop(UP_PROJ)), SourceError, "", (UP_PROJ, "missing", "complete")),
    "missing head": (tensors(lambda stored: stored.pop("lm_head.weight")), SourceError, "", ("lm_head.weight",)),
    "integer weights": (
        tensors(lambda stored: stored.update({K_PROJ: torch.zeros(24, 48, dtype=torch.int8)})),
        SourceError,
        K_PROJ,
        ("dtype",),
    ),
}


@pytest.fixture
def broken(lively: MakeSource, tmp_path: Path) -> Callable[[Change], Path]:
    """A good folder with something done to it."""

    def make(change: Change) -> Path:
        folder = tmp_path / "source"
        shutil.copytree(lively(), folder)
        change(folder)
        return folder

    return make


@pytest.mark.parametrize("name", SOURCES)
def test_sources_that_plan_refuses(broken: Callable[[Change], Path], name: str) -> None:
    change, kind, where, words = SOURCES[name]
    folder = broken(change)
    with pytest.raises(kind) as caught:
        plan(str(folder))
    check(caught.value, str(folder) if where != K_PROJ else K_PROJ, words)
    check(caught.value, where, ())
    assert type(caught.value) is kind and caught.value.exit_code == {SourceError: 3, UnsupportedError: 4}[kind]


def test_the_folder_itself_is_fine(broken: Callable[[Change], Path]) -> None:
    assert plan(str(broken(lambda folder: None))).family.model_type == "llama"


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "smollm"])
def test_sources_that_are_not_there(name: str) -> None:
    with pytest.raises(SourceError) as caught:
        plan(name)
    check(caught.value, name, ("not found", "stories260k"))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        plan(str(tmp_path))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [K_PROJ, UP_PROJ, "lm_head.weight"])
def test_weights_that_are_not_finite(
    broken: Callable[[Change], Path], tmp_path: Path, text_file: Path, name: str, bad: float
) -> None:
    """Headers cannot show it: the conversion stops at that tensor and leaves nothing."""
    folder = broken(tensors(lambda stored: stored[name].view(-1)[7:8].fill_(bad)))
    assert plan(str(folder))
    with pytest.raises(SourceError) as caught:
        convert(str(folder), tmp_path / "out", calibration=str(text_file), tokens=512, window=64)
    check(caught.value, name, ("NaN or infinity", "model.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_no_tokenizer(broken: Callable[[Change], Path], tmp_path: Path) -> None:
    folder = broken(lambda folder: (folder / "tokenizer.json").unlink())
    with pytest.raises(SourceError) as caught:
        convert(str(folder), tmp_path / "out")
    check(caught.value, str(folder), ("tokenizer",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", K_PROJ.replace("k_proj", "o_proj")])
def test_values_too_large_for_the_wanted_dtype(
    broken: Callable[[Change], Path], tmp_path: Path, text_file: Path, name: str
) -> None:
    """Infinity in float16, and in a row that the calibration text never meets: it is named all the same."""
    folder = broken(tensors(lambda stored: stored[name][-1].fill_(1e6)))
    settings: dict[str, Any] = {"calibration": str(text_file), "tokens": 512, "window": 64, "theta": 1e4}
    with pytest.raises(VerificationError, match="does not fit") as caught:
        convert(str(folder), tmp_path / "out", dtype="float16", **settings)
    # an enormous o_proj makes the rest of its block enormous, too
    check(caught.value, name.rpartition(".o_proj")[0] or name, ("bfloat16", "6.55e+04"))
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_while_it_is_converted(
    broken: Callable[[Change], Path], tmp_path: Path, text_file: Path
) -> None:
    """Nobody could tell later what the folder was made from."""
    folder = broken(lambda folder: None)

    def change(at: str, done: int, total: int, _: str) -> None:
        if (at, done) == ("write", total):
            stored = load_file(folder / "model.safetensors")
            save_file(stored, folder / "again", metadata={"format": "pt", "of": "another day"})
            (folder / "again").rename(folder / "model.safetensors")

    settings: dict[str, Any] = {"calibration": str(text_file), "tokens": 128, "window": 64, "theta": 1e4}
    with pytest.raises(SourceError, match="has changed") as caught:
        convert(str(folder), tmp_path / "out", refine="off", progress=change, **settings)
    check(caught.value, str(folder), ("another SHA-256", "--restart"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("whose", [0, 1])
def test_losses_that_are_not_finite(bad: float, whose: int, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5])]
    losses[whose][1] = bad
    monkeypatch.setattr(measuring, "_part", lambda run, streams: None)
    monkeypatch.setattr(measuring, "_ids", lambda text, part: None)
    monkeypatch.setattr(measuring, "next_token_losses", lambda *_: losses)
    no_layers = SimpleNamespace(mla=SimpleNamespace(num_hidden_layers=0))
    ends = SimpleNamespace(ends=lambda _: SimpleNamespace(logits=None))
    run: Any = SimpleNamespace(plan=no_layers, model=ends, compute=None, text=None)
    message = f"the {('source', 'converted')[whose]} model returns NaN or infinity"
    with pytest.raises(VerificationError, match=message) as caught:
        measuring.measure(run, None)  # type: ignore[arg-type]
    assert ("check the source" in caught.value.remedy) == (whose == 0)
