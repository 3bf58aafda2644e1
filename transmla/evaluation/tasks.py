"""Tasks of lm-eval on a model that is loaded already, document by document, so that two models can be compared in
pairs; and needles in haystacks (RULER), which lm-eval has, too."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transmla.errors import DataError
from transmla.evaluation.perplexity import standard_error
from transmla.extras import needs

NEEDLE = "niah_single_1"
# what RULER's tasks want to be told, and is not used: they get the tokenizer that is loaded
TOKENIZER = {"tokenizer": "the model's own"}


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    metric: as lm-eval calls it, with the filter of the answers where it has one: "exact_match,strict-match"
    values: of each document, in lm-eval's order; empty where a metric has none
    group:  a group of tasks with a row of its own that this one is a part of; "" if there is none
    value and standard_error are lm-eval's own.
    """

    task: str
    metric: str
    value: float
    standard_error: float
    higher_is_better: bool
    values: tuple[float, ...]
    group: str = ""


@dataclass(frozen=True)
class Recovery:
    """A task of a model beside its source: value over value (below 1 is worse for every metric), and the difference.

    standard_error: of the paired difference over documents, NaN for a metric that is not a mean over documents
    """

    task: str
    metric: str
    recovery: float
    difference: float
    standard_error: float


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: list[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    batch: int | str = "auto",
    max_length: int | None = None,
    metadata: dict[str, Any] | None = None,
) -> list[TaskResult]:
    """Every metric of every named task; groups of tasks are given as their members.

    include_path: folder of further task files;  limit: first documents of each task
    batch: sequences at once; "auto": found by lm-eval on GPUs, 8 elsewhere
    Raises `DataError` for an unknown task and for data that cannot be had.
    """
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(include_path, TOKENIZER | (metadata or {}))
    _check(names, manager.all_tasks)
    if batch == "auto" and model.device.type == "cpu":
        batch = 8

    class Silent(HFLM):  # type: ignore[misc]
        """Without bars: `progress` says which task it is."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    adapter = Silent(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=max_length)
    try:
        # it prints the sizes of batches that it tries
        with _without_git(), _with_tokenizer(tokenizer), redirect_stdout(sys.stderr):
            found = simple_evaluate(
                adapter, tasks=names, limit=limit, task_manager=manager, log_samples=True, bootstrap_iters=1000
            )
    except (ImportError, OSError, DatasetsError) as error:
        raise _no_data(names, error) from error
    return _results(found)


def check_tasks(names: Sequence[str], include_path: str | None) -> dict[str, DataError]:
    """Tasks whose data cannot be had, and why, before anything is measured; raises `DataError` for a name that lm-eval
    does not know.

    Tasks that build their texts with the tokenizer (RULER) pass: what else they lack is found when they run.
    """
    needs("eval", "--tasks")
    manager = _manager(include_path, TOKENIZER)
    _check(names, manager.all_tasks)
    missing = {}
    for name in names:
        try:
            with _with_tokenizer(None):
                manager.load(name)
        except _NotLoadedError:
            continue
        except Exception as error:  # a file that is damaged, a data set of another form: each has an error of its own
            missing[name] = _no_data([name], error)
    return missing


class _NotLoadedError(Exception):
    """A task builds its texts with the tokenizer, which is not there before the model is loaded."""


def _manager(include_path: str | None, metadata: dict[str, Any]) -> Any:
    """lm-eval's index of tasks. It reads fourteen thousand files for it, so one is kept until a task file changes."""
    files = sorted(file for file in Path(include_path).rglob("*") if file.is_file()) if include_path else []
    changed = tuple((str(file), file.stat().st_mtime_ns) for file in files)
    return _indexed(include_path, json.dumps(metadata), changed)


@functools.lru_cache(maxsize=8)
def _indexed(include_path: str | None, metadata: str, changed: tuple[tuple[str, int], ...]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, metadata=json.loads(metadata))


def _no_data(names: Sequence[str], error: Exception) -> DataError:
    remedy = "give local task files with --include-path"
    if isinstance(error, ImportError):
        remedy = "install what it names (for RULER's tasks pip install 'transmla[needles]')"
    return DataError(
        "the data of a task cannot be read",
        where=", ".join(names),
        why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
        remedy=f"{remedy}, or leave the task out",
    )


@contextmanager
def _without_git() -> Iterator[None]:
    """lm-eval asks git for the commit of the working directory, and git complains where there is none."""
    from lm_eval import evaluator

    asked = getattr(evaluator, "get_git_commit_hash", None)
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


@contextmanager
def _with_tokenizer(tokenizer: Any) -> Iterator[None]:
    """RULER's tasks build their texts with a tokenizer that they load by name, and would run the code in its folder.

    tokenizer: to use in its place; None: `_NotLoadedError`
    """
    from lm_eval.tasks.ruler import common_utils as ruler

    class Loaded:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> Any:
            if tokenizer is None:
                raise _NotLoadedError
            return tokenizer

    loader = ruler.AutoTokenizer
    ruler.get_tokenizer.cache_clear()
    ruler.AutoTokenizer = Loaded
    try:
        yield
    finally:
        ruler.AutoTokenizer = loader
        ruler.get_tokenizer.cache_clear()


def _check(names: Sequence[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise _no_task(name, known)


def _results(found: dict[str, Any]) -> list[TaskResult]:
    results, groups = [], _groups(found)
    for task, row in found["results"].items():
        samples = found.get("samples", {}).get(task, [])
        better = found.get("higher_is_better", {}).get(task, {})
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{kind}")
            # of answers that are read in several ways, each is a metric of its own
            values = [sample.get(metric) for sample in samples if sample.get("filter", kind) == kind]
            scalar = all(isinstance(one, int | float) for one in values)
            results.append(
                TaskResult(
                    task=task,
                    metric=metric if kind == "none" else f"{metric},{kind}",
                    value=float(value),
                    standard_error=float(error) if isinstance(error, int | float) else math.nan,
                    higher_is_better=better.get(metric) is not False,
                    values=tuple(float(one) for one in values) if scalar else (),
                    group=groups.get(task, ""),
                )
            )
    return results


def _groups(found: dict[str, Any]) -> dict[str, str]:
    """Task -> a group with a result of its own that has it, or that has a group which has it."""
    parts: dict[str, list[str]] = found.get("group_subtasks") or {}
    groups: dict[str, str] = {}

    def walk(group: str, above: str) -> None:
        for part in parts.get(group, []):
            if above:
                groups.setdefault(part, above)
            walk(part, above or (part if _has_result(found, part) else ""))

    for group in parts:
        walk(group, group if _has_result(found, group) else "")
    return groups


def _has_result(found: dict[str, Any], task: str) -> bool:
    row = found["results"].get(task, {})
    return any("," in key and isinstance(value, int | float) for key, value in row.items())


def recoveries(model: list[TaskResult], source: list[TaskResult]) -> list[Recovery]:
    """One per metric that both have."""
    by_key = {(result.task, result.metric): result for result in source}
    found = []
    for own in model:
        base = by_key.get((own.task, own.metric))
        if base is None:
            continue
        share = _share(own, base)
        error = math.nan
        if _is_mean(own) and _is_mean(base) and len(own.values) == len(base.values):
            error = standard_error(tuple(a - b for a, b in zip(own.values, base.values, strict=True)))
        found.append(Recovery(own.task, own.metric, share, own.value - base.value, error))
    return found


def _is_mean(result: TaskResult) -> bool:
    """Whether the value is the mean of those of the documents; a perplexity, for one, is not."""
    mean = sum(result.values) / max(1, len(result.values))
    return bool(result.values) and math.isclose(mean, result.value, rel_tol=1e-6, abs_tol=1e-9)


def _share(own: TaskResult, base: TaskResult) -> float:
    above, below = (own.value, base.value) if own.higher_is_better else (base.value, own.value)
    return above / below if below else math.nan


def needles(model: Any, tokenizer: Any, name: str, lengths: list[int], samples: int) -> dict[int, tuple[float, float]]:
    """Share of RULER needles found and its standard error, by context length.

    tokenizer, name: lm-eval builds the haystacks with it, and wants a name. Needs wonderwords and nltk.
    """
    # one after the other: lm-eval's documents are 500 of the first length, then 500 of the next
    return {length: _needles_at(length, model, tokenizer, name, samples) for length in lengths}


def _needles_at(length: int, model: Any, tokenizer: Any, name: str, samples: int) -> tuple[float, float]:
    results = run_tasks(
        model,
        tokenizer,
        [NEEDLE],
        limit=samples,
        batch=1,
        max_length=length + 256,
        metadata={"max_seq_lengths": [length], "tokenizer": name},
    )
    # of other lengths it says -1
    (share,) = (result.value for result in results if result.metric == str(length))
    return share, math.sqrt(share * (1 - share) / samples)


def _no_task(name: str, known: list[str]) -> DataError:
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return DataError(
        f"no task {name!r}",
        where="--tasks",
        why=f"lm-eval knows {len(known):,} tasks, and this is none of them",
        remedy=f"did you mean {', '.join(near)}?"
        if near
        else "`lm_eval ls tasks` lists them; --include-path adds yours",
    )
