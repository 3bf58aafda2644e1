"""Choose what is healed and with which settings, and refuse what cannot work before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.provenance import named_source
from transmla.checkpoint.read import Source
from transmla.conversion.flow import default_destination
from transmla.conversion.plan import plan
from transmla.errors import RecipeError, SourceError, UnsupportedError
from transmla.model.loading import open_model
from transmla.recipe import MIX_OF_CHATS, Healing, check_rounded, find_recipe, list_recipes, load_recipe


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
    name = named_source(parent)
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


def with_mix(settings: Healing, words: Any) -> Healing:
    """The settings with a text to train on: a model with a chat template answers, and learns that as well.

    words: its tokenizer
    """
    is_chat = settings.data is None and bool(getattr(words, "chat_template", None))
    return settings.with_overrides(data=MIX_OF_CHATS if is_chat else settings.mix)


def check_teacher(teacher: Source, source: Source) -> None:
    """Refuse a larger model that reads text otherwise than the source; `UnsupportedError`.

    The number of logits may differ, as long as the tokenizer's tokens are among those of both.
    """
    words = [tokenizer(one).get_vocab() for one in (teacher, source)]
    sizes = [int(one.config.get("text_config", one.config)["vocab_size"]) for one in (teacher, source)]
    if words[0] != words[1]:
        differing = {word for word in {**words[0], **words[1]} if words[0].get(word) != words[1].get(word)}
        why = f"{len(differing):,} tokens differ, such as {min(differing)!r}"
    elif max(words[0].values()) >= min(sizes):
        why = f"the vocabulary of one has {min(sizes):,} tokens, and the tokenizer knows of more"
    else:
        return
    raise UnsupportedError(
        "the teacher has another tokenizer",
        where=str(teacher.path),
        why=why,
        remedy="use a larger model of the source's own family",
    )


def _contradictions(settings: Healing) -> None:
    """`RecipeError` for settings of which one makes another senseless."""
    own, teacher, layerwise = settings.on_policy > 0, settings.teacher is not None, settings.layerwise > 0
    for is_there, where, what, why, remedy in (
        (own and settings.cached, "on_policy and cached", "`on_policy` and `cached` cannot be combined",
         "predictions are stored of text that is there before, not of what the model will write", "use one of the two"),
        (own and settings.cross_entropy > 0, "on_policy and cross_entropy",
         "`on_policy` and `cross_entropy` cannot be combined",
         "the model would learn what it wrote itself as if it were right", "use one of the two"),
        (own and settings.on_policy_tokens >= settings.window, "on_policy_tokens and window",
         "what the model writes does not fit into a window",
         f"{settings.on_policy_tokens} tokens and a prompt are in a window of {settings.window}",
         "use longer windows, or fewer on_policy_tokens"),
        (teacher and settings.hidden > 0, "teacher and hidden", "`teacher` and `hidden` cannot be combined",
         "a larger model has other residual streams", "use one of the two; where the recipe sets hidden: --hidden 0"),
        (teacher and layerwise, "teacher and layerwise", "`teacher` and `layerwise` cannot be combined",
         "a larger model has other layers", "use one of the two"),
        (layerwise and settings.cached, "layerwise and cached", "`layerwise` and `cached` cannot be combined",
         "residual streams are not stored", "use one of the two"),
        (layerwise and settings.checkpointing, "layerwise and checkpointing",
         "`layerwise` and `checkpointing` cannot be combined",
         "a layer that is computed again would read another input", "use one of the two"),
        (layerwise and settings.compile, "layerwise and compile", "`layerwise` and `compile` cannot be combined",
         "what a layer reads is exchanged while it runs", "use one of the two"),
        (settings.long_share > 0 and settings.cached, "long_share and cached",
         "`long_share` and `cached` cannot be combined", "predictions are stored of windows of one length",
         "use one of the two"),
        (settings.long_share > 0 and settings.long_window <= settings.window, "long_window and window",
         "long windows are not longer than the others",
         f"{settings.long_window:,} tokens, at most the context, and the others have {settings.window:,}",
         "give a larger --long-window or a smaller --window, or leave out long_share"),
    ):  # fmt: skip
        if is_there:
            raise RecipeError(what, where=where, why=why, remedy=remedy)


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
            remedy="use one of the two; where the recipe sets hidden: --hidden 0",
        )
    _contradictions(settings)
    check_rounded(settings, settings.window)
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
