"""The writer: one shard or many give the same checkpoint, and a failure leaves nothing like one."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from transmla.checkpoint import streamed
from transmla.checkpoint import write as write_module
from transmla.checkpoint.read import open_source
from transmla.checkpoint.write import CheckpointWriter
from transmla.errors import DestinationError, VerificationError


def write(destination: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = 2**30) -> None:
    with CheckpointWriter(destination, shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.write_json("config.json", {"model_type": "llama"})
        writer.close_shards()
        writer.commit()


@pytest.mark.parametrize(("shard_bytes", "num_shards"), [(2**30, 1), (20_000, 7), (1, 21)])
def test_shards_hold_the_same_tensors(tmp_path, tensors, shard_bytes, num_shards):
    write(tmp_path / "out", tensors, shard_bytes)
    source = open_source(tmp_path / "out")
    assert set(source.tensors) == set(tensors) and len(source.files()) == num_shards
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), tensor)
    expected = {"config.json"}
    if num_shards == 1:
        expected.add("model.safetensors")
    else:
        expected |= {f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)}
        expected.add("model.safetensors.index.json")
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        sizes = [
            sum(source.tensors[n].num_bytes for n in tensors if source.tensors[n].file == file.name)
            for file in source.files()
        ]
        assert all(size <= max(shard_bytes, max(t.nbytes for t in tensors.values())) for size in sizes)
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_a_file_that_is_written_tensor_by_tensor_is_one_of_safetensors(tmp_path, tensors, shard_bytes, monkeypatch):
    monkeypatch.setattr(write_module, "BUFFER_BYTES", 5_000)
    odd = {"number": torch.tensor(3.5), "none": torch.empty(0, 4), "across": torch.arange(6.0).view(2, 3).T}
    mixed = tensors | odd | {name + ".half": tensor.bfloat16() for name, tensor in tensors.items()}
    write(tmp_path / "out", mixed, shard_bytes)
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert set(found) == set(mixed)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in mixed.items())
    source = open_source(tmp_path / "out")
    assert all(torch.equal(source.read(name), tensor) for name, tensor in mixed.items())


@pytest.mark.parametrize("held", [0, 24])
def test_a_header_without_room_and_values_out_of_line_begin_another_file(tmp_path, monkeypatch, held):
    monkeypatch.setattr(write_module, "BUFFER_BYTES", held)
    monkeypatch.setattr(streamed, "HEADER_BYTES", 300)
    write(tmp_path / "long", {f"{place}{'x' * 100}": torch.ones(4) for place in range(3)})
    assert len(list((tmp_path / "long").glob("*.safetensors"))) == 3
    monkeypatch.setattr(streamed, "HEADER_BYTES", 3000)
    write(tmp_path / "odd", {"half": torch.ones(3, dtype=torch.bfloat16), "whole": torch.ones(3), "b": torch.ones(3)})
    halves, wholes = (open_source(tmp_path / "odd").tensors[name].file for name in ("half", "whole"))
    assert halves != wholes
    assert torch.equal(open_source(tmp_path / "odd").read("b"), torch.ones(3))


def test_of_a_file_that_has_been_begun_nothing_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "BUFFER_BYTES", 1000)
    with CheckpointWriter(tmp_path / "out") as writer:
        for place in range(10):
            writer.add(str(place), torch.full((100,), float(place)))
            assert sum(tensor.nbytes for tensor in writer._pending.values()) <= 1000
        assert not writer._pending
        writer.close_shards()
        writer.commit()
    assert torch.equal(open_source_read(tmp_path / "out", "7"), torch.full((100,), 7.0))


def test_transformers_reads_it(tmp_path, tensors):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=40, tie_word_embeddings=False,
    )  # fmt: skip
    with CheckpointWriter(tmp_path / "out", shard_bytes=20_000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.write_json("config.json", config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
        writer.close_shards()
        writer.commit()
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_the_writer_keeps_copies_and_at_most_one_shard(tmp_path):
    with CheckpointWriter(tmp_path / "out", shard_bytes=1000) as writer:
        matrix = torch.arange(100.0).reshape(10, 10)
        writer.add("a", matrix.T)
        matrix.zero_()
        writer.add("b", torch.ones(100))
        writer.add("c", torch.ones(100))
        assert sum(tensor.nbytes for tensor in writer._pending.values()) <= 1000
        writer.close_shards()
        writer.commit()
    assert torch.equal(open_source_read(tmp_path / "out", "a"), torch.arange(100.0).reshape(10, 10).T)


def open_source_read(path: Path, name: str) -> torch.Tensor:
    (path / "config.json").write_text("{}")
    return open_source(path).read(name)


def test_files_are_as_readable_as_others(tmp_path, tensors):
    write(tmp_path / "out", tensors)
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in [*(tmp_path / "out").iterdir(), tmp_path / "plain"]}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_exception(tmp_path, tensors, error):
    with pytest.raises(error), CheckpointWriter(tmp_path / "out", shard_bytes=1) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close_shards()
        assert writer.partial == tmp_path / "out.partial" and writer.partial.is_dir()
        raise error
    assert not list(tmp_path.iterdir())


def test_a_disk_that_stays_full_hides_neither_the_error_nor_what_is_left(tmp_path, monkeypatch):
    """What could not be written is tried again when the file is closed."""
    close = streamed.StreamedFile.close

    def refuse(file: streamed.StreamedFile, *_: object) -> None:
        close(file)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write_module, "BUFFER_BYTES", 0)
    for name in ("add", "close"):
        monkeypatch.setattr(streamed.StreamedFile, name, refuse)
    with pytest.raises(DestinationError, match="the disk is full"), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(4))
    assert not list(tmp_path.iterdir())


def test_a_value_that_does_not_fit_is_named(tmp_path):
    """Also where a tensor comes in parts."""
    with CheckpointWriter(tmp_path / "out") as writer:
        for add in (writer.add_as, writer.stored):
            with pytest.raises(VerificationError, match=r"its largest value is 7e\+04") as caught:
                add("a", torch.tensor([1.0, 7e4]), torch.float16)
            assert caught.value.where == "a"


def test_nothing_is_left_without_commit(tmp_path, tensors):
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(1))
        writer.close_shards()
    assert not list(tmp_path.iterdir())


def test_wrong_order_is_a_mistake_of_ours(tmp_path):
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(1))
        with pytest.raises(ValueError, match="twice"):
            writer.add("a", torch.ones(1))
        with pytest.raises(ValueError, match="before commit"):
            writer.commit()
        writer.close_shards()
        with pytest.raises(ValueError, match="closed"):
            writer.add("b", torch.ones(1))
        with pytest.raises(ValueError, match="JSON"):
            writer.write_json("x.json", float("nan"))


def test_copy_file(tmp_path):
    (tmp_path / "LICENSE").write_text("free")
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.copy_file(tmp_path / "LICENSE")
        writer.copy_file(tmp_path / "LICENSE", "NOTICE")
        writer.close_shards()
        writer.commit()
    assert (tmp_path / "out" / "LICENSE").read_text() == (tmp_path / "out" / "NOTICE").read_text() == "free"
