"""Sizes of the latent cache: what a recipe asks for, and what is searched where it says "auto"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transmla.errors import RecipeError
from transmla.geometry import (
    GqaGeometry,
    MlaGeometry,
    default_sizes,
    latent_candidates,
    mla_geometry,
    rope_candidates,
    usual_rope,
)
from transmla.recipe import Recipe


def redivided(recipe: Recipe, latent: int | str | None, rope: int | str | None, total: int | None) -> Recipe:
    """The recipe without the sizes that these divide anew; the sum of its own remains, unless another is given."""
    if latent is not None and rope is not None:
        return replace(recipe, total=None)
    if rope != "auto" and total is None:
        return recipe
    if latent is not None:
        return replace(recipe, rope=None)
    own = recipe.total
    if isinstance(recipe.latent, int) and isinstance(recipe.rope, int):
        own = recipe.latent + recipe.rope
    return replace(recipe, latent=None, total=own)


def tried_latents(gqa: GqaGeometry, recipe: Recipe) -> tuple[int, ...]:
    """Sizes for `--latent auto`, else none; raises `RecipeError` unless latent and budget go together."""
    if (recipe.latent == "auto") != (recipe.budget is not None):
        raise RecipeError(
            "latent auto and a budget belong together",
            where="--latent / --budget",
            why=f"latent is {recipe.latent!r}, budget {recipe.budget!r}",
            remedy="give both, for example --latent auto --budget 2%, or a number for --latent alone",
        )
    if recipe.latent != "auto":
        return ()
    if recipe.rope == "auto" or recipe.total is not None:
        raise RecipeError(
            "latent auto goes with a rotary width",
            where="--latent / --rope / --total",
            why="it searches for the smallest latent, so there is no total to divide",
            remedy="give --rope a number or leave it out, and leave out --total",
        )
    return latent_candidates(gqa, as_number(recipe.rope))


def chosen_sizes(gqa: GqaGeometry, recipe: Recipe, candidates: Sequence[int] = ()) -> tuple[int | None, int | None]:
    """kv_lora_rank and qk_rope_head_dim of a recipe; None takes the default. What is "auto" is the largest, the usual.

    candidates: for `latent="auto"`
    Raises `RecipeError` if more is given than fits together.
    """
    latent, rope, total = recipe.latent, recipe.rope, recipe.total
    if None not in (latent, rope, total) or (rope == "auto" and latent not in (None, "auto")):
        raise RecipeError(
            "the sizes say more than fits together",
            where="--latent / --rope / --total",
            why="the total is the sum of latent and rotary width, and --rope auto divides it",
            remedy="leave out --latent" if rope == "auto" else "leave out one of the three",
        )
    if candidates:
        return candidates[-1], as_number(rope)
    latent, rope = as_number(latent), as_number(rope)
    if total is None:
        return latent, rope
    if latent is not None:
        _check_rest(total, latent, 2, "--latent", "rotary key")
        return latent, total - latent
    rope = usual_rope(gqa, total) if rope is None else rope
    if recipe.rope != "auto":
        _check_rest(total, rope, 1, "--rope", "latent")
    return total - rope, rope


def _check_rest(total: int, taken: int, least: int, by: str, rest: str) -> None:
    """Raise `RecipeError` where one part of the cache leaves less than `least` values to the other."""
    if total - taken < least:
        raise RecipeError(
            f"a total of {total} is too small",
            where=f"--total / {by}",
            why=f"{taken} of its values are {'the rotary key' if rest == 'latent' else 'the latent'}, which leaves "
            f"{max(0, total - taken)} for the {rest}",
            remedy=f"give --total at least {taken + least}, or a smaller {by}",
        )


def as_number(size: int | str | None) -> int | None:
    """A size; None where it is searched for or left to the default."""
    return None if isinstance(size, str) else size


def divisions(gqa: GqaGeometry, recipe: Recipe, turning: int) -> tuple[MlaGeometry, ...]:
    """The divisions for `rope="auto"`, else none."""
    if recipe.rope != "auto":
        return ()
    total = recipe.total or sum(default_sizes(gqa))
    widths = rope_candidates(gqa, total, turning)
    return tuple(mla_geometry(gqa, total - rope, rope, recipe.q_latent) for rope in widths)
