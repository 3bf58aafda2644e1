"""Recipes: what to convert and how, as TOML. Unknown keys are errors that name the nearest known key."""

import difflib
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

from transmla.errors import RecipeError

REFINE_LEVELS = ("off", "fast", "full")
# calibration tokens of each level, where the recipe does not say
TOKENS = {"off": 131072, "fast": 131072, "full": 245760}
DTYPES = ("auto", "float32", "bfloat16", "float16")

_WORDS = {str: "a string", int: "an integer", float: "a number"}


@dataclass(frozen=True)
class Recipe:
    """One conversion. None and "auto" mean: chosen from the source model."""

    source: str | None = None  # folder, .gguf file, embedded model or hub id
    revision: str | None = None  # commit, branch or tag of a hub id
    latent: int | str | None = None  # kv_lora_rank; "auto": the smallest within the budget
    budget: float | None = None  # perplexity increase that "auto" may cost, 0.02 is 2 %
    rope: int | None = None  # qk_rope_head_dim
    q_latent: int | None = None  # q_lora_rank; None: queries without a latent
    refine: str = "fast"  # how much gradient refinement: off, fast, full
    theta: float | str = "auto"  # rope_theta of the target
    calibration: str = "wikitext+synthetic"  # names of embedded texts, or files, shares of each
    evaluation: str = "wikitext-valid"  # text that `transmla eval` measures on
    tokens: int | None = None  # calibration tokens in all; None: TOKENS
    sampled: int = 0  # tokens more, written by the source itself as continuations of that text
    window: int = 1024  # tokens per calibration window
    dtype: str = "auto"  # of the written weights
    seed: int = 0

    def with_overrides(self, **given: Any) -> "Recipe":
        """A copy with the values that are not None, checked like those of a file."""
        return _checked(self, {key: value for key, value in given.items() if value is not None}, "the options")

    @property
    def num_tokens(self) -> int:
        """Calibration tokens in all."""
        return self.tokens or TOKENS[self.refine]

    @property
    def resolved(self) -> dict[str, Any]:
        """All values, for the provenance file."""
        return asdict(self) | {"tokens": self.num_tokens}


def load_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file; `RecipeError` if it cannot be read or says something unknown."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            "the recipe cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            remedy=f"give the path of a .toml file, or one of: {', '.join(list_recipes()) or '(none)'}",
        ) from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise RecipeError(
            "the recipe is not valid TOML",
            where=str(path),
            why=str(error),
            remedy="correct the file; strings need quotes, one `key = value` a line",
        ) from error
    return _checked(Recipe(), values, str(path))


def find_recipe(name: str) -> Path | None:
    """The file of an installed recipe, by its name without .toml."""
    return _installed().get(name)


def list_recipes() -> list[str]:
    return sorted(_installed())


def _installed() -> dict[str, Path]:
    try:
        folders = [resources.files("transmla.recipes")]
    except ModuleNotFoundError:
        folders = [Path(__file__).parent.parent / "recipes"]  # a source checkout that is not installed
    return {
        Path(entry.name).stem: Path(str(entry))
        for folder in folders
        if folder.is_dir()
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    }


def _checked(recipe: Recipe, values: dict[str, Any], where: str) -> Recipe:
    known = [field.name for field in fields(Recipe)]
    hints = get_type_hints(Recipe)
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise RecipeError(
                f"unknown recipe key {key!r}",
                where=where,
                why="a misspelt key would silently leave a default in place",
                remedy=(f"did you mean {near[0]!r}? " if near else "") + f"known keys: {', '.join(known)}",
            )
        values[key] = _typed(key, value, hints[key], where)
    return replace(recipe, **values)


def _typed(key: str, value: Any, hint: Any, where: str) -> Any:
    allowed = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if type(value) is int and float in allowed:  # `type is`, because True is an int
        value = float(value)
    if type(value) not in allowed:
        given = "a boolean" if type(value) is bool else _WORDS.get(type(value), f"a {type(value).__name__}")
        wanted = " or ".join(_WORDS[kind] for kind in allowed)
        raise _bad_value(key, value, where, f"{key} is {wanted}, not {given}")
    if key == "theta" and isinstance(value, str) and value != "auto":
        raise _bad_value(key, value, where, 'theta is a number or "auto"')
    if key == "refine" and value not in REFINE_LEVELS:
        raise _bad_value(key, value, where, f"refine is one of {', '.join(REFINE_LEVELS)}")
    if key == "latent" and isinstance(value, str) and value != "auto":
        raise _bad_value(key, value, where, 'latent is an integer or "auto"')
    if key == "dtype" and value not in DTYPES:
        raise _bad_value(key, value, where, f"dtype is one of {', '.join(DTYPES)}")
    if key == "sampled" and value < 0:
        raise _bad_value(key, value, where, "sampled is a number of tokens")
    # latent and rope are judged by geometry.py, which can name the nearest possible size
    if key in ("theta", "tokens", "window", "budget") and not isinstance(value, str) and not 0 < value < float("inf"):
        raise _bad_value(key, value, where, f"{key} must be positive")
    return value


def _bad_value(key: str, value: Any, where: str, why: str) -> RecipeError:
    return RecipeError(
        f"recipe key {key!r} cannot be {value!r}",
        where=where,
        why=why,
        remedy=f"change the value of {key}, or leave the key out to get the default",
    )
