"""Nothing that is written names a folder of this machine, its user or a token."""

import getpass
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import transmla
from tests.families import MakeSource
from transmla.checkpoint.provenance import portable
from transmla.errors import DestinationError

TOKEN = "hf_" + "q" * 34


def written(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()


def leaks(folder: Path, secrets: list[str]) -> list[str]:
    return [
        f"{path.name}: {secret}"
        for path, content in written(folder)
        for secret in secrets
        if secret.encode() in content
    ]


@pytest.fixture(params=["llama", "qwen3"])
def source(request: pytest.FixtureRequest, lively: MakeSource, tmp_path: Path) -> Path:
    """As somebody else has saved it: with their paths in the config."""
    folder = Path(shutil.copytree(lively(model_type=request.param), tmp_path / "inputs" / "jane.doe" / "model"))
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"_name_or_path": str(folder), "name_or_path": str(folder)}))
    return folder


def test_nothing_written_names_this_machine(
    source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = tmp_path / "written"
    out.mkdir()
    text = Path(shutil.copy(text_file, source.parent / "private.txt"))
    mix = f"{text}:3+wikitext"
    transmla.convert(
        str(source), out / "mla", latent=12, rope=4, refine="off", calibration=mix, tokens=256, window=32, theta=100.0
    )
    report = transmla.evaluate(
        out / "mla", source, text=[str(text)], windows=2, length=32, dtype="float32", kept=out / "kept.json"
    )
    (out / "eval.json").write_text(json.dumps(report.plain()))
    transmla.report([out / "eval.json"], out / "page.html")
    settings: dict[str, Any] = {
        "tokens": 3072, "window": 64, "batch": 2, "heldout": 2, "evaluations": 2, "rate": 2e-2, "precision": "float32",
    }  # fmt: skip
    transmla.heal(out / "mla", out / "healed", source=str(source), data=str(text), watch="wikitext-valid", **settings)
    if source_is_stock(out / "mla"):
        transmla.export(out / "mla", out / "mla.gguf", type="f16")
        transmla.export(out / "healed", out / "padded", to="vllm", size="256+64")
        transmla.unfold(out / "healed", out / "train")
        transmla.fold(out / "train", out / "folded", text=str(text))
    secrets = [str(tmp_path), "jane.doe", TOKEN, os.path.expanduser("~") + "/", f"/{getpass.getuser()}/"]
    # what came along from the source's author is that author's
    (source / "tokenizer_config.json").unlink()
    found = [leak for leak in leaks(out, secrets) if not leak.startswith("tokenizer_config.json")]
    assert not found and len(list(written(out))) > 20


def source_is_stock(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["model_type"] == "deepseek_v3"


def test_what_an_interrupted_run_leaves_neither(lively: MakeSource, text_file: Path, tmp_path: Path) -> None:
    def interrupt(at: str, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transmla.convert(
            str(lively()), tmp_path / "out", latent=12, rope=4, refine="off", calibration=str(text_file), tokens=256,
            window=32, theta=100.0, progress=interrupt,
        )  # fmt: skip
    left = tmp_path / "out.partial"
    assert (left / "journal" / "settings.json").is_file()
    assert not leaks(left, [str(tmp_path), str(lively().parent), str(text_file.parent)])


def test_paths_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    values = {
        "a": "/home/jane/models/x", "/data/t.txt": [1, "/data/t.txt:3+wikitext+/home/jane/u.txt"], "b": "owner/name",
        "c": "../x", "d": None, "e": "a\n/b/c", "f": "/home/janet/x",
    }  # fmt: skip
    assert portable(values) == {
        "a": "~/models/x", "t.txt": [1, "t.txt:3+wikitext+~/u.txt"], "b": "owner/name", "c": "../x", "d": None,
        "e": "a\n/b/c", "f": "x",
    }  # fmt: skip


def test_what_a_model_wrote_is_no_path() -> None:
    values = {"generation": {"texts": ["/usr and more", "1 +/ 2"]}, "model": "/data/m"}
    assert portable(values, keep=("generation",)) == values | {"model": "m"}


def test_a_message_may_name_a_folder(tmp_path: Path) -> None:
    """It is read by the one whose folder it is."""
    with pytest.raises(DestinationError) as caught:
        transmla.convert("stories260k", tmp_path / "a" / "b")
    assert str(tmp_path) in str(caught.value)
