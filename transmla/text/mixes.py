"""Mixes of texts: "A:3+B" is three tokens of A for one of B."""

from __future__ import annotations

import os
from dataclasses import dataclass

from transmla.errors import DataError

# sampled from the source model itself
SELF = "self"


@dataclass(frozen=True)
class Part:
    """One text of a mix and how often it is drawn from."""

    name: str
    weight: float = 1.0


def names_of(text: str) -> list[str]:
    """ "A+B" -> A, B; a file may have a plus in its path."""
    if not text:
        return []
    return [text] if os.path.isfile(os.path.expanduser(text)) else text.split("+")


def parse_mix(text: str, where: str) -> tuple[Part, ...]:
    """ "A:3+B" -> parts; a weight is what stands behind the last colon, if that is a number; a dataset whose
    configuration is a number needs one: OWNER/NAME:2023:1.

    where: the option that it was given to, for the `DataError` about what is not a mix
    """
    parts = []
    for word in names_of(text) or [text]:
        name, colon, weight = word.rpartition(":")
        parts.append(Part(name, float(weight)) if colon and _is_number(weight) else Part(word))
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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
