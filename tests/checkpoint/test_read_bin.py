"""pytorch_model.bin: the same tensors as safetensors, and no code is ever unpickled."""

import os
from pathlib import Path

import pytest
import torch

from transmla.checkpoint.read import open_source
from transmla.errors import SourceError

KEYS = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize("num_shards", [1, 3])
def test_reads_the_same_as_safetensors(folder, tensors, num_shards):
    source = open_source(folder(tensors, num_shards, save=torch.save, stem="pytorch_model", suffix="bin"))
    other = open_source(folder(tensors, name="other"))
    assert source.format == "bin" and len(source.files()) == num_shards
    assert {name: (info.shape, info.dtype, info.num_bytes) for name, info in source.tensors.items()} == {
        name: (info.shape, info.dtype, info.num_bytes) for name, info in other.tensors.items()
    }
    for name in tensors:
        assert torch.equal(source.read(name), other.read(name))
    index = torch.tensor([3, 0])
    assert torch.equal(source.rows(KEYS, index), tensors[KEYS][index])


def test_transposed_and_shared_tensors_become_contiguous(folder):
    matrix = torch.randn(4, 6)
    saved = {"a": matrix.T, "b": matrix, "c": matrix[1:3]}
    source = open_source(folder(saved, save=torch.save, stem="pytorch_model", suffix="bin"))
    for name, tensor in saved.items():
        assert torch.equal(source.read(name), tensor) and source.read(name).is_contiguous()
        assert source.read(name).untyped_storage().nbytes() == tensor.numel() * 4


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(folder, tmp_path, zipped):
    def save(value, path):
        with path.open("wb") as file:
            torch.save(value, file, _use_new_zipfile_serialization=zipped)

    path = folder({"a": Trap(tmp_path / "sprung")}, save=save, stem="pytorch_model", suffix="bin")
    with pytest.raises(SourceError, match="unpickling code") as error:
        open_source(path)
    assert "pytorch_model.bin" in str(error.value) and "convert the model to safetensors" in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_legacy_format_is_refused(folder, tensors):
    def save(value, path):
        with path.open("wb") as file:
            torch.save(value, file, _use_new_zipfile_serialization=False)

    with pytest.raises(SourceError, match=r"zip format of torch 1\.6"):
        open_source(folder(tensors, save=save, stem="pytorch_model", suffix="bin"))


@pytest.mark.parametrize(("content", "why"), [([1], "a list"), ({"state_dict": {}}, "tensor state_dict")])
def test_files_of_other_things(folder, content, why):
    with pytest.raises(SourceError, match=why):
        open_source(folder(content, save=torch.save, stem="pytorch_model", suffix="bin"))


def test_truncated_file(folder, tensors):
    path = folder(tensors, save=torch.save, stem="pytorch_model", suffix="bin")
    file = path / "pytorch_model.bin"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(SourceError, match="truncated") as error:
        open_source(path)
    assert "pytorch_model.bin" in str(error.value)


def test_git_lfs_pointer(folder, tensors):
    path = folder(tensors, save=torch.save, stem="pytorch_model", suffix="bin")
    (path / "pytorch_model.bin").write_text("version https://git-lfs\n")
    with pytest.raises(SourceError, match="git lfs pull"):
        open_source(path)


def test_safetensors_come_first(folder, tensors):
    path = folder(tensors)
    (path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert open_source(path).format == "safetensors"
