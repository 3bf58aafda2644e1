"""transmla.json says what a checkpoint was made from."""

import hashlib

import pytest
import torch

from transmla.checkpoint import provenance
from transmla.checkpoint.hashes import file_hashes
from transmla.checkpoint.write import CheckpointWriter
from transmla.errors import SourceError


def test_what_is_written_is_read(tmp_path):
    with CheckpointWriter(tmp_path / "out") as writer:
        provenance.write_provenance(writer, versions=provenance.versions(), recipe={"latent": 8})
        writer.close_shards()
        writer.commit()
    content = provenance.read_provenance(tmp_path / "out")
    assert content["format"] == 1 and content["recipe"] == {"latent": 8}
    assert content["versions"]["torch"] == torch.__version__
    assert set(content["versions"]) == {"transmla", "torch", "transformers", "safetensors", "python"}


def test_a_source_checkout_has_no_version(monkeypatch):
    def missing(name):
        raise provenance.metadata.PackageNotFoundError

    monkeypatch.setattr(provenance.metadata, "version", missing)
    assert provenance.versions()["transmla"] == "source"


def test_hashes(tmp_path):
    for name, content in (("a", b"x" * 3_000_000), ("b", b"")):
        (tmp_path / name).write_bytes(content)
    hashes = file_hashes([tmp_path / "a", tmp_path / "b"])
    assert hashes == {
        "a": hashlib.sha256(b"x" * 3_000_000).hexdigest(),
        "b": hashlib.sha256(b"").hexdigest(),
    }


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), ("{", "not JSON"), ('{"format": 2}', "its format is 2"), ("[]", "None")],
)
def test_what_cannot_be_read(tmp_path, content, why):
    if content is not None:
        (tmp_path / "transmla.json").write_text(content)
    with pytest.raises(SourceError, match=why) as error:
        provenance.read_provenance(tmp_path)
    assert "transmla.json" in str(error.value)


def test_a_folder_that_does_not_say_what_it_was_made_from(tmp_path):
    (tmp_path / provenance.FILE_NAME).write_text('{"format": 1, "files": {}}')
    with pytest.raises(SourceError, match=r"was made from[^$]*--source"):
        provenance.named_source(tmp_path)
