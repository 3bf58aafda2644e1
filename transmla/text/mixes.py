"""Mixes of texts: "A:3+B" is three tokens of A for one of B."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from transmla.checkpoint.resolve import local
from transmla.errors import DataError

# sampled from the source model itself
SELF = "self"


@dataclass(frozen=True)
class Part:
    """One text of a mix and how often it is drawn from."""

    name: str
    weight: float = 1.0


def names_of(text: str) -> list[str]:
    """ "A+B" -> A, B; a file, with a weight or without, may have a plus in its path."""
    words, found = text.split("+") if text else [], []
    while words:
        joined = ("+".join(words[:count]) for count in range(len(words), 1, -1))
        name = next((name for name in joined if _is_file(name) or _is_file(_weighted(name)[0])), words[0])
        found.append(name)
        words = words[name.count("+") + 1 :]
    return found


def parse_mix(text: str, where: str) -> tuple[Part, ...]:
    """ "A:3+B" -> parts; a weight is what stands behind the last colon, if that is a number; a dataset whose
    configuration is a number needs one: OWNER/NAME:2023:1.

    where: the option that it was given to, for the `DataError` about what is not a mix
    """
    parts = [Part(word) if _is_file(word) else Part(*_weighted(word)) for word in names_of(text) or [text]]
    if any(not 0 < part.weight < float("inf") or not part.name for part in parts):
        raise DataError(
            f"{text!r} is not a mix of texts",
            where=where,
            why="every part has a name and a positive weight",
            remedy="write A+B or A:3+B:1",
        )
    return tuple(parts)


def needs_source(mix: str, sampled: int) -> bool:
    """Whether the source itself has to write calibration text, for which all of it is in memory."""
    return sampled > 0 or any(part.name == SELF for part in parse_mix(mix, "--calibration"))


def _is_file(name: str) -> bool:
    path = local(name)
    return path is not None and path.is_file()


def _weighted(word: str) -> tuple[str, float]:
    """ "A:3" -> A, 3; "A" -> A, 1"""
    name, colon, weight = word.rpartition(":")
    with contextlib.suppress(ValueError):
        if colon:
            return name, float(weight)
    return word, 1.0
