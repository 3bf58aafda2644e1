"""`generate`: what a prompt becomes before the model sees it."""

import shutil
from pathlib import Path

import pytest

import transmla
from transmla.checkpoint.resolve import resolve
from transmla.errors import DataError
from transmla.model.generation import _inputs
from transmla.model.loading import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve("stories260k").path, tmp_path / "model"))


def test_a_chat_is_cut_as_transformers_cuts_it(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}: ")
    tokenizer = load_tokenizer(folder)
    wanted = tokenizer.apply_chat_template([{"role": "user", "content": "Once"}], return_tensors="pt", return_dict=True)
    found = _inputs(tokenizer, "Once", True)
    assert found.keys() == wanted.keys() and all(bool((found[name] == wanted[name]).all()) for name in wanted)


def test_a_template_that_fails(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    with pytest.raises(DataError, match=r"no system message[^$]*leave out --chat"):
        next(transmla.generate(folder, "Once", chat=True))
