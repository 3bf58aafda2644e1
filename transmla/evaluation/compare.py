"""A model beside its source: ratios with the errors of paired differences, recoveries, and the gates on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transmla.checkpoint.provenance import portable_name
from transmla.evaluation import generation
from transmla.evaluation.measure import Skipped
from transmla.evaluation.perplexity import ratio
from transmla.evaluation.results import perplexity_of
from transmla.evaluation.suite import Suite
from transmla.evaluation.tasks import TaskResult, recoveries


@dataclass(frozen=True)
class Gate:
    """A recovery that had to be reached: of perplexity on a text, of a task, of needles at a context, of what does not
    loop in greedy text."""

    name: str
    wanted: float
    found: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.found >= self.wanted


def comparison(
    model: dict[str, Any],
    source: dict[str, Any],
    agreed: dict[str, dict[str, float]] | None = None,
    accepted: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Ratios of the perplexities with the errors of the paired differences, recoveries of the tasks, and the texts.

    model, source: what `measure` returned for them;  agreed: what was found of the agreement of their predictions
    accepted:      likewise, of the model's tokens that the source accepts
    """
    ratios = {}
    for text in model["texts"]:
        if text in source["texts"]:
            found = ratio(perplexity_of(model, text), perplexity_of(source, text))
            ratios[text] = {"ratio": found.value, "standard_error": found.standard_error}
    compared: dict[str, Any] = {"texts": ratios}
    if agreed is not None:
        compared["agreement"] = agreed
    if model.get("generation") and source.get("generation"):
        compared["generation"] = generation.compared(model["generation"], source["generation"])
    if accepted is not None:
        compared["acceptance"] = accepted
    if "tasks" in model and "tasks" in source:
        own, base = ([_result_of(row) for row in one["tasks"]] for one in (model, source))
        compared["tasks"] = [asdict(row) for row in recoveries(own, base)]
    return compared


def judged(
    suite: Suite, model: dict[str, Any], source: dict[str, Any] | None, skipped: Sequence[Skipped]
) -> tuple[Gate, ...]:
    """Every recovery that the suite has a gate for, of a task by its first metric.

    What was not measured, of the model or of the source, is NaN, which does not pass.
    """
    if source is None:
        return ()
    compared = comparison(model, source)
    texts, called = (*suite.texts, *(text for text in model["texts"] if text not in suite.texts)), {}
    for text in texts:
        name = Path(text).name
        called[text] = name if [Path(other).name for other in texts].count(name) == 1 else portable_name(text)
    ratios = {text: one["ratio"] for text, one in compared["texts"].items()}
    tasks = {row["task"]: row["recovery"] for row in reversed(compared.get("tasks", []))}
    # of a group of tasks those that it has, unless it has a result of its own: that of many small parts is noise
    asked = [row["task"] for row in model.get("tasks", []) if not row.get("group")] or list(suite.tasks)
    asked += [one.part.removeprefix("task ") for one in skipped if one.part.startswith("task ")]
    recovered: dict[str, list[tuple[str, float]]] = {
        "perplexity": [(called[text], 1 / ratios[text] if text in ratios else math.nan) for text in texts],
        "tasks": [(task, tasks.get(task, math.nan)) for task in dict.fromkeys(asked)],
        "needles": [],
        "loops": [],
    }
    if "generation" in compared:
        repeated = compared["generation"]["greedy"]["repeated_4"]
        fresh = 1 - repeated["source"]
        recovered["loops"].append(("", (1 - repeated["model"]) / fresh if fresh else math.nan))
    for size in dict.fromkeys([*(model.get("needles") or {}), *map(str, suite.needles)]):
        own, base = (((one.get("needles") or {}).get(size) or {}).get("found") for one in (model, source))
        recovered["needles"].append((size, own / base if own is not None and base else math.nan))
    return tuple(
        Gate(f"{kind} {name}".strip(), wanted, value)
        for kind, wanted in suite.gates.items()
        for name, value in recovered[kind] or [("", math.nan)]
    )


def _result_of(row: dict[str, Any]) -> TaskResult:
    return TaskResult(**row | {"values": tuple(row["values"])})
