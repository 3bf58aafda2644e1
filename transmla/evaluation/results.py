"""Files of `transmla eval --json` and `transmla bench --json`: read, checked, turned into rows for tables and plots."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transmla.errors import DataError
from transmla.evaluation.perplexity import Perplexity, ratio
from transmla.extras import needs

# raised when a reader of older files would misread them; results.schema.json says what a file holds
FORMAT = 1


@dataclass(frozen=True)
class Result:
    """name: of the file, without its ending, and with its folder where several files have the name
    content: see results.schema.json, of `bench` bench.schema.json"""

    name: str
    content: dict[str, Any]


@dataclass(frozen=True)
class FrontierRow:
    """One cache: bytes per token over all layers, perplexity, and the ratio to the source on the same windows.

    group: "source", "source, quantised", "converted", "converted, quantised" or "published"
    source: name of the model that the ratio is to; nothing where all rows have the same
    """

    name: str
    group: str
    source: str
    bytes_per_token: float
    perplexity: float
    perplexity_error: float
    ratio: float
    ratio_error: float


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Result files; `DataError` for anything else."""
    return _told_apart([(path, _checked(path, _content(path), "results")) for path in paths])


def read_results_and_timings(paths: Iterable[Path]) -> tuple[list[Result], list[Result]]:
    """Files of `eval` and of `bench`; `DataError` for anything else."""
    results, timings = [], []
    for path in paths:
        content = _content(path)
        if isinstance(content, dict) and "rows" in content:
            timings.append((path, _checked(path, content, "bench")))
        else:
            results.append((path, _checked(path, content, "results")))
    return _told_apart(results), _told_apart(timings)


def _told_apart(found: list[tuple[Path, Result]]) -> list[Result]:
    """The results; those of files of one name are called by their folders as well, or by all of the path."""
    results = [result for _, result in found]
    names = ([path.resolve().parent.name + "/" + path.stem for path, _ in found], [str(path) for path, _ in found])
    for longer in names:
        taken = Counter(result.name for result in results)
        results = [
            result if taken[result.name] == 1 else replace(result, name=name)
            for result, name in zip(results, longer, strict=True)
        ]
    return results


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_result(path, str(error)) from error


def _checked(path: Path, content: Any, schema: str) -> Result:
    if find_spec("jsonschema") is None:  # [eval] brings it as well
        needs("report", "reading result files")
    import jsonschema

    wanted = json.loads((resources.files("transmla.evaluation") / f"{schema}.schema.json").read_text("utf-8"))
    try:
        jsonschema.validate(content, wanted)
    except jsonschema.ValidationError as error:
        raise _no_result(path, f"{error.json_path}: {error.message[:200]}") from error
    return Result(path.stem, content)


def perplexity_of(model: dict[str, Any], text: str) -> Perplexity:
    """Of the plain values of a model."""
    found = model["texts"][text]
    return Perplexity(tuple(found["nats"]), found["num_tokens"])


def read_published(path: str | Path | None) -> list[dict[str, Any]]:
    """Rows of other methods, with name, bytes_per_token and ratio; `DataError` for anything else, nothing for None."""
    if path is None:
        return []
    try:
        rows = json.loads(Path(path).read_text("utf-8"))
        return [
            {"name": str(row["name"]), **{key: float(row[key]) for key in ("bytes_per_token", "ratio")}} for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "the published rows cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            remedy="write a JSON list of objects with name, bytes_per_token and ratio",
        ) from error


def frontier_rows(results: list[Result], published: Iterable[dict[str, Any]] = ()) -> list[FrontierRow]:
    """Every cache that was measured on the first text, largest first; each source once, by name if several.

    published: rows of other methods with name, bytes_per_token and ratio
    """
    rows: dict[tuple[str, str, str], FrontierRow] = {}
    compared_with = {result.content["source"]["name"] for result in results if result.content["source"]}
    for result in results:
        source = result.content["source"]
        if source is None:
            continue
        of = source["name"] if len(compared_with) > 1 else ""
        text = next(iter(result.content["model"]["texts"]))
        base = perplexity_of(source, text)
        for one, name, group in (
            (source, of or "source", "source"),
            (result.content["model"], result.name, "converted"),
        ):
            found = [(f"{name}, as stored", group, one["cache_bytes_per_token"], perplexity_of(one, text))]
            for row in filter(None, one.get("quantised", [])):
                nats = Perplexity(tuple(row["nats"]), 0)
                label = row.get("cache", f"{row['bits']:g} bits, simulated")
                found.append((f"{name}, {label}", f"{group}, quantised", row["bytes_per_token"], nats))
            for label, kind, size, nats in found:
                compared = ratio(nats, base)
                shown = f"{label} ({of})" if of and group == "converted" else label
                rows[of, group, label] = FrontierRow(
                    shown, kind, of, size, nats.value, nats.standard_error, compared.value, compared.standard_error
                )
    source_value = math.nan  # of several there is none that a published ratio could be of
    if len(compared_with) == 1:
        source_value = next(row.perplexity for row in rows.values() if row.group == "source")
    for entry in published:
        value = entry["ratio"] * source_value
        rows["", "published", entry["name"]] = FrontierRow(
            entry["name"], "published", "", entry["bytes_per_token"], value, math.nan, entry["ratio"], math.nan
        )
    return sorted(rows.values(), key=lambda row: -row.bytes_per_token)


def frontier_table(rows: list[FrontierRow]) -> str:
    """Markdown."""
    lines = ["| cache | bytes per token | perplexity | times the source |", "|---|---:|---:|---:|"]
    for row in rows:
        error, spread = (
            f" ± {value:.{digits}f}" if value > 0 else ""
            for value, digits in ((row.perplexity_error, 2), (row.ratio_error, 4))
        )
        value = "-" if math.isnan(row.perplexity) else f"{row.perplexity:.2f}"
        lines.append(f"| {row.name} | {row.bytes_per_token:,.0f} | {value}{error} | {row.ratio:.4f}{spread} |")
    return "\n".join(lines) + "\n"


def _no_result(path: Path, why: str) -> DataError:
    return DataError(
        "this is not a result file",
        where=str(path),
        why=why,
        remedy="pass files that `transmla eval --json` has written, and for `transmla report` those of bench, too",
    )
