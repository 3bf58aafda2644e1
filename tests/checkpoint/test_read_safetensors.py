"""Safetensors folders: what is read is what was written, and nothing damaged is read at all."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from transmla.checkpoint.read import open_source, refuse_quantised
from transmla.errors import SourceError, UnsupportedError

KEYS = "model.layers.0.self_attn.k_proj.weight"
QUERIES = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("num_shards", [1, 10])
def test_reads_what_was_written(folder, tensors, num_shards):
    source = open_source(folder(tensors, num_shards))
    assert source.format == "safetensors" and source.rope_frequency_factors is None
    assert set(source.tensors) == set(tensors)
    assert len(source.files()) == num_shards
    for name, tensor in tensors.items():
        assert source.tensors[name].shape == tensor.shape
        assert source.tensors[name].num_bytes == tensor.numel() * 4
        assert torch.equal(source.read(name), tensor)
    if num_shards > 1:
        assert source.tensors[QUERIES].file != source.tensors[KEYS].file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_reads_every_float_dtype(folder, dtype):
    tensor = torch.randn(3, 5).to(dtype)
    source = open_source(folder({"a": tensor}))
    assert source.tensors["a"].dtype == str(dtype).removeprefix("torch.")
    assert source.read("a").dtype == dtype and torch.equal(source.read("a"), tensor)
    assert torch.equal(source.read("a", dtype=torch.float64), tensor.double())


def test_rows_are_the_rows(folder, tensors):
    index = torch.tensor([39, 0, 7, 7])
    source = open_source(folder(tensors))
    name = "model.embed_tokens.weight"
    assert torch.equal(source.rows(name, index), tensors[name][index])
    assert not torch.equal(source.rows(name, index), tensors[name][index + torch.tensor([0, 1, 0, 0])])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system does not read ahead on request")
@pytest.mark.parametrize("num_shards", [1, 10])
def test_announced_are_the_bytes_of_the_tensors(folder, tensors, num_shards, monkeypatch):
    announced = []

    def advise(handle: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        announced.append(os.pread(handle, length, offset))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    open_source(folder(tensors, num_shards)).announce([KEYS, QUERIES, "nothing.of.that.name"])
    assert sorted(announced) == sorted(tensors[name].numpy().tobytes() for name in (KEYS, QUERIES))


def test_announcing_is_an_advice(folder, tensors, monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError("not on this file system")

    source = open_source(folder(tensors))
    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    source.announce([KEYS])
    monkeypatch.delattr(os, "posix_fadvise")
    source.announce([KEYS])


def test_a_read_tensor_outlives_its_file(folder, tensors):
    path = folder(tensors)
    source = open_source(path)
    read, rows = source.read(KEYS), source.rows(KEYS, torch.tensor([1]))
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-os.path.getsize(path / "model.safetensors") // 2, os.SEEK_END)
        file.write(b"\0" * 4096)
    assert torch.equal(read, tensors[KEYS]) and torch.equal(rows, tensors[KEYS][1:2])


def test_opening_reads_no_tensor(folder, tensors, monkeypatch):
    path = folder(tensors, 3)
    monkeypatch.setattr("transmla.checkpoint.safetensors_file.safe_open", None)
    open_source(path).require({KEYS: (32, 32)})


def test_missing_lm_head_is_left_to_the_caller(folder, tensors):
    del tensors["lm_head.weight"]
    assert "lm_head.weight" not in open_source(folder(tensors)).tensors


def test_truncated_file_names_file_and_tensor(folder, tensors):
    path = folder(tensors, 3)
    shard = sorted(path.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(SourceError, match="truncated") as error:
        open_source(path)
    assert shard.name in str(error.value) and "tensor " in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 60])
def test_file_that_ends_in_its_header(folder, tensors, size):
    path = folder(tensors)
    os.truncate(path / "model.safetensors", size)
    with pytest.raises(SourceError, match=f"truncated: the file ends after {size} bytes") as error:
        open_source(path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff" * 64, "not a safetensors file"),
        (b"version https://git-lfs", "git-lfs pointer"),
        ((8).to_bytes(8, "little") + b"notajson", "header is damaged"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "header is damaged"),
        ((2).to_bytes(8, "little") + b"[]", "header is damaged"),
    ],
)
def test_file_that_is_no_safetensors(folder, tensors, content, why):
    path = folder(tensors)
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=why) as error:
        open_source(path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("entry", [{"shape": [3, 2]}, {"shape": [-2, -2]}, {"data_offsets": [-16, 0]}])
def test_header_that_contradicts_itself(folder, entry):
    path = folder({"a": torch.ones(2, 2)})
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | entry}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(SourceError, match="cannot be a float32 tensor") as error:
        open_source(path)
    assert "tensor a" in str(error.value)


def test_data_beyond_the_header_is_an_error_of_that_tensor(folder):
    path = folder({"a": torch.ones(2, 2)})
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(SourceError, match="tensor a"):
        open_source(path).read("a")


def test_missing_shard(folder, tensors):
    path = folder(tensors, 3)
    sorted(path.glob("*.safetensors"))[2].unlink()
    with pytest.raises(SourceError, match="missing shards") as error:
        open_source(path)
    assert "model-00003-of-00003.safetensors" in str(error.value)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", "", "..\\x"])
def test_index_that_points_outside(folder, tensors, shard):
    path = folder(tensors, 2)
    _edit_index(path, {KEYS: shard})
    with pytest.raises(SourceError, match="outside its folder") as error:
        open_source(path)
    assert KEYS in str(error.value) and "index.json" in str(error.value)


def test_index_that_promises_too_much(folder, tensors):
    path = folder(tensors, 2)
    _edit_index(path, {"model.extra.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(SourceError, match=r"model\.extra\.weight in model-00001-of-00002\.safetensors"):
        open_source(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_index_that_is_none(folder, tensors, content):
    path = folder(tensors, 2)
    (path / "model.safetensors.index.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SourceError, match="is not a shard index"):
        open_source(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_value_that_is_not_finite(folder, tensors, bad, dtype):
    tensors[KEYS] = tensors[KEYS].to(dtype)
    tensors[KEYS][3, 4] = bad
    source = open_source(folder(tensors, 2))
    with pytest.raises(SourceError, match="NaN or infinity") as error:
        source.read(KEYS)
    assert KEYS in str(error.value) and source.tensors[KEYS].file in str(error.value)
    with pytest.raises(SourceError, match="NaN or infinity"):
        source.rows(KEYS, torch.tensor([3]))
    assert source.rows(KEYS, torch.tensor([2])).isfinite().all()
    assert not source.read(KEYS, check_finite=False).isfinite().all()


def test_a_value_that_does_not_fit_the_wanted_dtype(folder):
    source = open_source(folder({"a": torch.tensor([1e6])}))
    assert source.read("a", dtype=torch.bfloat16).isfinite().all()
    with pytest.raises(SourceError, match="range of float16"):
        source.read("a", dtype=torch.float16)


def test_other_dtypes_are_refused_when_wanted(folder):
    path = folder({"a": torch.ones(2), "counter": torch.ones(2, dtype=torch.int64)})
    source = open_source(path)
    assert torch.equal(source.read("a"), torch.ones(2))
    for ask in (lambda: source.read("counter"), lambda: source.require({"counter": (2,)})):
        with pytest.raises(SourceError, match="tensor counter") as error:
            ask()
        assert "i64" in str(error.value)


def test_require_names_what_is_missing_or_misshaped(folder, tensors):
    source = open_source(folder(tensors))
    source.require({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with pytest.raises(SourceError, match=r"x\.0, x\.1, x\.2, x\.3, x\.4 and 3 more"):
        source.require({f"x.{number}": (1,) for number in range(8)})
    with pytest.raises(SourceError) as error:
        source.require({KEYS: (64, 32)})
    assert f"{KEYS} is [32, 32] instead of [64, 32]" in str(error.value)
    with pytest.raises(SourceError, match="absent"):
        source.read("absent")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_quantised_config(folder, tensors, method):
    path = folder(tensors, config={"model_type": "llama", "quantization_config": {"quant_method": method}})
    with pytest.raises(UnsupportedError, match=method) as error:
        refuse_quantised(open_source(path))
    assert "dequantise" in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), ("{", "not JSON"), ("[]", "holds a list")])
def test_config_that_cannot_be_read(folder, tensors, content, why):
    path = folder(tensors)
    (path / "config.json").unlink() if content is None else (path / "config.json").write_text(content)
    with pytest.raises(SourceError, match=why) as error:
        open_source(path)
    assert "config.json" in str(error.value)


def test_folders_and_files_that_are_no_model(tmp_path: Path):
    def refused(path: Path, *words: str) -> None:
        with pytest.raises(SourceError) as error:
            open_source(path)
        assert all(word in str(error.value) for word in words), str(error.value)

    refused(tmp_path / "absent", "no such folder")
    refused(tmp_path, "none of model.safetensors", "config.json")
    (tmp_path / "notes.txt").touch()
    refused(tmp_path / "notes.txt", "not a .gguf file")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "found adapter_model.safetensors")
    (tmp_path / "adapter_config.json").touch()
    refused(tmp_path, "merge the adapter")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    refused(tmp_path, "a model and an adapter", "adapter_config.json", "merge the adapter", "a copy of the folder")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "a.gguf").touch()
    refused(tmp_path, "one GGUF file: a.gguf", "pass the file itself")
    (tmp_path / "b.gguf").touch()
    refused(tmp_path, "a.gguf, b.gguf")


def _edit_index(path: Path, entries: dict[str, str]) -> None:
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= entries
    index.write_text(json.dumps(content))
