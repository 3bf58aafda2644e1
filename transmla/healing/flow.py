"""The steps of healing: windows -> unfold -> (source's predictions) -> train -> fold -> verify.

Unfinished work lies in a journal beside the destination, so an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.destination import check_destination, journal_of, named_path, remove_journal
from transmla.checkpoint.hashes import file_hashes
from transmla.checkpoint.journal import Journal
from transmla.checkpoint.provenance import computing_versions, portable
from transmla.checkpoint.read import Source
from transmla.checkpoint.write import CheckpointWriter
from transmla.devices import named, release
from transmla.errors import GateError, TransmlaError, UnsupportedError
from transmla.healing.choice import check, check_teacher, conversion_of, settings_for, source_of, with_mix
from transmla.healing.needs import disk_bytes
from transmla.healing.pace import multiply_adds, times_floor
from transmla.healing.prepare import TEXTS, Preparation, is_sharded, packed_texts
from transmla.healing.result import write_healed
from transmla.healing.schedule import Schedule, learning_rate, rest_rate, schedule
from transmla.healing.student import (
    check_compiling,
    compile_layers,
    halve_frozen,
    plain,
    save_trained_alone,
    select_trained,
    share_frozen,
    teach,
    with_adapters,
)
from transmla.healing.teacher import Judged, OnlineTeacher
from transmla.healing.train import Trained, autocast, distil, precision_on, recompute_activations
from transmla.healing.weights import context_of, open_trainable, prepare_weights, weights_of
from transmla.model.loading import load, open_model
from transmla.processes import Processes
from transmla.progress import silent
from transmla.recipe import Healing
from transmla.tables import Shown
from transmla.text.mixes import names_of, parse_mix
from transmla.text.sources import place_of
from transmla.train.losses import Objective

# files of a journal that are made anew unless the windows are complete: another run loses nothing without them
_REMADE = ("settings.json", "train.*", "long.*", "heldout-*", "*.partial", "*.partial.npz", "*.writing", "*.new")


@dataclass(frozen=True)
class HealReport(Shown):
    """What a healing run did, returned by `heal`.

    parent:        the converted folder that was healed
    destination:   the folder that was written
    source:        name of the source model, whose predictions were distilled
    texts:         texts with held-out windows; the first one is the mix that was trained on
    before, after: measurements on the held-out windows of each text. `divergence` from the source, `nats` (loss of the
                   model) and `source_nats` (loss of the source) are per token; `recovery` is the perplexity of the
                   source over that of the model, and `recovery_error` its standard error over windows
    tokens:        tokens trained on until the best step, repetitions included
    steps:         optimizer steps that were scheduled
    best_step:     the step whose weights were written
    num_trained:   number of trained parameters
    rate:          largest step of the optimizer, relative to the size of the row that it changes
    distinct:      different tokens that were trained on; further steps repeat them
    passes:        how often reading each text was begun in order to pack these tokens
    raised:        texts -> how many measured states were further from the source on it than the start, by more than the
                   error; these are never written
    seconds:       duration of the whole run
    tokens_per_second: of the steps of this run, without measuring and saving
    of_floor:      seconds per token over those of its matrix products at the rate at which the device multiplies
    latent_bits:   of the packed cache that the model learned for and was measured with; None: latents were exact
    """

    parent: Path
    destination: Path
    source: str
    texts: tuple[str, ...]
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    tokens: int
    steps: int
    best_step: int
    num_trained: int
    rate: float
    distinct: int
    passes: dict[str, int]
    raised: dict[str, int]
    seconds: float
    tokens_per_second: float
    of_floor: float
    latent_bits: int | None = None

    def show(self, console: Console) -> None:
        from transmla.healing.show import show_healing

        show_healing(self, console)


def heal(
    model: str | Path | None = None,
    destination: str | Path | None = None,
    *,
    source: str | None = None,
    recipe: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    progress: Any = None,
    **settings: Any,
) -> HealReport:
    """Distil the source's predictions into a converted folder, and write the result as a folder of the same kind.

    model:       converted folder; by default the folder that `convert` writes for the recipe
    destination: new folder, by default MODEL-healed
    source:      the source model; by default the one that the provenance file of `model` names
    recipe:      name or file of the recipe whose table [heal] is used; by default the installed recipe of that source,
                 if there is one
    device:      "cpu", "cuda", or "auto": a GPU if there is one; under `accelerate launch` each process takes its own
    restart:     delete an unfinished run to the same destination instead of resuming it
    settings:    any field of `transmla.recipe.Healing`: tokens, data, train, rate, lora, watch ...
    progress:    called as progress(stage, done, total, remark)

    Returns a `HealReport`. Raises the errors of `transmla.errors`, among them `GateError` if training did not improve
    the model on the held-out windows; then nothing is written. An interrupted run leaves DESTINATION.partial, and the
    same call resumes it.
    """
    device = named(device)
    started = time.monotonic()
    tell = progress or silent
    parent = Path(model) if model is not None else conversion_of(recipe)
    converted = open_trainable(parent)
    source_name = source or source_of(parent)
    options = settings_for(recipe, source_name).with_overrides(**settings)
    check(options, device)
    options = with_mix(options, tokenizer(converted))
    # everything that is counted in windows depends on the length that they really have
    context = context_of(converted.config)
    options = options.with_overrides(window=min(options.window, context), long_window=min(options.long_window, context))
    check(options, device)
    target = named_path(destination) if destination is not None else _healed(parent)
    source_checkpoint = open_model(source_name)
    larger = None if options.teacher is None else open_model(options.teacher)
    if larger is not None:
        check_teacher(larger, source_checkpoint)
    check_destination(target, disk_bytes(converted, options, is_sharded()), resumes=True)
    processes = Processes.current(device)
    if is_sharded():
        _check_sharded(options)
    # numpy takes no others
    options = options.with_overrides(seed=options.seed % 2**32)
    set_seed(options.seed)
    plan = schedule(options, processes.size)
    own_device = processes.device(device)
    # a run may go on where there are other instructions
    precision = processes.from_first(precision_on(options.precision, own_device))
    asked, options = options, options.with_overrides(precision=precision)
    if options.compile:
        check_compiling(own_device)
    preparation = Preparation(
        converted, source_checkpoint, options, plan.num_windows, processes, own_device, tell, plan.long_windows, larger
    )
    if processes.first:
        with CheckpointWriter(target, resumes=True) as writer:
            # behind the lock: the journal may be that of a run at work
            fingerprint = _fingerprint(converted, source_checkpoint, larger, source_name, asked, processes)
            work = Journal(target, fingerprint, restart=restart).begin()
            processes.wait()
            trained, passes, of_floor = _train(preparation, plan, work, target, device)
            release(own_device)  # student and teacher
            write_healed(
                writer, work, converted, options, trained, source=source_name, num_processes=processes.size,
                device=str(own_device), progress=tell,
            )  # fmt: skip
    else:
        processes.wait()  # until process 0 has created the folder
        trained, passes, of_floor = _train(preparation, plan, journal_of(target), target, device)
    processes.wait()
    return HealReport(
        parent, target, source_name, tuple(trained.before), trained.before, trained.after, trained.tokens, plan.steps,
        trained.best_step, trained.num_trained, trained.rate,
        min(plan.num_windows, plan.windows_seen) * options.window + plan.long_windows * options.long_window, passes,
        _raised(trained), time.monotonic() - started, trained.clock.rate if trained.clock else 0.0, of_floor,
        options.latent_bits,
    )  # fmt: skip


def _check_sharded(options: Healing) -> None:
    """`UnsupportedError` for what cannot be done with a model in parts."""
    version = os.environ.get("FSDP_VERSION", "1")
    for is_there, where, what, why, remedy in (
        (version != "2", "the launcher", f"FSDP{version} is not supported",
         "it renames the parameters that are trained, which would not be found again",
         "use FSDP2: fsdp_version 2 in what `accelerate config` writes, or FSDP_VERSION=2"),
        (options.on_policy, "on_policy", "a sharded model does not write",
         "processes would wait for each other: their texts end at different steps",
         "use DDP, where every process has the whole model, or leave on_policy out"),
        (options.cached, "cached", "a sharded source does not store its predictions",
         "processes would wait for each other: each stores its own windows, and has no need of the others'",
         "use DDP, where every process has the whole source, or leave cached out"),
    ):  # fmt: skip
        if is_there:
            raise UnsupportedError(what, where=where, why=why, remedy=remedy)


def _train(
    preparation: Preparation, plan: Schedule, work: Path, target: Path, device: str
) -> tuple[Trained, dict[str, int], float]:
    """The trained tensors, the passes over each text, and `times_floor`. Every process calls this."""
    settings, processes = preparation.settings, preparation.processes
    try:  # before the weights: a text that cannot be used ends the run in seconds
        train, heldout, long = preparation.windows(work)
    except TransmlaError:
        if processes.first and _has_no_step(work):  # it would be in the way of the command with another text
            remove_journal(target)
        raise
    if processes.first:
        prepare_weights(preparation.converted, work, preparation.tell)
    processes.wait()
    teacher = preparation.teacher(work, train, heldout, autocast(settings.precision, preparation.device))

    # Trainer moves the model to its device
    unfolded: Any = load(weights_of(preparation.converted, work), dtype=torch.float32)
    objective = Objective(settings.temperature, settings.cross_entropy, settings.compile)
    student = teach(unfolded, teacher, objective, settings.hidden, settings.latent_bits, settings.latent_recent)
    select_trained(student, settings.train)
    if settings.checkpointing:
        recompute_activations(student)
    if settings.lora is None:
        save_trained_alone(student)
    model: Any = student if settings.lora is None else with_adapters(student, settings.lora)
    if not is_sharded():
        if settings.precision == "bfloat16":
            halve_frozen(student)
        judge = teacher.judge if isinstance(teacher, Judged) else teacher
        if isinstance(judge, OnlineTeacher):
            share_frozen(model, judge.model)
    if settings.compile:
        compile_layers(plain(model), *getattr(teacher, "models", ()))
    num_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    rates = learning_rate(settings, num_trained), rest_rate(settings, num_trained)
    try:
        trained = distil(
            model, settings, plan, rates, work / "checkpoints", device, train, long, heldout,
            [part.name for part in preparation.texts], processes, preparation.tell,
        )  # fmt: skip
    except GateError:  # what is of no use is not kept to resume from
        if processes.first:
            remove_journal(target)
        raise
    own_device, dtype = preparation.device, getattr(torch, settings.precision)
    per_token = multiply_adds(plain(model), getattr(teacher, "model", None))
    of_floor = times_floor(trained.clock, per_token, dtype, own_device, processes.size) if trained.clock else 0.0
    _require_gain(trained, target, processes)
    passes = {name: one["passes"] for name, one in packed_texts(work).items()}
    processes.wait()  # until all have read it: process 0 goes on to write the folder, and then there is no journal
    return trained, passes, of_floor


def _has_no_step(work: Path) -> bool:
    """Whether nothing in this folder of a journal would be used by the run that resumes."""
    names = [(entry.name, entry.is_file()) for entry in work.iterdir()]
    if any(name == TEXTS for name, _ in names):  # comes last, so all windows are there
        return False
    return all(is_file and any(fnmatch(name, one) for one in _REMADE) for name, is_file in names)


def _healed(parent: Path) -> Path:
    """The default destination, beside the folder."""
    named = parent if parent.name not in ("", "..") else parent.resolve()
    return named.with_name(f"{named.name}-healed")


def _require_gain(trained: Trained, target: Path, processes: Processes) -> None:
    """`GateError` unless the best state is nearer to the source and no worse on the text. All processes have the same
    numbers; what is of no use is not kept to resume from."""
    losses = {entry["step"]: entry["eval_score"] for entry in trained.log if "eval_score" in entry}
    text = next(iter(trained.before))
    before, after = trained.before[text], trained.after[text]
    best, error = losses[trained.best_step], after["recovery_error"] / after["recovery"]
    risen = _raised(trained)
    later = [score for step, score in losses.items() if step]
    if risen and later and all(map(math.isinf, later)):  # then no state was better than the start, and that is the best
        worst = max(risen, key=lambda name: risen[name])
        why = f"in {risen[worst]} of {len(later)} states the divergence on {worst} had risen by more than its error"
    elif not best < losses[0]:
        why = f"their score was {losses[0]:.4f} before and {min(losses.values()):.4f} at best"
    elif not after["nats"] <= before["nats"] + error:
        perplexities = f"{math.exp(before['nats']):.3f} to {math.exp(after['nats']):.3f}"
        why = f"the divergence from the source fell, but perplexity rose from {perplexities}, more than its error"
    else:
        return
    if processes.first:
        remove_journal(target)
    raise GateError(
        "healing did not help",
        where="the held-out windows",
        why=why,
        remedy="try a lower --rate, more or other text (--data), also of the kind that was lost; nothing was written",
    )


def _raised(trained: Trained) -> dict[str, int]:
    counts = {name: sum(name in names for names in trained.raised.values()) for name in trained.before}
    return {name: count for name, count in counts.items() if count}


def _fingerprint(
    parent: Source,
    source_checkpoint: Source,
    larger: Source | None,
    source: str,
    settings: Healing,
    processes: Processes,
) -> dict[str, Any]:
    """Everything that an unfinished run depends on; if any of it differs, the run cannot be resumed."""
    texts = [part.name for part in parse_mix(settings.data or "", "--data")] + names_of(settings.watch or "")
    others = {
        "kind": "heal",
        "parent": parent.path.name,
        "files": file_hashes(parent.files()),
        "config": dict(parent.config),
        "source": source,
        "source_files": file_hashes(source_checkpoint.files()),
        "teacher_files": {} if larger is None else file_hashes(larger.files()),
        "texts": [_hashes_of(place) for name in texts if (place := place_of(name))],
        "processes": processes.size,
        "versions": computing_versions(),
    }
    found: dict[str, Any] = portable(asdict(settings) | others)
    return found


def _hashes_of(text: Path) -> dict[str, str]:
    """Of a file, or of the files of a dataset's folder by their paths in it; hidden ones are of other programs."""
    if text.is_file():
        return file_hashes([text])
    inside = {path: path.relative_to(text) for path in sorted(text.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): file_hashes([path])[path.name]
        for path, name in inside.items()
        if not any(part.startswith(".") for part in name.parts)
    }
