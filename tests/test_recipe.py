"""Recipes: what a file says is what is used, and nothing unknown is passed over."""

import dataclasses
from pathlib import Path

import pytest

from transmla import settings
from transmla.errors import RecipeError
from transmla.recipe import CALIBRATION, REFINE_LEVELS, TOKENS, Healing, Recipe, find_recipe, list_recipes, load_recipe
from transmla.text.mixes import parse_mix
from transmla.text.sources import SHIPPED, read_text

FULL = """
source = "owner/name"
revision = "main"
latent = 448
budget = 0.02
rope = 64
refine = "full"
theta = 1e5
calibration = "wikitext"
evaluation = "tinystories-valid"
tokens = 2048
window = 512
dtype = "bfloat16"
seed = 0
"""


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "a.toml"
        path.write_text(text)
        return path

    return write


def test_every_key(toml):
    loaded = load_recipe(toml(FULL))
    assert loaded == Recipe(
        source="owner/name", revision="main", latent=448, budget=0.02, rope=64, refine="full", theta=1e5,
        calibration="wikitext", evaluation="tinystories-valid", tokens=2048, window=512, dtype="bfloat16", seed=0,
    )  # fmt: skip
    names = [field.name for field in dataclasses.fields(Recipe) if field.name not in ("heal", "state", "model")]
    assert loaded.resolved == {name: getattr(loaded, name) for name in names}


def test_the_text_of_a_level():
    """`full` takes many steps, so it has more kinds of text and more of it; what is given counts at every level."""
    for level in REFINE_LEVELS:
        recipe = Recipe(refine=level)
        parts = parse_mix(recipe.mix, "here")
        assert {part.name for part in parts} <= set(SHIPPED)
        assert recipe.resolved["calibration"] == recipe.mix == CALIBRATION[level]
        assert Recipe(refine=level, calibration="self").resolved["calibration"] == "self"
    assert Recipe(refine="full").num_tokens > 3 * Recipe(refine="fast").num_tokens


def test_the_shipped_texts_last_for_every_level():
    """No text is shorter than its share, at four characters a token: SmolLM2's tokenizer makes 3.7 to 3.9 of them."""
    for level in REFINE_LEVELS:
        parts = parse_mix(CALIBRATION[level], "here")
        whole = sum(part.weight for part in parts)
        for part in parts:
            needed = TOKENS[level] * part.weight / whole
            assert len(read_text(part.name, 10**9)) > 4 * needed, (level, part.name)


def test_the_table_heal(toml):
    loaded = load_recipe(toml('latent = 448\n[heal]\ndata = "a.txt"\ntokens = 5000\nrate = 1\ncached = true'))
    assert loaded.latent == 448 and loaded.heal == Healing(data="a.txt", tokens=5000, rate=1.0, cached=True)
    assert "heal" not in loaded.resolved
    for text, message in (
        ("tokns = 3", "unknown recipe key 'tokns'"),
        ("cached = 1", "cached is true or false, not an integer"),
        ('train = "mlp"', "train is one of attention, all"),
        ("warmup = 1.5", "warmup is a share"),
        ("patience = 0", "patience must be positive"),
        ("window = 7", "window must be at least 8"),
        ("hidden = -1.0", "hidden cannot be negative"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe(toml(f"[heal]\n{text}"))
        assert caught.value.where.endswith("[heal]")
    with pytest.raises(RecipeError, match="heal is a table"):
        load_recipe(toml("heal = 3"))


def test_defaults(toml):
    assert load_recipe(toml("")) == Recipe()
    assert (Recipe().num_tokens, Recipe().window, Recipe().theta) == (180224, 1024, "auto")
    assert Recipe(refine="off").num_tokens == 131072
    assert Recipe(refine="full").num_tokens == 573440 and Recipe(tokens=5, refine="full").num_tokens == 5
    assert Recipe().resolved["tokens"] == 180224


def test_an_integer_is_a_number(toml):
    theta = load_recipe(toml("theta = 500000")).theta
    assert theta == 500000.0 and isinstance(theta, float)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('latent = "448"', "latent is an integer or .auto."),
        ("latent = true", "latent is an integer or a string, not a boolean"),
        ("latent = 1.5", "latent is an integer or a string, not a number"),
        ("theta = true", "theta is a number or a string, not a boolean"),
        ('theta = "high"', 'theta is a number or "auto"'),
        ("theta = nan", "theta must be positive"),
        ("tokens = 0", "tokens must be positive"),
        ("source = 1", "source is a string, not an integer"),
        ("source = []", "source is a string, not a list"),
        ("[source]", "source is a string, not a table"),
        ('refine = "some"', "refine is one of off, fast, full"),
        ("budget = -0.1", "budget must be positive"),
        ('dtype = "int8"', "dtype is one of auto, float32, bfloat16, float16"),
    ],
)
def test_values_that_cannot_be(toml, line, why):
    with pytest.raises(RecipeError, match=why) as error:
        load_recipe(toml(line))
    assert "a.toml" in str(error.value)


@pytest.mark.parametrize(("key", "near"), [("latents", "latent"), ("calibraton", "calibration"), ("qqq", None)])
def test_unknown_keys(toml, key, near):
    with pytest.raises(RecipeError, match=f"unknown recipe key '{key}'") as error:
        load_recipe(toml(f"{key} = 1"))
    assert (f"did you mean '{near}'?" in error.value.remedy) if near else ("mean" not in error.value.remedy)
    assert "known keys: source, revision" in error.value.remedy
    assert error.value.remedy.endswith("; known tables: heal, model")


def test_a_table_is_meant_as_a_table(toml):
    with pytest.raises(RecipeError, match="unknown recipe key 'heel'") as error:
        load_recipe(toml("[heel]\ntokens = 1000"))
    assert "did you mean 'heal'?" in error.value.remedy


def test_files_that_cannot_be_read(toml, tmp_path):
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(toml("latent: 4"))
    (tmp_path / "b.toml").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(tmp_path / "b.toml")
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "c.toml")


def test_overrides():
    given = Recipe(latent=8, rope=4)
    assert given.with_overrides(latent=None, rope=2, theta=7) == Recipe(latent=8, rope=2, theta=7.0)
    assert given == Recipe(latent=8, rope=4)
    with pytest.raises(RecipeError, match="unknown recipe key 'ropes'"):
        given.with_overrides(ropes=2)
    with pytest.raises(RecipeError, match="tokens must be positive"):
        given.with_overrides(tokens=-1)


@pytest.mark.parametrize("installed", [True, False])
def test_installed_recipes_and_those_of_a_checkout(tmp_path, monkeypatch, installed):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "b-1.5.toml").write_text("latent = 3")
    (tmp_path / "recipes" / "a.toml").touch()
    (tmp_path / "recipes" / "README.md").touch()

    def files(package):
        assert package == "transmla.recipes"
        if not installed:
            raise ModuleNotFoundError
        return tmp_path / "recipes"

    monkeypatch.setattr(settings.resources, "files", files)
    monkeypatch.setattr(settings, "__file__", str(tmp_path / "transmla" / "settings.py"))
    assert list_recipes() == ["a", "b-1.5"]
    found = find_recipe("b-1.5")
    assert found is not None and load_recipe(found).latent == 3
    assert find_recipe("c") is None


def test_every_shipped_recipe_is_valid():
    for name in list_recipes():
        path = find_recipe(name)
        assert path is not None and load_recipe(path).source is not None
