"""Planning for a hub id must not download weights."""

from types import SimpleNamespace
from typing import Any

import pytest

from transmla.checkpoint import hub_headers
from transmla.checkpoint.hub_headers import open_on_hub
from transmla.checkpoint.resolve import ResolvedSource, resolve
from transmla.errors import SourceError


@pytest.fixture
def resolved(tmp_path: Any) -> ResolvedSource:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return ResolvedSource(tmp_path, "owner/name", "abc", weights_on_hub=True)


def _metadata(name: str, revision: str) -> Any:
    assert (name, revision) == ("owner/name", "abc")
    tensors = {"a.weight": SimpleNamespace(shape=[2, 3], dtype="BF16", data_offsets=(0, 12))}
    return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})


def test_shapes_and_dtypes_come_from_the_hub(resolved: ResolvedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_headers, "get_safetensors_metadata", _metadata)
    source = open_on_hub(resolved)
    source.require({"a.weight": (2, 3)})
    assert source.tensors["a.weight"].dtype == "bfloat16"
    assert source.tensors["a.weight"].num_bytes == 12
    with pytest.raises(SourceError, match=r"b\.weight"):
        source.require({"b.weight": (1,)})
    with pytest.raises(ValueError, match="has not been downloaded"):
        source.read("a.weight")


def test_unreachable_headers_are_one_clear_error(resolved: ResolvedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(hub_headers, "get_safetensors_metadata", fail)
    with pytest.raises(SourceError, match=r"owner/name\n.*no route"):
        open_on_hub(resolved)


@pytest.mark.parametrize("cached", [True, False])
def test_weights_are_left_where_they_are(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    (tmp_path / "config.json").touch()
    if cached:
        (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = resolve("owner/name", headers_only=True)
    assert found.weights_on_hub is not cached
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)
