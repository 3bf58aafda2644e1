"""`transmla eval`: a model and its source on the same windows, tasks and caches, with error bars and gates."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from transmla.checkpoint.provenance import (
    commit,
    computing_versions,
    portable,
    portable_name,
    read_provenance,
    versions,
)
from transmla.checkpoint.read import open_source
from transmla.checkpoint.resolve import local
from transmla.devices import named, usable
from transmla.errors import RecipeError
from transmla.evaluation.agreement import Predictions, agreement, predictions
from transmla.evaluation.compare import Gate, comparison, judged
from transmla.evaluation.generation import WAYS, Prompt, acceptance, predictions_for
from transmla.evaluation.measure import (
    GENERATED,
    Kept,
    Skipped,
    Subject,
    begin_of,
    digests,
    identity,
    measure,
    window_length,
    windows_of,
)
from transmla.evaluation.perplexity import Perplexity, Ratio, ratio
from transmla.evaluation.quantised_cache import GRID_BITS
from transmla.evaluation.results import FORMAT, perplexity_of, read_results
from transmla.evaluation.suite import Suite, load_suite
from transmla.evaluation.tasks import check_tasks
from transmla.extras import needs
from transmla.geometry import CACHE_BITS
from transmla.model.loading import is_converted, load_tokenizer
from transmla.progress import Progress, silent
from transmla.recipe import Recipe
from transmla.tables import Shown


@dataclass(frozen=True)
class EvaluationReport(Shown):
    """What was measured, as plain values (see results.schema.json), and the comparison of the two models.

    source and comparison are None without `against`.
    """

    made: dict[str, Any]
    suite: dict[str, Any]
    model: dict[str, Any]
    source: dict[str, Any] | None
    comparison: dict[str, Any] | None
    gates: tuple[Gate, ...]
    skipped: tuple[Skipped, ...]

    @property
    def perplexity(self) -> Perplexity:
        """Of the model on the first text."""
        return perplexity_of(self.model, self.text)

    @property
    def ratio(self) -> Ratio | None:
        """To the source on the first text, with the error of the paired difference."""
        if self.source is None:
            return None
        return ratio(self.perplexity, perplexity_of(self.source, self.text))

    @property
    def text(self) -> str:
        """The first text, to which all but the texts themselves refers."""
        return next(iter(self.model["texts"]))

    def plain(self) -> dict[str, Any]:
        """For JSON; NaN becomes null, and an absolute path what says nothing of the machine."""
        gates = [asdict(gate) | {"passed": gate.passed} for gate in self.gates]
        content = {
            "format": FORMAT,
            "made": self.made,
            "suite": self.suite,
            "model": self.model,
            "source": self.source,
            "comparison": self.comparison,
            "gates": gates,
            "skipped": [asdict(one) for one in self.skipped],
        }
        found: dict[str, Any] = portable(_without_nan(content), keep=GENERATED)
        return found

    def show(self, console: Console) -> None:
        from transmla.evaluation.show import show_evaluation

        show_evaluation(self, console)


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    suite: str | None = None,
    text: str | Sequence[str] | None = None,
    windows: int | None = None,
    length: int | None = None,
    begin: bool | None = None,
    tasks: Sequence[str] | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    quantised: Sequence[float] | None = None,
    coded_source: bool | None = None,
    positions: int | None = None,
    needles: Sequence[int] | None = None,
    generation: int | None = None,
    gates: dict[str, float] | None = None,
    dtype: str = "bfloat16",
    device: str = "auto",
    progress: Progress | None = None,
    kept: str | Path | None = None,
    reuse: str | Path | None = None,
) -> EvaluationReport:
    """Measure a model, and its source in the same way.

    model:   converted folder, or anything that `transmla.convert` takes as a source
    against: the source, or any other model with the same tokenizer; None: the model alone (the command line then takes
             the source that the model's provenance names)
    suite:   "quick", "standard", "full" or a TOML file; without one, perplexity and cache bytes alone
    text:    files, dataset ids or shipped texts; default: those of the suite, else the text of the recipe the model was
             made with. The first token of a window is not scored
    windows: the first so many windows of a text;  length: tokens per window, at most the context of either model;
             default 1024, or the shorter of the two contexts
    begin:   put the begin token, of a tokenizer that adds one, in the place of each window's first token. Without it,
             windows are pieces of the text without special tokens, as in most published numbers
    tasks, include_path, limit, quantised, coded_source, positions, needles, generation, gates: see `Suite`; overrides
             of its values
    dtype:   to compute and cache in, "auto" for the stored one;  device: where
    kept:    file for finished parts, from which the same call resumes; to be removed when the report is safe
    reuse:   an earlier result file of the same source, suite, dtype and device: its source is not measured again
    Raises SourceError, DataError (the first text, unknown tasks), VerificationError (NaN), RecipeError (suite, gates on
    what is not measured, models or results of other tokens). What else cannot be measured is named in `skipped`. Gates
    are not enforced here: see `EvaluationReport.gates`.
    """
    wanted = _suite(
        suite, model,
        texts=(text,) if isinstance(text, str) else _tuple(text), windows=windows, length=length, begin=begin,
        tasks=_tuple(tasks), include_path=include_path, limit=limit, quantised=_tuple(quantised),
        coded_source=coded_source, positions=positions,
        needles=_tuple(needles), generation=generation, gates=gates,
    )  # fmt: skip
    if against is not None:
        _require_measured(wanted)
    if needles:  # asked for by name
        needs("eval", "--needles")
        needs("needles", "--needles")
    device = named(device)
    usable(device)
    tell = progress or silent
    skipped: list[Skipped] = []
    if wanted.tasks:
        missing = check_tasks(wanted.tasks, wanted.include_path or None)
        if missing and tasks:  # asked for by name
            raise next(iter(missing.values()))
        for task, error in missing.items():
            skipped.append(Skipped(str(model), f"task {task}", f"{error.what}: {error.why}"))
            tell(f"task {task}", 0, 1, f"left out: {error.why}")
        wanted = replace(wanted, tasks=tuple(task for task in wanted.tasks if task not in missing))
    models = [name for name in (model, against) if name is not None]
    # as it was asked for; from here on windows have a length that suits both
    length = window_length(wanted, *(models if reuse is None else models[:1]))
    asked, wanted = wanted, replace(wanted, length=length)
    settings: dict[str, Any] = {"suite": wanted.plain(), "dtype": dtype, "device": device}
    settings["versions"] = computing_versions()
    settings |= {identity(name): _files(name) for name in models}
    settings["tasks"] = _files(wanted.include_path, "rglob") if wanted.include_path else []
    if gates and against is None:
        raise RecipeError(
            "gates need a source",
            where="--gate",
            why="a gate is a recovery: a value over the source's",
            remedy="name the source with --against",
        )
    if wanted.coded_source and not wanted.quantised:
        raise RecipeError(
            "nothing says how many bits the coded cache of the source has",
            where="--coded-source",
            why="it is measured with the bits of --quantised",
            remedy="add them, as in --quantised 4,3,2",
        )
    if quantised and not wanted.coded_source and not any(bits in GRID_BITS for bits in quantised):
        prepared = [
            name for name in models if is_converted(Path(name)) and open_source(Path(name)).config.get("latent_code")
        ]
        if not prepared:
            raise RecipeError(
                "no cache has so many bits",
                where="--quantised",
                why=f"integers have {', '.join(map(str, GRID_BITS))} bits, and no folder here is prepared for others",
                remedy="add --coded-source for the source, and name a folder of `transmla quantise` for the model",
            )
    earlier = None
    if reuse is not None and against is not None:
        earlier = _reused(Path(reuse), str(against), asked, dtype, device, skipped)
    settings["texts"] = _same_tokens(models, wanted, earlier)
    store = Kept(Path(kept) if kept is not None else None, settings)
    if wanted.gates and against is None:
        skipped.append(Skipped(str(model), "gates", "there is no source to compare with (--against)"))
    source_found, source_predictions = None, None
    if against is not None:
        subject = Subject(str(against), dtype, device)
        source_found = earlier or measure(subject, wanted, store, skipped, tell)
        if wanted.agreement and not store.has(str(model), "agreement"):
            source_predictions = _predictions(subject, wanted, tell)
        subject.release()
    subject = Subject(str(model), dtype, device)
    found = measure(subject, wanted, store, skipped, tell)
    compared = None
    if source_found is not None:
        agreed = None
        if wanted.agreement:
            agreed = store.get(str(model), "agreement", lambda: _agreement(subject, source_predictions, wanted, tell))
        accepted = None
        if found.get("generation"):
            accepted = store.get(str(model), "acceptance", lambda: _acceptance(subject, str(against), found, tell))
        compared = comparison(found, source_found, agreed, accepted)
    subject.release()
    tokenizer = load_tokenizer(model)
    made = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "dtype": dtype,
        "device": device,
        "length": wanted.length,
        "begin": list(begin_of(wanted, tokenizer)),
        "versions": versions(),
        "commit": commit(),
    }
    return EvaluationReport(
        made,
        asked.plain(),
        found,
        source_found,
        compared,
        judged(wanted, found, source_found, skipped),
        tuple(skipped),
    )


def quantised_sizes(source: dict[str, Any], dtype: str) -> dict[str, float]:
    """Bytes per token of the source's cache in 8 and 4 bits, by arithmetic: what a user gets without converting."""
    stored = source.get("dtype", dtype)  # which "auto" stands for
    per_bit = source["cache_bytes_per_token"] / (32.0 if stored == "float32" else 16.0)
    return {name: per_bit * bits for name, bits in CACHE_BITS.items() if bits < 16}


def _left_out(suite: Suite, kind: str) -> str | None:
    """The option that a gate of this kind needs, if the suite leaves out what it judges."""
    judged_by: dict[str, tuple[Any, str]] = {
        "tasks": (suite.tasks, "--tasks"),
        "needles": (suite.needles, "--needles"),
        "loops": (suite.generation, "--generation"),
    }
    found, option = judged_by.get(kind, (True, ""))
    return None if found else option


def _require_measured(suite: Suite) -> None:
    """`RecipeError` for a gate on what the suite leaves out: hours later it would be missed."""
    for kind in suite.gates:
        if (option := _left_out(suite, kind)) is not None:
            raise RecipeError(
                "a gate is on what is not measured",
                where=f"gate {kind}",
                why="what it judges is left out of this evaluation",
                remedy=f"add {option}, or leave the gate out",
            )


def _suite(name: str | None, model: str | Path, **given: Any) -> Suite:
    if name is None and given["texts"] is None:
        given["texts"] = (_default_text(Path(model)),)
    if given["tasks"] is not None and len(set(given["tasks"])) < len(given["tasks"]):
        raise RecipeError(
            "a task is named twice", where="--tasks", why=", ".join(given["tasks"]), remedy="name it once"
        )
    if name is None:
        return Suite().with_overrides(**given)
    found = load_suite(name)
    if given["texts"] is None:  # what the model was made for comes first
        own = _default_text(Path(model))
        given["texts"] = tuple(sorted(found.texts, key=lambda text: text != own))
    made = found.with_overrides(**given)
    if given["gates"] is None:
        return made
    # the others stay, of what is measured
    others = {kind: share for kind, share in found.gates.items() if _left_out(made, kind) is None}
    return made.with_overrides(gates=others | given["gates"])


def _reused(path: Path, source: str, suite: Suite, dtype: str, device: str, skipped: list[Skipped]) -> dict[str, Any]:
    """The source of an earlier result; `RecipeError` if it was measured in another way, or not at all.

    skipped: gets what could not be measured of it then
    """
    (earlier,) = (result.content for result in read_results([path]))
    found: dict[str, Any] | None = earlier["source"]
    kept = [portable(_without_gates(earlier["suite"])), earlier["made"]["dtype"], earlier["made"]["device"]]
    wanted = [portable(_without_gates(suite.plain())), dtype, device]
    differing = [f"{old} there, {new} here" for old, new in zip(kept, wanted, strict=True) if old != new]
    if found is None or portable_name(found["name"]) != portable_name(source):
        differing.append(f"its source is {found['name'] if found else None}, not {source}")
    if found is None or differing:
        raise RecipeError(
            "the earlier result was measured in another way",
            where=str(path),
            why="; ".join(differing),
            remedy="use the same source, suite, options, dtype and device, or leave --reuse out",
        )
    # its texts are called by what may be written of their paths
    written = zip(suite.texts, portable(dict.fromkeys(suite.texts)), strict=True)
    found["texts"] = {text: found["texts"][name] for text, name in written if name in found["texts"]}
    skipped += [Skipped(**one) for one in earlier["skipped"] if one["model"] == found["name"]]
    for row in found.get("tasks") or []:
        if row["standard_error"] is None:  # a task that has none
            row["standard_error"] = math.nan
    return found


def _same_tokens(models: Sequence[str | Path], suite: Suite, earlier: dict[str, Any] | None) -> dict[str, str | None]:
    """Digests of the windows of each text, if the models read the same tokens; `RecipeError` if they do not.

    models:  the model and, if there is one, its source;  earlier: what was measured of that before
    """
    own = digests(models[0], suite)
    if earlier is not None:
        base = {text: found.get("sha256") for text, found in earlier["texts"].items()}
        why = "it was another text when the source was measured, or read by another tokenizer"
        remedy = "leave --reuse out"
    else:
        base = digests(models[-1], suite) if len(models) > 1 else own
        why = f"the tokenizers of {Path(models[0]).name} and {Path(models[-1]).name} differ on it"
        remedy = "compare models with the same tokenizer, or measure each alone (--against none)"
    for text, wanted in own.items():
        if None not in (wanted, base.get(text)) and wanted != base[text]:
            raise RecipeError(
                "the two models would not be measured on the same tokens", where=text, why=why, remedy=remedy
            )
    return own


def _without_gates(suite: dict[str, Any]) -> dict[str, Any]:
    """All keys, of which an earlier program may have known less; gates judge what was measured, and change nothing."""
    return {key: value for key, value in (Suite().plain() | suite).items() if key != "gates"}


def _files(name: str | Path, listing: str = "glob") -> list[list[str | int]]:
    """Names, sizes and times of a folder's files, by which a change is noticed. listing: "rglob" for those below it"""
    folder = local(str(name))
    files = sorted(getattr(folder, listing)("*")) if folder is not None and folder.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return tuple(values) if values else None


def _default_text(model: Path) -> str:
    if is_converted(model):
        recipe: dict[str, Any] = read_provenance(model).get("recipe", {})
        return str(recipe.get("evaluation", Recipe().evaluation))
    return Recipe().evaluation


def _predictions(subject: Subject, suite: Suite, progress: Progress) -> Predictions:
    tokenizer = load_tokenizer(subject.name)
    ids_NT = windows_of(suite.texts[0], tokenizer, suite.length, suite.windows, begin_of(suite, tokenizer))
    stage = f"predictions {Path(subject.name).name}"
    return predictions(subject.model, ids_NT, lambda done, total: progress(stage, done, total, ""))


def _agreement(
    subject: Subject, source: Predictions | None, suite: Suite, progress: Progress
) -> dict[str, dict[str, float]]:
    assert source is not None
    found = agreement(_predictions(subject, suite, progress), source)
    return {
        name: {"value": mean.value, "standard_error": mean.standard_error}
        for name, mean in (("kl", found.kl), ("top1", found.top1))
    }


def _acceptance(
    subject: Subject, source: str, found: dict[str, Any], progress: Progress
) -> dict[str, dict[str, float]]:
    """Of what the model wrote, the share that the source accepts. One of the two is in memory at a time."""
    accepted, predicted = {}, []
    prompts = [Prompt(one["kind"], one["text"], tuple(one["ids"])) for one in found["generation"]["prompts"]]
    judge = Subject(source, subject.dtype, subject.device)
    for number, one in enumerate((subject, judge)):
        progress("acceptance", number, 2, Path(one.name).name)
        predicted.append({way: predictions_for(one.model, prompts, found["generation"][way]["ids"]) for way in WAYS})
        one.release()
    for way in WAYS:
        texts = found["generation"][way]["ids"]
        mean = acceptance(predicted[0][way], predicted[1][way], texts, greedy=way == "greedy")
        accepted[way] = {"value": mean.value, "standard_error": mean.standard_error}
    return accepted


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
