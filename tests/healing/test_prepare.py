"""What is measured on is never trained on: texts that are watched as well, and rows in long windows."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.families import lively_config, lively_model
from tests.text.test_documents import Letters
from transmla.healing.flow import _hashes_of
from transmla.healing.prepare import Preparation, _identity
from transmla.healing.windows import Windows, write_windows
from transmla.processes import ALONE
from transmla.progress import silent
from transmla.recipe import Healing
from transmla.text.packing import pack
from transmla.train.losses import TopK, top_k

# letters that stand once in all texts begin here
FIRST = 1000


def windows(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, num_long: int = 0, **settings: Any) -> Any:
    """(train, held-out windows of each text, long), 50 windows of 8 tokens."""
    monkeypatch.setattr("transmla.healing.prepare.tokenizer", lambda _: tokenizer)
    nothing: Any = None
    given = Healing(window=8, **settings)
    folder.mkdir(exist_ok=True)
    made = Preparation(nothing, nothing, given, 50, ALONE, torch.device("cpu"), silent, num_long)
    return made.windows(folder)


def letters(found: Windows) -> set[int]:
    """Those of all windows that stand once in all texts."""
    return {token for row in found for token in row["input_ids"].tolist() if token >= FIRST}


@pytest.mark.parametrize("watch", ["b.txt", "./b.txt"])
def test_what_is_watched_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: str) -> None:
    """A text of the mix holds out its share of the windows; one that is watched, all that are measured."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.txt", "b.txt")):
        Path(name).write_text("".join(map(chr, range(FIRST + 500 * number, FIRST + 500 * number + 160))), "utf-8")
    train, (of_mix, watched), _ = windows(
        tmp_path / "work", Letters(), monkeypatch, data="a.txt+b.txt", watch=watch, heldout=4
    )
    assert len(of_mix) == len(watched) == 4 and len(train) == 50
    assert letters(watched) == set(range(FIRST + 500, FIRST + 532))
    assert letters(of_mix) == {*range(FIRST, FIRST + 16), *range(FIRST + 500, FIRST + 516)}, "as much of each"
    assert letters(train) == {*range(FIRST + 16, FIRST + 160), *range(FIRST + 532, FIRST + 660)}


def test_rows_that_are_held_out_are_in_no_long_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked problems are rows where there is a chat template, and a row has the same length in any window."""
    tokenizer = Letters()
    tokenizer.chat_template = "something"

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(60):
            yield {
                "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": chr(FIRST + number)}]
            }

    monkeypatch.setattr("transmla.text.maths.rows", rows)
    options: dict[str, Any] = {"data": "maths", "heldout": 24, "long_share": 0.5, "long_window": 64}
    train, (heldout,), long = windows(tmp_path / "work", tokenizer, monkeypatch, 8, **options)
    kept = letters(heldout)
    assert len(kept) > 4 and letters(train) and letters(long)
    assert not kept & letters(train) and not kept & letters(long)


def test_pieces_that_are_held_out_are_in_no_long_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long piece that holds some of them is left out whole; what is behind is not."""
    path = tmp_path / "a.txt"
    path.write_text("".join(map(chr, range(FIRST, FIRST + 400))), "utf-8")
    options: dict[str, Any] = {"data": str(path), "heldout": 5, "long_share": 0.5, "long_window": 32}
    _, (heldout,), long = windows(tmp_path / "work", Letters(), monkeypatch, 8, **options)
    assert letters(heldout) == set(range(FIRST, FIRST + 40))
    assert letters(long) == set(range(FIRST + 64, FIRST + 64 + 8 * 32))


def test_kept_predictions_are_the_teacher_s_in_training_and_the_source_s_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: lively_model(lively_config(layers=1), seed) for seed, name in enumerate(("source", "larger"))}
    monkeypatch.setattr(Preparation, "_model", lambda self, checkpoint: models[checkpoint])
    files = []
    for number, name in enumerate(("train", "heldout")):
        rows = pack([list(range(3 + number, 3 + number + 16))], 16)
        write_windows(tmp_path / f"{name}.npy", rows, 1, 16, silent, "pack")
        files.append(Windows(tmp_path / f"{name}.npy", number))
    given: Any = (SimpleNamespace(config={"vocab_size": 512}), "source", Healing(cached=True, top_k=5, temperature=2.0))
    made = Preparation(*given, 1, ALONE, torch.device("cpu"), silent, larger="larger")  # type: ignore[arg-type]
    teacher = made.teacher(tmp_path, files[0], files[1:], contextlib.nullcontext)
    for one, name, heat in zip(files, ("larger", "source"), (2.0, 1.0), strict=True):
        row = one[0]
        found = teacher(row["input_ids"][None], row["position_ids"][None], row["index"][None]).predictions(slice(0, 16))
        with torch.no_grad():
            wanted = top_k(models[name](row["input_ids"][None]).logits[0], 5, heat)
        assert isinstance(found, TopK) and torch.equal(found.ids_NK, wanted.ids_NK)
        assert torch.allclose(found.probabilities_NK, wanted.probabilities_NK, rtol=2e-3, atol=1e-6)


def test_a_text_is_known_by_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "ds").mkdir(parents=True)
    (tmp_path / "data" / "text.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    whole = str(tmp_path / "data" / "ds")
    folder = {"data/ds", "data/ds/", "./data/ds", "link/ds", whole, "data/ds:default", "data/ds@train"}
    for same in (folder, {"data/text.txt", "./data/text.txt", "link/text.txt"}, {"owner/name", "owner/name:default"}):
        assert len(set(map(_identity, same))) == 1
    others = (
        "data/ds", "data/ds:other", "data/ds@test", "data/ds:other@test", "data/text.txt", "owner/name",
        "owner/name:other", "owner/other", "wikitext",
    )  # fmt: skip
    assert len(set(map(_identity, others))) == len(others)


def test_a_run_knows_the_files_of_a_folder(tmp_path: Path) -> None:
    """By their paths in it: those of several folders often have one name."""
    for inside in ("train/0.jsonl", "more/0.jsonl", ".cache/0.lock"):
        path = tmp_path / inside
        path.parent.mkdir()
        path.write_text(inside, "utf-8")
    first = _hashes_of(tmp_path)
    assert first.keys() == {"train/0.jsonl", "more/0.jsonl"}
    (tmp_path / ".cache" / "0.lock").write_text("other", "utf-8")
    assert _hashes_of(tmp_path) == first
    (tmp_path / "train" / "0.jsonl").write_text("other", "utf-8")
    assert _hashes_of(tmp_path) != first
    assert _hashes_of(tmp_path / "train" / "0.jsonl").keys() == {"0.jsonl"}
