"""The lists of recipes and families say what `plan` says."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import transmla
from tests.families import sparse_source
from transmla.cli import main
from transmla.conversion.show_lists import _short
from transmla.errors import RecipeError
from transmla.families import FAMILIES
from transmla.recipe import find_recipe, list_recipes, load_recipe
from transmla.targets.engines import ENGINES

ROWS = {row.name: row for row in transmla.list_recipes()}


def test_every_recipe_is_listed() -> None:
    assert set(ROWS) == set(list_recipes()) and len(ROWS) > 20


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_is_planned_as_it_is_listed(name: str, tmp_path: Path) -> None:
    """At full size, on a checkpoint of which only the headers are there."""
    path, row = find_recipe(name), ROWS[name]
    assert path is not None
    recipe = load_recipe(path)
    assert recipe.model is not None
    planned = transmla.plan(str(sparse_source(tmp_path / "src", recipe.model.config)), recipe=name)
    assert (planned.gqa.cache_values(), planned.mla.cache_values()) == (row.before, row.after)
    assert f"{planned.mla.kv_lora_rank}+{planned.mla.qk_rope_head_dim}" == row.size
    assert planned.form == row.form and row.after <= row.before * 0.63
    assert tuple(verdict.engine for verdict in planned.engines if verdict.accepts) == row.engines
    assert (
        name == "smoke"
        or f"{row.before:,} cached values per token and layer become {row.after:,}" in path.read_text("utf-8")
    )
    layers = recipe.model.num_hidden_layers
    assert planned.cache[0].bytes_per_token == 2 * layers * row.before, "bf16, by hand"


def test_engines_of_a_recipe_are_all_or_named() -> None:
    """As many as half may be left out by name."""
    every = tuple(ENGINES)
    missing = [one for one in every if one != "MLX-LM"]
    assert (_short(every), _short(tuple(missing))) == ("all", "all but MLX-LM")
    assert _short(("transformers, latent cache", "llama.cpp")) == "transformers, llama.cpp"


def test_every_family_is_listed() -> None:
    rows = {row.model_type: row for row in transmla.list_families()}
    assert list(rows) == list(FAMILIES)
    assert rows["llama"].form == "deepseek_v3" and rows["llama"].obstacles == ()
    assert rows["qwen2"].form == "deepseek_v3" and rows["qwen2"].obstacles == ()
    assert rows["qwen3"].form == "transmla" and rows["qwen3"].obstacles == ("norms on queries and keys",)


@pytest.mark.parametrize("command", ["recipes", "families"])
def test_tables_fit_into_80_columns(command: str) -> None:
    shown = CliRunner().invoke(main, [command], env={"COLUMNS": "80"})
    assert shown.exit_code == 0 and max(map(len, shown.output.splitlines())) <= 80
    plain = json.loads(CliRunner().invoke(main, [command, "--json"]).output)
    assert len(plain) == len(ROWS if command == "recipes" else FAMILIES)
    first = plain[0]["name" if command == "recipes" else "model_type"]
    assert shown.output.splitlines()[1].startswith(first)


def test_the_table_of_the_source_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[model]\nmodel_type = 3\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="model_type"):
        load_recipe(path)
    path.write_text("model = 3\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="table"):
        load_recipe(path)
