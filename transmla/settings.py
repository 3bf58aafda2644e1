"""Settings in TOML: found by name, read, and checked against the fields of a dataclass. For recipes and suites.

Every error is a `RecipeError`. kind: what the file is, for messages: "recipe" or "suite".
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from transmla.errors import RecipeError

# any dataclass
Settings = TypeVar("Settings")

# types of values: as a key may have them, and as a value is one of them
_EXPECTED = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_ACTUAL = _EXPECTED | {bool: "a boolean", tuple: "a list", dict: "a table"}
_PLURAL = {str: "strings", int: "integers", float: "numbers"}


def installed(package: str, checkout: str) -> dict[str, Path]:
    """Name without .toml -> file, of every TOML file in a package.

    checkout: the same folder in a work tree that is not installed, seen from its root
    """
    try:
        folder = resources.files(package)
    except ModuleNotFoundError:
        folder = Path(__file__).parents[1] / checkout
    if not folder.is_dir():
        return {}
    files = {Path(entry.name).stem: Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".toml")}
    return dict(sorted(files.items()))


def read_toml(path: Path, kind: str, known: Iterable[str]) -> dict[str, Any]:
    """The content of a TOML file; `RecipeError` if it cannot be read.

    known: names of installed files of this kind, which the message offers
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"the {kind} cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            remedy=f"give the path of a .toml file, or one of: {', '.join(known) or '(none)'}",
        ) from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise RecipeError(
            f"the {kind} is not valid TOML",
            where=str(path),
            why=str(error),
            remedy="correct the file; strings need quotes, one `key = value` a line",
        ) from error


def replaced(
    settings: Settings,
    values: Mapping[str, Any],
    *,
    kind: str,
    where: str,
    words: Mapping[str, tuple[str, ...]] | None = None,
    objection: Callable[[str, Any], str | None] | None = None,
    tables: tuple[str, ...] = (),
) -> Settings:
    """A copy of a dataclass with these values; `RecipeError` for an unknown key or a value that its field cannot have.

    Fields that are dataclasses themselves are not keys: each is a table, to be read on its own.
    words:     the words that a key takes, where it does not take every string
    objection: of a key and a value of the right type, why it cannot be, or None
    tables:    names of tables that are read on their own, for the error about another one
    """
    record: Any = settings
    hints = get_type_hints(type(settings))
    known = [field.name for field in fields(record) if not is_dataclass(hints[field.name])]
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            # a table is meant as a table
            meant = tables if isinstance(value, Mapping) else known
            near = difflib.get_close_matches(key, meant, n=1, cutoff=0.5)
            raise RecipeError(
                f"unknown {kind} key {key!r}",
                where=where,
                why="a misspelt key would silently leave a default in place",
                remedy=(f"did you mean {near[0]!r}? " if near else "")
                + (f"known keys: {', '.join(known)}" + (f"; known tables: {', '.join(tables)}" if tables else "")),
            )
        types = _types(hints[key])
        value = _converted(value, types)
        why = _type_objection(key, value, types) or _word_objection(key, value, types, (words or {}).get(key))
        if why is None and objection is not None:
            why = objection(key, value)
        if why is not None:
            raise bad_value(key, value, kind=kind, where=where, why=why)
        checked[key] = value
    changed: Settings = replace(record, **checked)
    return changed


def bad_value(key: str, value: Any, *, kind: str, where: str, why: str) -> RecipeError:
    """The error for a key whose value cannot be."""
    return RecipeError(
        f"{kind} key {key!r} cannot be {value!r}",
        where=where,
        why=why,
        remedy=f"change the value of {key}, or leave the key out to get the default",
    )


def _types(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have, apart from None."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(kind for kind in alternatives if kind is not NoneType)


def _converted(value: Any, types: tuple[Any, ...]) -> Any:
    """The value as the field holds it: lists as tuples, and integers as floats where a number is meant."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, tuple) and any(get_args(kind)[:1] == (float,) for kind in types):
        return tuple(_converted(entry, (float,)) for entry in value)
    if isinstance(value, dict) and any(get_args(kind)[1:] == (float,) for kind in types):
        return {name: _converted(entry, (float,)) for name, entry in value.items()}
    return float(value) if type(value) is int and float in types else value  # `type is`, because True is an int


def _type_objection(key: str, value: Any, types: tuple[Any, ...]) -> str | None:
    if any(_fits(value, kind) for kind in types):
        return None
    expected = " or ".join(_described(kind) for kind in types)
    actual = _ACTUAL.get(type(value), f"a {type(value).__name__}")
    if any(get_origin(kind) is type(value) for kind in types):  # a list or a table, but not of these
        return f"{key} is {expected}"
    return f"{key} is {expected}, not {actual}"


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return type(value) is tuple and all(type(entry) is get_args(kind)[0] for entry in value)
    if get_origin(kind) is dict:
        return type(value) is dict and all(type(entry) is get_args(kind)[1] for entry in value.values())
    return type(value) is kind


def _described(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {_PLURAL[get_args(kind)[0]]}"
    if get_origin(kind) is dict:
        return f"a table of {_PLURAL[get_args(kind)[1]]}"
    return _EXPECTED[kind]


def _word_objection(key: str, value: Any, types: tuple[Any, ...], words: tuple[str, ...] | None) -> str | None:
    if words is None or not isinstance(value, str) or value in words:
        return None
    others = [_described(kind) for kind in types if kind is not str]
    if others:
        return f'{key} is {" or ".join(others)} or "{", ".join(words)}"'
    return f"{key} is one of {', '.join(words)}"
