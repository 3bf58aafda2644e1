"""What `transmla eval` measures: a suite in TOML, each key overridable by an option."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from transmla.errors import RecipeError


@dataclass(frozen=True)
class Suite:
    """One evaluation. Whatever is empty, false or zero is left out.

    texts:     files, dataset ids, shipped texts; windows of `length` tokens each, the first `windows` of a text
    agreement: KL and agreement of the first choice with the source, on the first text
    quantised: bits of rounded caches that are measured beside the model's own, of source and model, on the first text
    positions: windows over the whole context, for perplexity by position, on the first text
    tasks:     of lm-eval;  limit: documents of each, 0 for all;  include_path: folder of more task files
    needles:   context lengths of RULER's needle test;  samples: needles per length
    smoke:     greedy continuations of a few prompts
    gates:     smallest recovery that passes: "perplexity" on every text, "tasks" and "needles" each
    """

    texts: tuple[str, ...] = ("wikitext-valid",)
    windows: int = 16
    length: int = 0
    agreement: bool = False
    quantised: tuple[int, ...] = ()
    positions: int = 0
    tasks: tuple[str, ...] = ()
    limit: int = 0
    include_path: str = ""
    needles: tuple[int, ...] = ()
    samples: int = 20
    smoke: bool = False
    gates: dict[str, float] = field(default_factory=dict)

    def with_overrides(self, **given: Any) -> Suite:
        """A copy with the values that are not None, checked like those of a file."""
        return _checked(self, {key: value for key, value in given.items() if value is not None}, "the options")

    def plain(self) -> dict[str, Any]:
        """All values, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


GATES = ("perplexity", "tasks", "needles")


def load_suite(name: str) -> Suite:
    """The suite of an installed name or of a TOML file; `RecipeError` if there is none or it says something unknown."""
    path = _installed().get(name, Path(name))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"no suite {name!r}",
            where=name,
            why=error.strerror or str(error),
            remedy=f"give a .toml file, or one of: {', '.join(list_suites())}",
        ) from error
    except ValueError as error:
        raise RecipeError(
            "the suite is not valid TOML", where=str(path), why=str(error), remedy="correct it"
        ) from error
    return _checked(Suite(), values, str(path))


def list_suites() -> list[str]:
    """Names of the installed suites."""
    return sorted(_installed())


def _installed() -> dict[str, Path]:
    try:
        folder = Path(str(resources.files("transmla.suites")))
    except ModuleNotFoundError:
        folder = Path(__file__).parents[2] / "eval" / "suites"  # a source checkout that is not installed
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _checked(suite: Suite, values: dict[str, Any], where: str) -> Suite:
    defaults = Suite()
    known = [entry.name for entry in fields(Suite)]
    made: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            remedy = (f"did you mean {near[0]!r}? " if near else "") + f"known keys: {', '.join(known)}"
            raise RecipeError(f"unknown suite key {key!r}", where=where, why="nobody would read it", remedy=remedy)
        default = getattr(defaults, key)
        value = tuple(value) if isinstance(value, list) else value
        if type(value) is not type(default):
            raise _bad(key, value, where, f"it has to be a {type(default).__name__}")
        made[key] = value
    for gate, share in made.get("gates", {}).items():
        if gate not in GATES or not isinstance(share, int | float) or not 0 < share <= 2:
            raise _bad(f"gates.{gate}", share, where, f"gates are {', '.join(GATES)}, each a share like 0.95")
    if any(bits not in (2, 3, 4, 8) for bits in made.get("quantised", ())):
        raise _bad("quantised", made["quantised"], where, "bits are 2, 3, 4 or 8")
    if made.get("windows", 1) < 1 or not made.get("texts", ("",)):
        raise _bad("windows, texts", "nothing", where, "perplexity needs one text and one window at least")
    return replace(suite, **made)


def _bad(key: str, value: Any, where: str, why: str) -> RecipeError:
    return RecipeError(f"suite key {key!r} cannot be {value!r}", where=where, why=why, remedy=f"change {key}")
