"""From a name to a folder; the hub is never asked here."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from transmla.checkpoint import resolve as module
from transmla.checkpoint.resolve import ResolvedSource, resolve
from transmla.errors import SourceError
from transmla.recipe import find_recipe, load_recipe


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    def fail(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(module, "list_recipes", lambda: ["smollm2-135m", "llama-3.2-1b"])
    monkeypatch.chdir(tmp_path)


def test_existing_paths_come_first(tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "m.gguf").touch()
    (tmp_path / "stories260k").mkdir()
    for name in ("owner/name", "m.gguf", "stories260k", str(tmp_path)):
        assert resolve(name) == ResolvedSource(Path(name), name, None)


@pytest.mark.parametrize("name", ["/no/where", "./a", "../a", "~/a", "a/b/c", "here/a", "a/", "m.gguf", "o/m.gguf"])
def test_paths_that_do_not_exist_are_no_hub_ids(tmp_path, name):
    (tmp_path / "here").mkdir()
    with pytest.raises(SourceError, match=r"no such (folder|file)") as error:
        resolve(name)
    assert f"where: {name}" in str(error.value)


def test_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setattr(module.resources, "files", lambda package: tmp_path)
    with pytest.raises(SourceError, match="missing from this installation"):
        resolve("stories260k")
    (tmp_path / "data" / "stories260k").mkdir(parents=True)
    assert resolve("stories260k").path == tmp_path / "data" / "stories260k"


@pytest.mark.parametrize(
    ("name", "near"), [("smollm2", "smollm2-135m"), ("stories", "stories260k"), ("qqq", None), ("", None)]
)
def test_plain_words(name, near):
    with pytest.raises(SourceError, match="or a hub id") as error:
        resolve(name)
    assert "known recipes and models: llama-3.2-1b, smollm2-135m, stories260k" in error.value.remedy
    assert (f"did you mean {near}?" in error.value.remedy) if near else ("did you mean" not in error.value.remedy)


def test_revision_of_a_folder(tmp_path):
    with pytest.raises(SourceError, match="only hub ids have revisions"):
        resolve(str(tmp_path), "main")


@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin"])
def test_hub_id(tmp_path, monkeypatch, stored):
    asked = []
    template = "additional_chat_templates/tools.jinja"
    # an adapter beside the model is no reason to go without its weights
    others = ("adapter_model.safetensors", template)
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)

    def download(name, *, revision, allow_patterns, ignore_patterns):
        from fnmatch import fnmatch

        asked.append((name, revision))
        for file in ("model.safetensors", "pytorch_model.bin", "x.py", "original/model.safetensors", *others):
            wanted = any(fnmatch(file, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(file, pattern) for pattern in ignore_patterns) and file in (stored, *others):
                (snapshot / file).parent.mkdir(exist_ok=True)
                (snapshot / file).touch()
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", "main") == ResolvedSource(snapshot, "owner/name", "0123abc")
    found = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    assert found == {stored, *others}
    assert asked == [("owner/name", "main")] * (2 if stored == "model.safetensors" else 3)


def _of_the_hub(kind: type[Exception]) -> Exception:
    # made without the response of a server that its constructor wants
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (lambda: _of_the_hub(hub.GatedRepoError), "restricted"),
        (lambda: _of_the_hub(hub.RepositoryNotFoundError), "no such model on the hub"),
        (lambda: _of_the_hub(hub.RevisionNotFoundError), "no revision 'v9'"),
        (lambda: hub.LocalEntryNotFoundError("x"), "hub cannot be reached"),
        (lambda: hub.OfflineModeIsEnabled("x"), "hub cannot be reached"),
        (lambda: hub.HFValidationError("x"), "not a hub id"),
        (lambda: OSError("disk\nfull"), "download failed: disk\n"),
        (lambda: RuntimeError(), "download failed: RuntimeError"),
    ],
)
def test_hub_errors(monkeypatch, error, why):
    def fail(*args, **options):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError, match=why) as caught:
        resolve("someone/smollm2-135m-instruct", "v9")
    assert "where: someone/smollm2-135m-instruct" in str(caught.value)
    assert "did you mean smollm2-135m?" in caught.value.remedy


def test_a_recipe_is_not_advised_instead_of_itself(monkeypatch):
    def fail(*args, **options):
        raise hub.OfflineModeIsEnabled("x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    source = load_recipe(find_recipe("llama-3.2-1b")).source
    for name, advised in ((source, False), (source + "-Instruct", True)):
        with pytest.raises(SourceError) as caught:
            resolve(name)
        assert "connect" in caught.value.remedy and ("did you mean llama-3.2-1b" in caught.value.remedy) is advised
