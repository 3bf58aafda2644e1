"""Choose what is healed and with which settings, and refuse what cannot work before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from transmla.checkpoint.provenance import read_provenance
from transmla.conversion.flow import default_destination
from transmla.conversion.plan import plan
from transmla.errors import RecipeError, SourceError, UnsupportedError
from transmla.model.loading import open_model
from transmla.recipe import Healing, find_recipe, list_recipes, load_recipe


def conversion_of(recipe: str | Path | None) -> Path:
    """The folder that `convert` writes for a recipe when no destination is given.

    recipe: name of an installed recipe, or path of a recipe file

    Raises `RecipeError` if `recipe` is None or cannot be read, and whatever `plan` raises for its source.
    """
    if recipe is None:
        raise RecipeError(
            "there is nothing to heal",
            where="the command",
            why="the command names neither a converted folder nor a recipe",
            remedy="name the folder (transmla heal OUT), or the recipe (--recipe) of a conversion in this directory",
        )
    path = find_recipe(str(recipe)) or Path(recipe)
    return default_destination(plan(str(load_recipe(path).source), recipe=path))


def source_of(parent: Path) -> str:
    """The source that the provenance file of a converted folder names; a folder of that name may lie beside it.

    Raises `SourceError` if it is not on this machine.
    """
    name = str(read_provenance(parent)["source"]["name"])
    beside = parent.absolute().parent / name
    if "/" not in name and not Path(name).exists() and beside.exists():
        return str(beside)
    try:
        open_model(name)
    except SourceError as error:
        remedy = f"name the source with --source, as a folder, a .gguf file or a hub id; {error.remedy}"
        raise SourceError(error.what, where=error.where, why=error.why, remedy=remedy) from error
    return name


def settings_for(recipe: str | Path | None, source: str) -> Healing:
    """The healing settings to start from, before options override them.

    They come from `recipe` if there is one, otherwise from the installed recipe whose source is `source`, otherwise
    they are the defaults. Raises `RecipeError` if the recipe cannot be read.
    """
    if recipe is not None:
        return load_recipe(find_recipe(str(recipe)) or Path(recipe)).heal
    for name in list_recipes():
        installed = load_recipe(find_recipe(name) or Path(name))
        if source == installed.source and name != "smoke":
            return installed.heal
    return Healing()


def check(settings: Healing, device: str) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises `RecipeError` for settings that contradict each other and `UnsupportedError` for a device other than "cpu"
    and "cuda".
    """
    if settings.cached and settings.hidden > 0:
        raise RecipeError(
            "`hidden` and `cached` cannot be combined",
            where="hidden and cached",
            why="`hidden` compares residual streams, and `cached` stores only the source's largest predictions",
            remedy="use one of the two",
        )
    if settings.heldout < 2:
        raise RecipeError(
            "too few windows are held out",
            where="heldout",
            why="a standard error needs at least two windows",
            remedy="hold out 2 windows or more",
        )
    if device not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"healing does not run on {device}",
            where="--device",
            why="healing runs on the CPU or on GPUs that the launcher assigns to its processes",
            remedy="use cpu or cuda; set CUDA_VISIBLE_DEVICES to choose among GPUs",
        )
    if settings.lora is not None and settings.train != "attention":
        raise RecipeError(
            "adapters can only be trained on the attention",
            where="lora and train",
            why=f"train is {settings.train!r}",
            remedy='leave out lora, or use train = "attention"',
        )
