"""Settings -> transformers' Trainer, which accelerate runs on one device or with DDP or FSDP2."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from transmla.healing.curves import METRICS
from transmla.healing.windows import Windows
from transmla.processes import Processes
from transmla.progress import Progress
from transmla.recipe import Healing
from transmla.train.adam import LEAST_OF_ADAPTERS, RelativeAdam

# largest step of Adam relative to the size of each row, by trained parameters, up to so many: benchmarks/heal.md
RATES = ((5e6, 1e-2), (float("inf"), 5e-4))
STEPS_WANTED, LARGEST_BATCH = 400, 64


@dataclass(frozen=True)
class Schedule:
    """num_windows: different ones;  steps: optimizer steps, each of `batch` windows, `accumulated` times micro"""

    num_windows: int
    steps: int
    batch: int
    accumulated: int
    every: int

    @property
    def windows_seen(self) -> int:
        return self.steps * self.batch


def schedule(settings: Healing, num_processes: int) -> Schedule:
    """Tokens to steps. The batch is rounded up to what the processes hold at once."""
    at_once = settings.micro * num_processes
    wanted = max(1, round(settings.tokens / settings.window))
    batch = settings.batch or min(LARGEST_BATCH, max(1, wanted // STEPS_WANTED))
    accumulated = math.ceil(batch / at_once)
    batch = accumulated * at_once
    steps = math.ceil(wanted / batch)
    every = math.ceil(steps / settings.evaluations)
    steps = every * math.ceil(steps / every)  # the last step is measured and saved, too
    distinct = min(settings.distinct or settings.tokens, settings.tokens)
    num_windows = max(batch, round(distinct / settings.window))
    return Schedule(num_windows, steps, batch, accumulated, every)


def learning_rate(settings: Healing, num_trained: int) -> float:
    return settings.rate or next(rate for limit, rate in RATES if num_trained <= limit)


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A maker of contexts in which products are computed in `precision`."""
    if precision == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def arguments(settings: Healing, made: Schedule, rate: float, folder: Path, device: str) -> TrainingArguments:
    found = TrainingArguments(
        output_dir=str(folder),
        max_steps=made.steps,
        per_device_train_batch_size=settings.micro,
        per_device_eval_batch_size=settings.micro,
        gradient_accumulation_steps=made.accumulated,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * made.steps),
        max_grad_norm=0.0,  # Adam's steps have a size of their own
        bf16=settings.precision == "bfloat16",
        use_cpu=device == "cpu",
        ddp_find_unused_parameters=False,
        eval_strategy="steps",
        eval_steps=made.every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=made.every,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=max(1, made.steps // 100),
        report_to=_trackers(),
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    found._n_gpu = min(1, found.n_gpu)  # several GPUs are the launcher's business, not that of DataParallel
    return found


@dataclass(frozen=True)
class Trained:
    """tensors: trained parameters by name, float32 on the CPU;  log: what Trainer has logged;  before, after: `METRICS`
    of each text, from the first evaluation and from that of `best_step`, whose state this is
    """

    tensors: dict[str, Tensor]
    log: list[dict[str, Any]]
    best_step: int
    num_trained: int
    rate: float
    tokens_per_step: int
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]

    @property
    def tokens(self) -> int:
        return self.best_step * self.tokens_per_step


def distil(
    student: Any,
    settings: Healing,
    made: Schedule,
    rate: float,
    folder: Path,
    device: str,
    train: Windows,
    heldout: list[Windows],
    names: list[str],
    processes: Processes,
    progress: Progress,
) -> Trained:
    """Take all steps that `folder` has no checkpoint of yet; every process.

    heldout: windows of each text that is measured on, `names` by text
    """
    callbacks: list[TrainerCallback] = [Told(progress)]
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    trainer = Healer(
        model=student,
        args=arguments(settings, made, rate, folder, device),
        train_dataset=train,
        eval_dataset=ConcatDataset(heldout),
        compute_metrics=lambda found: by_text(found, [len(windows) for windows in heldout], names),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    sizes = {name: parameter.numel() for name, parameter in student.named_parameters() if parameter.requires_grad}
    begun = last_checkpoint(folder) if processes.first else None
    trainer.train(resume_from_checkpoint=processes.from_first(begun))
    log = _once(trainer.state.log_history)
    best_step = _step_of(trainer.state.best_model_checkpoint)
    entries = {entry["step"]: entry for entry in log if "eval_loss" in entry}
    before, after = (
        {name: {key: entries[step][f"eval_{name}/{key}"] for key in METRICS} for name in names}
        for step in (0, best_step)
    )
    tensors = whole_tensors(trainer, set(sizes))
    tokens_per_step = made.batch * settings.window
    return Trained(tensors, log, best_step, sum(sizes.values()), rate, tokens_per_step, before, after)


class Healer(Trainer):
    """Trainer with steps in proportion to what they change."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            whole: Any = self.model if model is None else model
            trained = [(name, parameter) for name, parameter in whole.named_parameters() if parameter.requires_grad]
            new = [parameter for name, parameter in trained if "lora_" in name]
            old = [parameter for name, parameter in trained if "lora_" not in name]
            groups: list[dict[str, Any]] = [{"params": old}, {"params": new, "least": LEAST_OF_ADAPTERS}]
            self.optimizer = RelativeAdam([group for group in groups if group["params"]], lr=self.args.learning_rate)
        return self.optimizer


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; trainer_state.json is written last, so what has none was cut off and is deleted."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        try:
            found[json.loads((path / "trainer_state.json").read_text("utf-8"))["global_step"]] = path
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return str(found[max(found)]) if found else None


def whole_tensors(made: Trainer, names: set[str]) -> dict[str, Tensor]:
    """Trained parameters on the CPU in float32, gathered where they are sharded, for which all processes call it."""
    if made.is_deepspeed_enabled:  # as accelerate documents it; not tried
        state = made.accelerator.get_state_dict(made.model_wrapped)
        return {name: state[name].float().cpu() for name in names}
    found = {}
    assert made.model is not None
    for name, parameter in made.model.named_parameters():
        if name in names:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[name] = whole.detach().float().cpu()
    return found


def by_text(found: EvalPrediction, counts: list[int], names: list[str]) -> dict[str, float]:
    """Of all held-out windows and of those of each text: divergence, nats, and recovery with its standard error."""
    divergence, nats, source_nats = (np.asarray(part, dtype=np.float64) for part in found.predictions)
    metrics: dict[str, float] = {}
    start = 0
    for name, count in zip(["", *(f"{name}/" for name in names)], [sum(counts), *counts], strict=True):
        part = slice(0, count) if not name else slice(start, start + count)
        start += count if name else 0
        gap = source_nats[part] - nats[part]
        recovery = float(np.exp(gap.mean()))
        metrics |= {
            f"{name}divergence": float(divergence[part].mean()),
            f"{name}nats": float(nats[part].mean()),
            f"{name}source_nats": float(source_nats[part].mean()),
            f"{name}recovery": recovery,
            f"{name}recovery_error": recovery * float(gap.std(ddof=1)) / math.sqrt(count),
        }
    return metrics


class Told(TrainerCallback):
    """Passes steps and losses on to a progress function."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._remark = progress, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._remark = f"loss {float(logs['loss']):.4f}"
        if logs and "eval_recovery" in logs:
            self._remark = f"held out {logs['eval_divergence']:.4f} nats, recovery {logs['eval_recovery']:.1%}"

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer takes a checkpoint for the best one only if its folder is there before it is saved, and sharded
        # checkpoints make theirs too late
        if state.global_step:
            Path(args.output_dir, f"checkpoint-{state.global_step}").mkdir(parents=True, exist_ok=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress("heal", state.global_step, state.max_steps, self._remark)


def _trackers() -> list[str]:
    """Loggers that are there; wandb only where it is set up, since it asks questions otherwise."""
    found = [name for name in ("tensorboard",) if importlib.util.find_spec(name)]
    if importlib.util.find_spec("wandb") and ("WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ):
        found.append("wandb")
    return found


def _step_of(checkpoint: str | None) -> int:
    """Of a folder checkpoint-STEP."""
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0


def _once(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A resumed run evaluates again where it starts; the first entry of a kind and step counts."""
    kept: dict[tuple[int, bool], dict[str, Any]] = {}
    for entry in log:
        kept.setdefault((int(entry["step"]), "eval_loss" in entry), entry)
    return list(kept.values())
