"""What can be converted: the installed recipes, and the families of models, each with what it would become."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transmla.conversion.sizes import chosen_sizes
from transmla.families import FAMILIES, Family, family_of, rope_parameters
from transmla.geometry import gqa_geometry, mla_geometry
from transmla.model.outline import Outline, outline_of_layout
from transmla.recipe import find_recipe, load_recipe
from transmla.recipe import list_recipes as recipe_names
from transmla.targets.engines import OWN_MODEL_TYPE, RUNS, engine_verdicts, own_form_sizes
from transmla.targets.stock import deepseek_v3_config, obstacles


@dataclass(frozen=True)
class FamilyRow:
    """One family.

    form:      of a converted folder, "deepseek_v3" or "transmla"
    obstacles: what deepseek_v3 cannot express of a model with the defaults of the family's config class
    """

    model_type: str
    form: str
    obstacles: tuple[str, ...]


@dataclass(frozen=True)
class RecipeRow:
    """One recipe.

    before, after: cached values per token and layer;  state: "measured" or "planned"
    size:          kv_lora_rank and qk_rope_head_dim, as "512+64"
    engines:       that run the folder which it makes
    """

    name: str
    source: str
    model_type: str
    size: str
    before: int
    after: int
    form: str
    engines: tuple[str, ...]
    state: str


# sizes that say nothing of a family
_SMALL: dict[str, Any] = {
    "num_hidden_layers": 6, "vocab_size": 64, "pad_token_id": 0, "hidden_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip


def list_families() -> tuple[FamilyRow, ...]:
    """All families that can be converted, in the order of the table."""
    rows = []
    for family in FAMILIES.values():
        outline = _outline({"model_type": family.model_type} | _SMALL, family, family.model_type)
        found = obstacles(outline.config, family, encoded=outline.encoded)
        rows.append(FamilyRow(family.model_type, OWN_MODEL_TYPE if found else "deepseek_v3", found))
    return tuple(rows)


def list_recipes() -> tuple[RecipeRow, ...]:
    """All installed recipes that say what their source is like."""
    rows = []
    for name in recipe_names():
        path = find_recipe(name)
        assert path is not None
        recipe = load_recipe(path)
        if recipe.model is None:
            continue
        family = family_of(recipe.model.config, str(path))
        outline = _outline(recipe.model.config, family, str(path))
        values = outline.config
        gqa = gqa_geometry(values, str(path))
        found = obstacles(values, family, encoded=outline.encoded)
        mla = replace(
            mla_geometry(gqa, *chosen_sizes(gqa, recipe), recipe.q_latent),
            attention_bias=not found and (outline.biased or outline.output_bias),
            query_bias=not found and outline.biased,
        )
        target = own_form_sizes(values, mla)
        if not found:
            theta = float(rope_parameters(values)["rope_theta"])
            target = deepseek_v3_config(values, mla, theta, recipe.model.max_position_embeddings, "bfloat16")
        engines = tuple(verdict.engine for verdict in engine_verdicts(target) if verdict.outcome == RUNS)
        size = f"{mla.kv_lora_rank}+{mla.qk_rope_head_dim}"
        rows.append(
            RecipeRow(
                name, str(recipe.source), family.model_type, size, gqa.cache_values(), mla.cache_values(),
                OWN_MODEL_TYPE if found else "deepseek_v3", engines, recipe.state,
            )
        )  # fmt: skip
    return tuple(rows)


def _outline(config: dict[str, Any], family: Family, where: str) -> Outline:
    """Of a model of which there is nothing but a config. where: that is, for messages"""
    found = outline_of_layout(config, family)
    if found is None:
        from transmla.model.skeleton import outline_of_class

        found = outline_of_class(config, family, where)
    return found
