"""Settings that a conversion refuses before anything is loaded, and the form of the folder that follows from them."""

from __future__ import annotations

from transmla.errors import DataError, RecipeError, UnsupportedError
from transmla.model.outline import Outline
from transmla.recipe import Recipe, check_rounded
from transmla.text.mixes import parse_mix


def check_tokens(recipe: Recipe, context: int) -> None:
    """`DataError` if the tokens are too few for what calibration and its held-out check need."""
    window, texts = min(recipe.window, context), len(parse_mix(recipe.mix, "--calibration"))
    least = 2 * window * texts
    if recipe.num_tokens < least:
        raise DataError(
            f"{recipe.num_tokens:,} calibration tokens are too few",
            where="--tokens",
            why=f"two windows of {window:,} tokens of each text are the least, one to fit to and one held out"
            + (f"; there are {texts} texts" if texts > 1 else ""),
            remedy=f"give at least --tokens {least}, or shorter windows (--window)",
        )


def check_rounding(recipe: Recipe, context: int) -> None:
    """`RecipeError` if latents are to be rounded where nothing is trained, or nothing is rounded."""
    if recipe.latent_bits is not None and recipe.refine == "off":
        raise RecipeError(
            "no weight would learn from rounded latents",
            where="--latent-bits and --refine off",
            why="the refinement alone trains, and it is off",
            remedy="use --refine fast or full; or leave out --latent-bits: every folder can keep its cache packed",
        )
    check_rounded(recipe, min(recipe.window, context))


def chosen_form(recipe: Recipe, found: tuple[str, ...], where: str) -> str:
    """The form of the folder; `UnsupportedError` if the one that was asked for cannot express the model."""
    if recipe.format == "deepseek_v3" and found:
        raise UnsupportedError(
            "stock deepseek_v3 cannot express this model",
            where=where,
            why="; ".join(found),
            remedy="leave out --format, which writes the form of the source's own class",
        )
    if recipe.format != "auto":
        return recipe.format
    return "transmla" if found else "deepseek_v3"


def check_lossy(form: str, found: tuple[str, ...], outline: Outline) -> None:
    """`RecipeError` if there are no biases to leave out of a deepseek_v3 folder."""
    if form != "deepseek_v3":
        why = f"the form of the source's own class loses nothing, and here it is {'needed' if found else 'asked for'}"
        why += f": {'; '.join(found)}" if found else ""
    elif not outline.biased and not outline.output_bias:
        why = "the attention of this model has no biases, and nothing else can be left out"
    else:
        return
    raise RecipeError("there is nothing to lose", where="--lossy", why=why, remedy="leave out --lossy")
