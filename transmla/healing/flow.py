"""The flow: unfold -> windows -> (source's predictions) -> train -> fold -> verify.

Everything unfinished lies in the journal beside the destination, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from transmla.checkpoint.destination import check_destination, journal_of
from transmla.checkpoint.journal import Journal
from transmla.checkpoint.provenance import read_provenance
from transmla.checkpoint.write import CheckpointWriter
from transmla.errors import GateError
from transmla.healing.choice import check, conversion_of, settings_for
from transmla.healing.prepare import TEXTS, Preparation, is_sharded
from transmla.healing.result import write_healed
from transmla.healing.student import halve_frozen, select_trained, teach, with_adapters
from transmla.healing.train import Schedule, Trained, autocast, distil, learning_rate, schedule
from transmla.model.loading import load, open_model
from transmla.processes import Processes
from transmla.progress import silent
from transmla.recipe import Healing
from transmla.targets.export import open_converted
from transmla.targets.fold import unfold
from transmla.train.losses import Objective


@dataclass(frozen=True)
class HealReport:
    """before, after: of the held-out windows of each text (`texts`; the first is of what was trained on), their
    `divergence` from the source and `nats` per token, `source_nats`, `recovery` (perplexity of the source over that of
    the model) and `recovery_error`, one standard error over windows
    distinct: tokens that were packed;  passes: begun over each text for that
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
    seconds: float


def heal(
    model: str | Path | None = None,
    destination: str | Path | None = None,
    *,
    source: str | None = None,
    recipe: str | Path | None = None,
    device: str = "cpu",
    restart: bool = False,
    progress: Any = None,
    **settings: Any,
) -> HealReport:
    """Distil the source's predictions into a converted folder and write the result as a folder of the same kind.

    model:       converted folder; default: what `convert` names the conversion of the recipe
    destination: new folder, default MODEL-healed
    source:      of the conversion; default: what the provenance file of `model` says
    recipe:      name or file whose table [heal] is used; default: the recipe of that source, if there is one
    device:      "cpu" or "cuda"; under `accelerate launch` every process takes its own
    restart:     delete an unfinished run to the same destination instead of going on with it
    settings:    any field of `transmla.recipe.Healing`: tokens, data, train, rate, lora, watch ...
    progress:    called as progress(stage, done, total, remark)

    Raises the errors of `transmla.errors`; `GateError` if the held-out divergence could not be lowered, in which case
    nothing is written. A run that was interrupted leaves DESTINATION.partial, and the same call goes on from there.
    """
    started = time.monotonic()
    tell = progress or silent
    parent = Path(model) if model is not None else conversion_of(recipe)
    opened = open_converted(parent)
    name = source or str(read_provenance(parent)["source"]["name"])
    wanted = settings_for(recipe, name).with_overrides(**settings)
    check(wanted, device)
    # what is counted in windows has to know how long they are
    wanted = wanted.with_overrides(window=min(wanted.window, opened.config["max_position_embeddings"]))
    target = Path(destination) if destination is not None else parent.with_name(f"{parent.name}-healed")
    check_destination(target, 4 * sum(info.num_bytes for info in opened.tensors.values()))
    of_source = open_model(name)
    processes = Processes.current(device)
    set_seed(wanted.seed)
    made = schedule(wanted, processes.size)
    where = processes.device(device)
    prepared = Preparation(opened, of_source, wanted, made.num_windows, processes, where, tell)
    if processes.first:
        journal = Journal(target, _fingerprint(parent, name, wanted, processes), restart=restart)
        with CheckpointWriter(target) as writer:
            work = journal.begin()
            processes.wait()
            trained, passes = _train(prepared, made, work, device)
            write_healed(
                writer, work, opened, wanted, trained, source=name, num_processes=processes.size, device=str(where),
                progress=tell,
            )  # fmt: skip
    else:
        processes.wait()  # for the folder
        trained, passes = _train(prepared, made, journal_of(target), device)
    processes.wait()
    return HealReport(
        parent, target, name, tuple(trained.before), trained.before, trained.after, trained.tokens, made.steps,
        trained.best_step, trained.num_trained, trained.rate,
        min(made.num_windows, made.windows_seen) * wanted.window, passes, time.monotonic() - started,
    )  # fmt: skip


def _train(prepared: Preparation, made: Schedule, work: Path, device: str) -> tuple[Trained, dict[str, int]]:
    """From the unfolded form to the trained tensors, and the passes over each text; every process."""
    settings, processes = prepared.settings, prepared.processes
    if processes.first and not (work / "unfolded").is_dir():
        unfold(prepared.opened.path, work / "unfolded", dtype="float32", progress=prepared.tell)
    processes.wait()
    train, heldout = prepared.windows(work)
    teacher = prepared.teacher(work, train, heldout, autocast(settings.precision, prepared.where))

    # Trainer moves it to its device
    unfolded: Any = load(work / "unfolded", dtype=torch.float32)
    student = teach(unfolded, teacher, Objective(settings.temperature, settings.cross_entropy), settings.hidden)
    select_trained(student, settings.train)
    if settings.checkpointing:
        # transformers has given it another name
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    model: Any = student if settings.lora is None else with_adapters(student, settings.lora)
    if settings.precision == "bfloat16" and not is_sharded():
        halve_frozen(student)
    rate = learning_rate(settings, sum(one.numel() for one in model.parameters() if one.requires_grad))
    trained = distil(
        model, settings, made, rate, work / "checkpoints", device, train, heldout,
        [part.name for part in prepared.texts], processes, prepared.tell,
    )  # fmt: skip
    _require_gain(trained, work, processes)
    packed = json.loads((work / TEXTS).read_text("utf-8"))
    return trained, {name: one["passes"] for name, one in packed.items()}


def _require_gain(trained: Trained, work: Path, processes: Processes) -> None:
    """`GateError` unless the best state is nearer to the source and no worse on the text. All processes have the same
    numbers; what is of no use is not kept to resume from."""
    losses = {entry["step"]: entry["eval_loss"] for entry in trained.log if "eval_loss" in entry}
    text = next(iter(trained.before))
    before, after = trained.before[text], trained.after[text]
    best, error = losses[trained.best_step], after["recovery_error"] / after["recovery"]
    if not best < losses[0]:
        why = f"their loss was {losses[0]:.4f} before and {min(losses.values()):.4f} at best"
    elif not after["nats"] <= before["nats"] + error:
        perplexities = f"{math.exp(before['nats']):.3f} to {math.exp(after['nats']):.3f}"
        why = f"the divergence from the source fell, but perplexity rose from {perplexities}, more than its error"
    else:
        return
    if processes.first:
        shutil.rmtree(work)
    raise GateError(
        "healing did not help",
        where="the held-out windows",
        why=why,
        remedy="try a lower --rate, more or other text (--data); nothing was written",
    )


def _fingerprint(parent: Path, source: str, settings: Healing, processes: Processes) -> dict[str, Any]:
    """All that an unfinished run depends on."""
    stamp = [[file.name, file.stat().st_size] for file in sorted(parent.glob("*.safetensors"))]
    others = {"parent": parent.name, "files": stamp, "source": source, "processes": processes.size}
    return asdict(settings) | {"kind": "heal"} | others
