"""The examples run, on the model that ships."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(folder: Path, name: str, *args: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.filterwarnings("ignore")
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads((EXAMPLES / "first_conversion.ipynb").read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "is committed without output"
            exec("".join(cell["source"]), names)
    assert str(names["report"]) and "int8 cache" in str(names["found"])


def test_compare_frontier(folder: Path) -> None:
    printed = run(folder, "compare_frontier.py", "--sizes", "24+8,10+6", "--windows", "2", "--refine", "off")
    assert "mla-24-8, as stored" in printed and "mla-10-6, int4" in printed
    assert (folder / "frontier" / "frontier.png").stat().st_size > 10_000


def test_convert_and_serve(folder: Path) -> None:
    """To the answer where there is an engine, else to the file that it would serve."""
    printed = run(folder, "convert_and_serve.py", "--tokens", "8192", "--out", "served-1.5")
    assert (folder / "served-1.5.gguf").is_file(), "the number is no ending"
    assert "q8_0" in printed
    assert printed.splitlines()[-1].strip()


def test_quantised_cache(folder: Path) -> None:
    """Fewer bytes from cache to cache, and the exact one is what the model computes."""
    printed = run(folder, "quantised_cache.py", "--tokens", "8192", "--new-tokens", "80")
    rows = [line.split() for line in printed.splitlines() if "bytes per token  ..." in line]
    assert [row[0] for row in rows] == ["exact", "int8", "int4", "coded4", "coded3"]
    sizes = [float(row[1]) for row in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 320


def test_heal_with_trl(folder: Path) -> None:
    pytest.importorskip("trl")
    if not (folder / "served-1.5").is_dir():
        run(folder, "convert_and_serve.py", "--tokens", "8192", "--out", "served-1.5")
    run(folder, "heal_with_trl.py", "served-1.5", "healed", "--steps", "2")
    assert json.loads((folder / "healed" / "config.json").read_text("utf-8"))["latent_norm_folded"] is True
