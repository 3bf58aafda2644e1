"""Settings, texts and destinations that no conversion is possible with are refused in words; nothing is left behind."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conversion.made import check
from tests.families import MakeSource
from transmla.conversion.flow import convert
from transmla.conversion.plan import plan
from transmla.errors import (
    DataError,
    DestinationError,
    GeometryError,
    RecipeError,
    TransmlaError,
)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"latent": 0}, GeometryError, ("nearest", "--latent 1")),
        ({"latent": 49}, GeometryError, ("nearest", "--latent 48", "hidden_size 48")),
        ({"rope": 7}, GeometryError, ("nearest", "--rope 6")),
        ({"rope": 14}, GeometryError, ("nearest", "--rope 12", "6 pairs per head")),
        ({"latnet": 16}, RecipeError, ("'latnet'", "did you mean 'latent'?")),
        ({"dtype": "int8"}, RecipeError, ("'int8'", "bfloat16")),
        ({"theta": -1.0}, RecipeError, ("theta", "positive")),
        ({"window": 0}, RecipeError, ("window", "positive")),
        ({"context": 257}, RecipeError, ("257 positions", "--context 256")),
        ({"recipe": "no-such-recipe"}, RecipeError, ("no-such-recipe",)),
    ],
    ids=str,
)
def test_settings_that_plan_refuses(
    lively: MakeSource, settings: dict[str, Any], kind: type[TransmlaError], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        plan(str(lively()), **settings)
    check(caught.value, "", words)
    assert caught.value.exit_code == {GeometryError: 6, RecipeError: 10}[kind]


def test_unknown_key_of_a_recipe_file(lively: MakeSource, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("ropes = 4\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        plan(str(lively()), recipe=recipe)
    check(caught.value, str(recipe), ("'ropes'", "did you mean 'rope'?"))


def test_existing_destination(lively: MakeSource, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("", encoding="utf-8")
    for attempt in (plan, convert):
        with pytest.raises(DestinationError) as caught:
            attempt(str(lively()), out)
        check(caught.value, str(out), ("exists already", "nothing is ever overwritten"))
        assert caught.value.exit_code == 8
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_disk_too_small(lively: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
    with pytest.raises(DestinationError) as caught:
        convert(str(lively()), tmp_path / "out")
    check(
        caught.value, str(tmp_path / "out"), ("disk is too small", " are needed, 1.0 MiB are free", "free some space")
    )
    assert list(tmp_path.iterdir()) == []


def test_text_too_short(lively: MakeSource, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time.", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        convert(str(lively()), tmp_path / "out", calibration=str(tmp_path / "short.txt"), window=64)
    check(caught.value, "short.txt", ("too short", "two windows of 64 tokens", "longer text"))
    assert caught.value.exit_code == 7
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_no_such_text(lively: MakeSource, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a file"):
        convert(str(lively()), tmp_path / "out", calibration="nothing")
