"""How long conversions take: what was measured, and what follows from it for more layers and other sizes.

benchmarks/results/times.json is the one place for measured times. `whole` has conversions from disk to disk; `layers`
has those of a few layers of a recipe's shape, with seconds by stage: `spent` of the stage convert-8b of the campaign in
benchmarks/gpu, and of benchmarks/wide.py. Times of all layers follow from these, and those of other shapes, which are
called projected. Where a machine has converted no layer of a large shape, a whole conversion stands in: by values of
weights times tokens, which is what products cost; a small model keeps a GPU less busy than a large one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))

from plan import extrapolated

TIMES = ROOT / "benchmarks" / "results" / "times.json"


def read_times() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TIMES.read_text("utf-8"))
    return found


def time_of(
    recipe: str, works: Mapping[str, float], layers: Mapping[str, int], times: Mapping[str, Sequence[Any]]
) -> str:
    """What a table says of a recipe's time: measured on each machine where it was, else projected, else not measured.

    works:  recipe -> values of a layer times calibration tokens, which is what a layer costs
    layers: recipe -> how many it has;  times: from `read_times`
    """
    said = {one["machine"]: (words(one["seconds"]), "") for one in times["whole"] if one["recipe"] == recipe}
    # its own shape before others
    for one in sorted(times["layers"], key=lambda one: one["recipe"] != recipe):
        as_many = layers[recipe] * works[recipe] / works[one["recipe"]]
        seconds = sum(extrapolated(one["spent"], one["layers"], as_many).values())
        shape = "" if one["recipe"] == recipe else f" of {one['recipe']}"
        said.setdefault(one["machine"], (words(seconds), f"{one['layers']} layers{shape}"))
    for one in times["whole"]:
        times_more = layers[recipe] * works[recipe] / (layers[one["recipe"]] * works[one["recipe"]])
        said.setdefault(one["machine"], (words(one["seconds"] * times_more), one["recipe"]))
    by_origin: dict[str, list[str]] = {}
    for machine, (time, origin) in said.items():
        by_origin.setdefault(origin, []).append(f"{time} ({machine})")
    phrases = [
        f"about {', '.join(found)} projected from {origin}" if origin else ", ".join(found)
        for origin, found in by_origin.items()
    ]
    return "; ".join(phrases) or "not measured"


def words(seconds: float) -> str:
    """56 s, 10 min, 2.5 h, 6 days"""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    if hours < 48:
        return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"
    return f"{hours / 24:.0f} days"
