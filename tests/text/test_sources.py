"""Where text comes from."""

import json
from pathlib import Path

import pytest

from transmla.errors import DataError
from transmla.model.loading import load_tokenizer
from transmla.recipe import find_recipe, load_recipe
from transmla.text.mixes import needs_source
from transmla.text.sources import dataset_of, place_of, read_text, rows
from transmla.text.windows import calibration_tokens


def test_shipped_text() -> None:
    text = read_text("wikitext", 500)
    assert len(text) == 500 and " the " in text


def test_the_stories_of_the_model_that_ships() -> None:
    """What the README's first command calibrates on: read from a file, so the same tokens on every machine; enough of
    them for its recipe; and none of the text that it is measured on."""
    recipe = load_recipe(find_recipe("stories260k"))
    assert recipe.calibration == "stories" and not needs_source(recipe.calibration, recipe.sampled)
    assert recipe.evaluation == "tinystories-valid"
    tokenizer = load_tokenizer("stories260k")
    found = calibration_tokens(recipe.calibration, tokenizer, recipe.num_tokens, recipe.window)
    assert found.ids_NT.shape == (64, 512) and found.name == "stories"
    assert found.digest == "efef7fc577f1e7a29ce44ab0bb0b502a8814482d431e1dbec0c69d0bd74cd4de"
    unknown = tokenizer.unk_token_id
    assert unknown is not None and not (found.ids_NT == unknown).any()
    text, valid = read_text("stories", 10**9), read_text("tinystories-valid", 10**9, evaluation=True)
    assert len(text.encode()) < 2**18
    # the beginnings of such stories are alike, but no sentence and the next one are
    length = 32
    theirs, ours = valid.split(), text.split()
    pieces = {tuple(theirs[place : place + length]) for place in range(len(theirs) - length + 1)}
    assert not any(tuple(ours[place : place + length]) in pieces for place in range(len(ours) - length + 1))


def test_plain_file(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("größer\n" * 10, encoding="utf-8")
    assert read_text(str(tmp_path / "a.md"), 14) == "größer\n" * 2


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_table_by_its_text_column(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    if suffix == ".csv":
        path.write_text("other,text\n1,one\n2,two\n3,three\n", encoding="utf-8")
    else:
        rows = [{"other": number, "text": text} for number, text in enumerate(("one", "two", "three"))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_text(str(path), 100) == "one\n\ntwo\n\nthree"
    if suffix == ".jsonl":  # datasets leaves a CSV file open that is not read to its end
        assert read_text(str(path), 8) == "one\n\ntwo"


@pytest.mark.parametrize("name", ["t?.jsonl", "t[1].jsonl", "data [v2]/t.jsonl"])
def test_a_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    for other in ("t1.jsonl", "tx.jsonl", name):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text(json.dumps({"text": other}) + "\n", encoding="utf-8")
    assert read_text(str(tmp_path / name), 100) == name


def test_a_mark_of_the_encoding_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert read_text(str(tmp_path / "a.txt"), 100) == "one"


@pytest.mark.parametrize("name", ["~nobody-of-transmla/x.txt", "a" * 300, "a/" + "b" * 300 + ".txt"])
def test_names_that_no_path_can_have(name: str) -> None:
    with pytest.raises(DataError, match=r"no text|not found|cannot read"):
        read_text(name, 100)
    assert place_of(name) is None and not needs_source(name, 0)


def test_texts_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"gr\xf6sser")
    (tmp_path / "no_column.jsonl").write_text('{"words": "one"}\n', encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text("{", encoding="utf-8")
    cases = {
        "nothing": "no text 'nothing'",
        str(tmp_path): "no text",
        str(tmp_path / "latin.txt"): "cannot read the text file",
        str(tmp_path / "no_column.jsonl"): "cannot read the dataset",
        str(tmp_path / "broken.jsonl"): "cannot read the dataset",
        str(tmp_path / "absent.txt"): "the text was not found",
    }
    for name, what in cases.items():
        with pytest.raises(DataError, match=what) as caught:
            read_text(name, 100)
        assert caught.value.where == name and caught.value.exit_code == 7


@pytest.mark.parametrize("name", ["./absent.txt", "folder/absent.jsonl", "~/absent-of-transmla.txt", "a/b/c.txt"])
def test_a_path_is_not_looked_for_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for read in (lambda: read_text(name, 100), lambda: next(rows(name))):
        with pytest.raises(DataError, match="no such file") as caught:
            read()
        assert caught.value.remedy == "check the path"


def test_splits_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ultrachat has them: none is called train."""
    folder = tmp_path / "chats"
    (folder / "data").mkdir(parents=True)
    for split in ("train_sft", "test_sft"):
        (folder / "data" / f"{split}-00000-of-00001.jsonl").write_text(json.dumps({"text": split}) + "\n", "utf-8")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train_sft", "test_sft"))
        + "---\n",
        "utf-8",
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for split in ("train_sft", "test_sft"):
        for name in (f"{folder}@{split}", f"{folder}:default@{split}"):
            assert list(rows(name)) == [{"text": split}] and place_of(name) == folder
    with pytest.raises(DataError, match="OWNER/NAME@SPLIT"):
        list(rows(str(folder)))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", "", "")),
        ("owner/name:config", ("owner/name", "config", "")),
        ("owner/name@train_sft", ("owner/name", "", "train_sft")),
        ("owner/name:config@test", ("owner/name", "config", "test")),
        ("owner/name@train.clean", ("owner/name", "", "train.clean")),
        ("owner/name@a/b", ("owner/name@a/b", "", "")),
    ],
)
def test_parts_of_a_name(name: str, parts: tuple[str, str, str]) -> None:
    assert dataset_of(name) == parts


def test_a_folder_with_an_at(tmp_path: Path) -> None:
    (tmp_path / "data@home").mkdir()
    assert dataset_of(f"{tmp_path}/data@home") == (f"{tmp_path}/data@home", "", "")
