"""Hub ids: what is planned from headers and what the download tells, with a hub that is a folder."""

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import NotASafetensorsRepoError
from safetensors.torch import load_file

import transmla
from tests.checkpoint.test_fp8 import quantised
from tests.families import MakeSource
from transmla.checkpoint import hub_headers
from transmla.errors import SourceError


class Hub:
    """The repository owner/name: files of a folder come into one of the cache, and headers are read where they are."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        cache.mkdir()

    def snapshot_download(self, name: str, *, allow_patterns: list[str], **_: Any) -> str:
        assert name == "owner/name"
        for file in self.remote.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self.cache)
        return str(self.cache)

    def list_repo_files(self, name: str, **_: Any) -> list[str]:
        return [file.name for file in self.remote.iterdir()]

    def headers(self, name: str, revision: str) -> Any:
        assert (name, revision) == ("owner/name", self.cache.name)
        found = {}
        for file in self.remote.glob("*.safetensors"):
            content = file.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            header.pop("__metadata__", None)
            found[file.name] = SimpleNamespace(tensors={key: SimpleNamespace(**one) for key, one in header.items()})
        if not found:
            raise NotASafetensorsRepoError("it has no safetensors")
        return SimpleNamespace(files_metadata=found)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    (tmp_path / "remote").mkdir()
    made = Hub(tmp_path / "remote", tmp_path / "0123abcd")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(hub_headers, "get_safetensors_metadata", made.headers)
    monkeypatch.chdir(tmp_path)
    return made


def convert(text_file: Path, **settings: Any) -> transmla.conversion.flow.ConversionReport:
    sizes: dict[str, Any] = {"latent": 16, "rope": 4, "refine": "off", "tokens": 1024, "window": 128}
    return transmla.convert("owner/name", calibration=str(text_file), **sizes | settings)


def test_a_download_that_was_interrupted_goes_on(lively: MakeSource, text_file: Path, hub: Hub) -> None:
    for file in lively(shards=2).iterdir():
        shutil.copy(file, hub.remote)
    first, second, *_ = sorted(hub.remote.glob("*.safetensors"))
    shutil.copy(first, hub.cache)
    assert transmla.plan("owner/name").mla.kv_lora_rank and not (hub.cache / second.name).exists()
    assert convert(text_file).destination.name == "name-mla-16-4" and (hub.cache / second.name).is_file()


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize(
    ("files", "why", "remedy"),
    [
        (["a-Q4.gguf"], "1 GGUF file: a-Q4.gguf", "hf download owner/name a-Q4.gguf"),
        (["a-Q4.gguf", "b-Q8.gguf"], "2 GGUF files: a-Q4.gguf ...", "hf download owner/name a-Q4.gguf"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter, not a model", "merge"),
    ],
)
def test_repositories_of_other_kinds(
    text_file: Path, hub: Hub, files: list[str], why: str, remedy: str, config: bool
) -> None:
    for name in files + ["config.json"] * config:
        (hub.remote / name).write_text('{"model_type": "llama"}')
    # of what has a config, `plan` asks for the headers of the weights
    for command in [lambda: convert(text_file)] + [lambda: transmla.plan("owner/name")] * (not config):
        with pytest.raises(SourceError) as error:
            command()
        assert why in error.value.why and remedy in str(error.value.remedy) and error.value.where == "owner/name"


@pytest.mark.parametrize("cached", [False, True])
def test_weights_that_are_no_safetensors(lively: MakeSource, text_file: Path, hub: Hub, cached: bool) -> None:
    source = lively()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, hub.remote)
    torch.save(load_file(source / "model.safetensors"), hub.remote / "pytorch_model.bin")
    if cached:
        shutil.copytree(hub.remote, hub.cache, dirs_exist_ok=True)
        assert transmla.plan("owner/name").source.format == "bin"
    else:
        with pytest.raises(SourceError, match="`transmla convert` downloads the weights"):
            transmla.plan("owner/name")
    assert convert(text_file).destination.is_dir()


def test_eight_bit_floats(lively: MakeSource, text_file: Path, hub: Hub) -> None:
    quantised(lively(model_type="qwen3", layers=1), hub.remote / "fp8")
    for file in (hub.remote / "fp8").iterdir():
        shutil.move(file, hub.remote)
    (hub.remote / "fp8").rmdir()
    planned = transmla.plan("owner/name")
    assert planned.resolved.weights_on_hub and planned.dtype == "bfloat16"
    assert convert(text_file).plan.dtype == planned.dtype
