"""What is healed, and with which settings; what cannot work is refused here, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from transmla.conversion.flow import default_destination
from transmla.conversion.plan import plan
from transmla.errors import RecipeError, UnsupportedError
from transmla.recipe import Healing, find_recipe, list_recipes, load_recipe


def conversion_of(recipe: str | Path | None) -> Path:
    """Where `convert` writes the conversion of a recipe."""
    if recipe is None:
        raise RecipeError(
            "there is nothing to heal",
            where="the command",
            why="neither a converted folder nor a recipe was given",
            remedy="transmla heal OUT, or --recipe NAME, whose conversion is then looked for in the working directory",
        )
    path = find_recipe(str(recipe)) or Path(recipe)
    return default_destination(plan(str(load_recipe(path).source), recipe=path))


def settings_for(recipe: str | Path | None, source: str) -> Healing:
    """Those of the recipe, or of the installed recipe that converts this source, or the defaults."""
    if recipe is not None:
        return load_recipe(find_recipe(str(recipe)) or Path(recipe)).heal
    for name in list_recipes():
        found = load_recipe(find_recipe(name) or Path(name))
        if source == found.source and name != "smoke":
            return found.heal
    return Healing()


def check(settings: Healing, device: str) -> None:
    """Refuse what cannot work before anything is loaded."""
    if settings.cached and settings.hidden > 0:
        raise RecipeError(
            "residual streams are not kept on the disk",
            where="hidden and cached",
            why="only the source's largest predictions are",
            remedy="leave out one of the two",
        )
    if settings.heldout < 2:
        raise RecipeError(
            "too few windows are held out",
            where="heldout",
            why="a standard error needs two",
            remedy="hold out 2 windows or more",
        )
    if device not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"healing does not run on {device}",
            where="--device",
            why="several devices are the launcher's business",
            remedy="use cpu or cuda; CUDA_VISIBLE_DEVICES chooses among GPUs",
        )
    if settings.lora is not None and settings.train != "attention":
        raise RecipeError(
            "adapters are put on the attention only",
            where="lora and train",
            why=f"train is {settings.train!r}",
            remedy='leave lora out, or use train = "attention"',
        )
