"""Mixes of texts."""

from pathlib import Path

import pytest

from tests.text.letters import Letters
from transmla.errors import DataError
from transmla.text.mixes import names_of, parse_mix
from transmla.text.windows import calibration_tokens


def test_shares_of_a_mix(tmp_path: Path) -> None:
    for letter, name in (("a", "one.txt"), ("b", "two.txt")):
        (tmp_path / name).write_text(letter * 1000, encoding="utf-8")
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    for mix, share in ((f"{one}+{two}", 10), (f"{one}:3+{two}", 15), (f"{one}:3+{two}:1", 15)):
        found = calibration_tokens(mix, Letters(), 200, 10)
        windows_of_one = int((found.ids_NT[:, 1] == ord("a")).sum())
        assert (len(found.ids_NT), windows_of_one, found.name) == (20, share, mix)
    assert calibration_tokens(f"{one}:7", Letters(), 200, 10).ids_NT.shape == (20, 10)
    with pytest.raises(DataError, match="not a mix"):
        calibration_tokens(f"{one}:0+{two}", Letters(), 200, 10)


def test_a_file_with_a_plus_in_its_path(tmp_path: Path) -> None:
    path = tmp_path / "c++" / "x.txt"
    path.parent.mkdir()
    path.write_text("a" * 1000, encoding="utf-8")
    assert calibration_tokens(str(path), Letters(), 200, 10).name == str(path)
    assert [(part.name, part.weight) for part in parse_mix(f"{path}:3", "here")] == [(str(path), 3)]
    assert names_of(f"a+{path}:3+b+{path}") == ["a", f"{path}:3", "b", str(path)]
    numbered = path.with_name("notes:2")
    numbered.write_text("a", encoding="utf-8")
    assert [(part.name, part.weight) for part in parse_mix(str(numbered), "here")] == [(str(numbered), 1)]
    assert names_of(str(path)) == [str(path)] and names_of("a+b") == ["a", "b"] and names_of("") == []
    assert len(parse_mix("+".join(["wikitext"] * 100), "here")) == 100, "too long for the name of a file"
