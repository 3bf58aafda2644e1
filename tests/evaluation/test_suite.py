"""Suites: every installed one is valid, mistakes are named with what was meant."""

from pathlib import Path

import pytest

from transmla.errors import RecipeError
from transmla.evaluation.suite import Suite, list_suites, load_suite


def test_installed_suites() -> None:
    assert list_suites() == ["full", "quick", "standard"]
    quick, standard, full = (load_suite(name) for name in ("quick", "standard", "full"))
    assert set(quick.texts) == set(standard.texts) and quick.windows < standard.windows < full.windows
    assert not quick.tasks and set(standard.tasks) < set(full.tasks)
    assert all(0.5 < share <= 1 for suite in (quick, standard, full) for share in suite.gates.values())


def test_a_file_and_options(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('texts = ["a.txt"]\nwindows = 3\nneedles = [1024]\n[gates]\nperplexity = 0.5\n')
    suite = load_suite(str(path))
    assert suite == Suite(texts=("a.txt",), windows=3, needles=(1024,), gates={"perplexity": 0.5})
    changed = suite.with_overrides(windows=4, tasks=("piqa",), texts=None)
    assert (changed.windows, changed.tasks, changed.texts) == (4, ("piqa",), ("a.txt",))
    assert changed.plain()["tasks"] == ["piqa"] and changed.plain()["gates"] == {"perplexity": 0.5}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("window = 3", "did you mean 'windows'"),
        ('windows = "3"', "windows is an integer, not a string"),
        ("quantised = [0.25]", "bits are 2, 3, 4 or 8"),
        ("quantised = [2.5, 9]", "bits are 2, 3, 4 or 8"),
        ("[gates]\nspeed = 1.0", "gates are perplexity, tasks, needles, loops"),
        ("[gates]\ntasks = 95", "share of the source, like 0.95"),
        ("generation = -1", "generation is a number of tokens"),
        ("windows = 0", "at least one window"),
        ("texts = []", "at least one text"),
        ("windows = ", "not valid TOML"),
    ],
)
def test_mistakes(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"(?s)" + expected.replace("'", ".")):
        load_suite(str(path))


def test_no_such_suite() -> None:
    with pytest.raises(RecipeError, match="full, quick, standard"):
        load_suite("quik")
