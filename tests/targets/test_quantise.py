"""Another basis of the latent: the same function in every class, and caches that lose less."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import transmla
from tests.targets.test_fold import relative
from transmla.checkpoint.destination import lock_partial
from transmla.checkpoint.journal import Journal
from transmla.checkpoint.provenance import read_provenance
from transmla.checkpoint.read import open_source
from transmla.cli import main
from transmla.errors import DestinationError, SourceError, TransmlaError, UnsupportedError
from transmla.targets.own import open_own

IDS = torch.arange(3, 131)[None] * 7 % 500


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantise") / "mla"
    transmla.convert("stories260k", folder, latent=24, rope=8, refine="off", tokens=8192)
    return folder


@pytest.fixture(scope="module")
def prepared(converted: Path) -> Path:
    report = transmla.quantise(converted, converted.with_name("coded"), text="stories", tokens=4096)
    assert report.relative_error < 1e-3 and min(report.spread) > 1.1
    return report.path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def test_on_every_device(converted: Path, tmp_path: Path, device: torch.device) -> None:
    """Prepared there; coded caches are there what they are on the CPU, and hold as many bytes."""
    folder = transmla.quantise(converted, tmp_path / "coded", text="stories", tokens=2048, device=device.type).path
    here, there = (transmla.load(folder, dtype=torch.float32, device=one) for one in ("cpu", device))
    wanted = logits(here)
    for kind, error in (("coded8", 0.05), ("coded3", 0.5)):
        found = []
        for model in (here, there):
            cache = model.latent_cache(kind, sink=2, recent=16)
            parts = [part.to(model.device) for part in (IDS[:, :100], IDS[:, 100:101], IDS[:, 101:])]
            with torch.no_grad():
                found.append(torch.cat([model(part, past_key_values=cache).logits.cpu() for part in parts], dim=1))
        assert relative(found[1], found[0]) < 0.1 * relative(found[0], wanted) + 1e-4
        assert 0 < relative(found[0], wanted) < error


def test_the_function_stays(converted: Path, prepared: Path, tmp_path: Path) -> None:
    wanted = logits(transmla.load(converted, dtype=torch.float32))
    assert relative(logits(AutoModelForCausalLM.from_pretrained(prepared, dtype=torch.float32)), wanted) < 1e-3
    assert relative(logits(transmla.load(prepared, dtype=torch.float32)), wanted) < 1e-3
    spread = transmla.quantise(converted, tmp_path / "spread", text="stories", tokens=2048, basis="spread")
    assert relative(logits(transmla.load(spread.path, dtype=torch.float32)), wanted) < 1e-3
    # what was measured is of these weights: the form for training does not have it, nor what is folded from it
    train = transmla.unfold(prepared, tmp_path / "train")
    assert "latent_code" not in json.loads((train / "config.json").read_text("utf-8"))
    assert "quantised_for" in read_provenance(prepared) and "quantised_for" not in read_provenance(train)
    assert relative(logits(transmla.load(train, dtype=torch.float32)), wanted) < 1e-3
    assert transmla.doctor(prepared).engines == transmla.doctor(converted).engines


@torch.no_grad()
def test_dealt_bits_lose_less_than_equal_ones(converted: Path, prepared: Path) -> None:
    """In divergence from the exact cache, at fewer bytes than groups need."""
    model, plain = (transmla.load(folder, dtype=torch.float32) for folder in (prepared, converted))
    text = transmla.text.sources.read_text("tinystories-valid", 6000, evaluation=True)
    ids = torch.tensor(transmla.model.loading.load_tokenizer(converted)(text).input_ids)[None, :512]
    divergences, sizes = [], []
    for one, kind in ((model, "coded2"), (model, "coded4"), (plain, "int2"), (plain, "exact")):
        cache = one.latent_cache(kind, recent=8)
        found = torch.cat([one(part, past_key_values=cache).logits for part in ids.split(8, dim=1)], dim=1)
        own, wanted = found.log_softmax(-1), plain(ids, use_cache=False).logits.log_softmax(-1)
        divergences.append(float((wanted.exp() * (wanted - own)).sum(-1).mean()))
        sizes.append(cache.bytes_per_token)
    coded2, coded4, int2, exact = divergences
    assert exact < 1e-4 < coded4 < 0.5 * coded2
    assert coded4 < 0.5 * int2 and sizes[1] < sizes[2], (divergences, sizes)


def test_own_form_with_norms(lively: Any, text_file: Path, tmp_path: Path) -> None:
    source = lively(model_type="qwen3")
    folder = tmp_path / "own"
    transmla.convert(
        str(source), folder, latent=16, rope=8, refine="off", calibration=str(text_file), tokens=1024, window=128
    )
    with pytest.raises(UnsupportedError, match="use it as it is"):
        transmla.fold(folder, tmp_path / "folded")
    with pytest.raises(SourceError, match="description cannot be used"):
        open_own(changed(folder, tmp_path / "damaged", kv_lora_rank="16"))
    report = transmla.quantise(folder, tmp_path / "coded", text=str(text_file), tokens=1024)
    before, after = (logits(transmla.load(one, dtype=torch.float32)) for one in (folder, report.path))
    assert relative(after, before) < 1e-3
    assert transmla.load(report.path).latent_cache("coded4").bytes_per_token > 0


def test_of_text_that_the_folder_writes(converted: Path, tmp_path: Path) -> None:
    report = transmla.quantise(converted, tmp_path / "coded", text="stories+self", tokens=2048)
    assert report.tokens == 2048 and report.relative_error < 1e-3


def test_what_cannot_be_prepared(converted: Path, prepared: Path, tmp_path: Path) -> None:
    train = transmla.unfold(converted, tmp_path / "train")
    with pytest.raises(UnsupportedError, match="form for training"):
        transmla.quantise(train, tmp_path / "out")
    with pytest.raises(TransmlaError):
        transmla.quantise("stories260k", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changed(folder: Path, out: Path, **values: Any) -> Path:
    """A copy with other values in config.json; ...: without that key."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text("utf-8")) | values
    kept = {key: value for key, value in config.items() if value is not ...}
    (out / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return out


def test_the_dtype_may_have_its_older_name(converted: Path, tmp_path: Path) -> None:
    older = changed(converted, tmp_path / "older", dtype=...)
    report = transmla.quantise(older, tmp_path / "coded", text="stories", tokens=1024)
    assert report.relative_error < 1e-3
    assert open_source(changed(converted, tmp_path / "none", dtype=..., torch_dtype=...)).dtype == "float32"


def test_what_is_missing_is_said_before_the_model_is_loaded(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transmla.targets.quantise.load", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(DestinationError, match="exists already"):
        transmla.quantise(converted, tmp_path / "taken")
    shutil.copytree(converted, tmp_path / "bare")
    (tmp_path / "bare" / "transmla.json").unlink()
    with pytest.raises(SourceError, match="provenance file cannot be read"):
        transmla.quantise(tmp_path / "bare", tmp_path / "out")


def test_what_convert_or_heal_left_is_not_overwritten(converted: Path, tmp_path: Path) -> None:
    train, out = transmla.unfold(converted, tmp_path / "train"), tmp_path / "out"
    lock_partial(out).close()
    Journal(out, {}).save("step", {"a": torch.ones(1)})
    for refused in (
        lambda: transmla.unfold(converted, out),
        lambda: transmla.fold(train, out),
        lambda: transmla.quantise(converted, out),
        lambda: transmla.export(converted, out),
        lambda: transmla.export(converted, out, to="vllm"),
    ):
        with pytest.raises(DestinationError, match="an unfinished conversion or healing is in the way"):
            refused()
    assert "step" in Journal(out, {})


def test_command_line(converted: Path, prepared: Path, tmp_path: Path) -> None:
    words = ["quantise", str(converted), str(tmp_path / "out"), "--text", "stories", "--tokens", "1024", "-q"]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0 and "relative error" in found.output
    generate = ["generate", str(prepared), "Once upon a time", "--max-new-tokens", "5", "--temperature", "0"]
    texts = [CliRunner().invoke(main, [*generate, *more]) for more in ([], ["--cache", "latent-coded8"])]
    assert texts[0].exit_code == 0 and texts[0].output == texts[1].output
    for words, why in (
        ([*generate, "--cache", "latent-int5"], "no latent cache of kind"),
        ([*generate, "--cache", "static"], "no latent cache of kind 'static'"),
        (["generate", "stories260k", "A", "--cache", "latent-int4"], "only converted models"),
    ):
        refused = CliRunner().invoke(main, words)
        assert refused.exit_code == 4 and why in refused.output
