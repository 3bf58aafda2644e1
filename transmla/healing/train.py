"""Training with transformers' Trainer, which accelerate runs on one device or with DDP or FSDP2."""

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

from transmla.checkpoint.destination import disk_errors
from transmla.errors import GateError
from transmla.healing.curves import METRICS
from transmla.healing.windows import Windows
from transmla.processes import Processes
from transmla.progress import Progress
from transmla.recipe import Healing
from transmla.train.adam import LEAST_OF_ADAPTERS, RelativeAdam

# (number of trained parameters, rate for models up to that number); a rate is the largest step of Adam relative to the
# size of each row. Measured in benchmarks/heal.md
RATES = ((5e6, 1e-2), (float("inf"), 5e-4))
STEPS_WANTED, LARGEST_BATCH = 400, 64


@dataclass(frozen=True)
class Schedule:
    """How many windows and steps a run takes, from `schedule`.

    num_windows: different windows to train on; further steps repeat them
    steps:       optimizer steps
    batch:       windows per step, over all processes
    accumulated: batches of `micro` windows that each process accumulates gradients over in one step
    every:       steps between evaluations
    """

    num_windows: int
    steps: int
    batch: int
    accumulated: int
    every: int

    @property
    def windows_seen(self) -> int:
        """Windows in all steps together, repetitions included."""
        return self.steps * self.batch


def schedule(settings: Healing, num_processes: int) -> Schedule:
    """The schedule that trains on `settings.tokens` tokens, rounded up to full batches and evaluations.

    A batch is a multiple of what the processes hold at once, which is `micro` windows each.
    """
    at_once = settings.micro * num_processes
    windows_seen = max(1, round(settings.tokens / settings.window))
    batch = settings.batch or min(LARGEST_BATCH, max(1, windows_seen // STEPS_WANTED))
    accumulated = math.ceil(batch / at_once)
    batch = accumulated * at_once
    steps = math.ceil(windows_seen / batch)
    every = math.ceil(steps / settings.evaluations)
    steps = every * math.ceil(steps / every)  # so that the last step is evaluated and saved as well
    distinct = min(settings.distinct or settings.tokens, settings.tokens)
    num_windows = max(batch, round(distinct / settings.window))
    return Schedule(num_windows, steps, batch, accumulated, every)


def learning_rate(settings: Healing, num_trained: int) -> float:
    """The rate of the settings or, if they have none, the one of `RATES` for this number of trained parameters."""
    return settings.rate or next(rate for limit, rate in RATES if num_trained <= limit)


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A function that makes contexts in which matrix products are computed in `precision`."""
    if precision == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def arguments(settings: Healing, plan: Schedule, rate: float, folder: Path, device: str) -> TrainingArguments:
    """The settings as transformers' arguments; checkpoints go to `folder`."""
    trainer_arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=settings.micro,
        per_device_eval_batch_size=settings.micro,
        gradient_accumulation_steps=plan.accumulated,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * plan.steps),
        max_grad_norm=0.0,  # no clipping: the size of RelativeAdam's steps does not depend on that of the gradients
        bf16=settings.precision == "bfloat16",
        use_cpu=device == "cpu",
        ddp_find_unused_parameters=False,
        eval_strategy="steps",
        eval_steps=plan.every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=plan.every,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_nan_inf_filter=False,  # it would show the mean of the finite ones instead
        logging_steps=max(1, plan.steps // 100),
        report_to=_trackers(),
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    # one GPU per process; Trainer would otherwise wrap the model in DataParallel
    trainer_arguments._n_gpu = min(1, trainer_arguments.n_gpu)
    return trainer_arguments


@dataclass(frozen=True)
class Trained:
    """The result of `distil`: the best weights that were measured, and what was logged.

    tensors:         trained parameters by name, float32 on the CPU
    log:             `log_history` of the Trainer
    best_step:       step with the lowest held-out loss, whose weights these are; 0 is the start
    num_trained:     number of trained parameters
    rate:            largest step of the optimizer, relative to the size of the row that it changes
    tokens_per_step: tokens in each step
    before, after:   `METRICS` of each text before the first step and after `best_step`
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
        """Tokens trained on until the best step."""
        return self.best_step * self.tokens_per_step


def distil(
    student: Any,
    settings: Healing,
    plan: Schedule,
    rate: float,
    folder: Path,
    device: str,
    train: Windows,
    heldout: list[Windows],
    names: list[str],
    processes: Processes,
    progress: Progress,
) -> Trained:
    """Train the student against its teacher and return the best weights. Every process calls this.

    student:  a `Student`, possibly with adapters
    plan:     number of steps and size of batches
    rate:     largest step of the optimizer, relative to the size of the row that it changes
    folder:   where checkpoints are kept; training resumes from the newest one
    device:   "cpu" or "cuda"
    train:    windows to train on
    heldout:  held-out windows of each text;  names: names of these texts
    """
    callbacks: list[TrainerCallback] = [Told(progress)]
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    trainer = Healer(
        model=student,
        args=arguments(settings, plan, rate, folder, device),
        train_dataset=train,
        eval_dataset=ConcatDataset(heldout),
        compute_metrics=lambda evaluation: by_text(evaluation, [len(windows) for windows in heldout], names),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    sizes = {name: parameter.numel() for name, parameter in student.named_parameters() if parameter.requires_grad}
    checkpoint = last_checkpoint(folder) if processes.first else None
    with disk_errors(folder):
        trainer.train(resume_from_checkpoint=processes.from_first(checkpoint))
    log = _once(trainer.state.log_history)
    best_step = _step_of(trainer.state.best_model_checkpoint)
    entries = {entry["step"]: entry for entry in log if "eval_loss" in entry}
    before, after = (
        {name: {key: entries[step][f"eval_{name}/{key}"] for key in METRICS} for name in names}
        for step in (0, best_step)
    )
    tensors = whole_tensors(trainer, set(sizes))
    tokens_per_step = plan.batch * settings.window
    return Trained(tensors, log, best_step, sum(sizes.values()), rate, tokens_per_step, before, after)


class Healer(Trainer):
    """transformers' Trainer with `RelativeAdam`, whose steps are proportional to the size of the row they change."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, created on the first call. Adapters start at zero, so they get a least step size."""
        if self.optimizer is None:
            whole: Any = self.model if model is None else model
            trained = [(name, parameter) for name, parameter in whole.named_parameters() if parameter.requires_grad]
            adapters = [parameter for name, parameter in trained if "lora_" in name]
            weights = [parameter for name, parameter in trained if "lora_" not in name]
            groups: list[dict[str, Any]] = [{"params": weights}, {"params": adapters, "least": LEAST_OF_ADAPTERS}]
            self.optimizer = RelativeAdam([group for group in groups if group["params"]], lr=self.args.learning_rate)
        return self.optimizer


def last_checkpoint(folder: Path) -> str | None:
    """The path of the newest complete checkpoint in `folder`, or None.

    Incomplete checkpoints are deleted. They have no readable trainer_state.json, which is written last, or lack another
    part, if a kill came while an old one was removed.
    """
    by_step = {}
    for path in folder.glob("checkpoint-*"):
        try:
            step = json.loads((path / "trainer_state.json").read_text("utf-8"))["global_step"]
            if not _is_whole(path):
                raise ValueError("a kill came while it was removed")
            by_step[step] = path
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return str(by_step[max(by_step)]) if by_step else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether weights, optimizer, schedule and random numbers are there."""
    names = [path.name for path in checkpoint.iterdir() if path.is_file() or any(path.iterdir())]
    parts = (("model", "adapter_model", "pytorch_model"), ("optimizer",), ("scheduler",), ("rng_state",))
    if not all(any(name.startswith(part) for name in names) for part in parts):
        return False
    index = checkpoint / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.is_file() else set()
    return shards <= set(names)


def whole_tensors(trainer: Trainer, names: set[str]) -> dict[str, Tensor]:
    """The parameters `names` on the CPU in float32.

    Sharded parameters are gathered, so every process has to call this.
    """
    if trainer.is_deepspeed_enabled:  # follows accelerate's documentation; not tested
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        return {name: state[name].float().cpu() for name in names}
    tensors = {}
    assert trainer.model is not None
    for name, parameter in trainer.model.named_parameters():
        if name in names:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            tensors[name] = whole.detach().float().cpu()
    return tensors


def by_text(evaluation: EvalPrediction, counts: list[int], names: list[str]) -> dict[str, float]:
    """`METRICS` over all held-out windows, and over those of each text with the key prefixed "NAME/".

    evaluation: divergence, nats and source_nats of each window, in the order of the texts
    counts:     number of windows of each text;  names: names of the texts
    """
    divergence, nats, source_nats = (np.asarray(part, dtype=np.float64) for part in evaluation.predictions)
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
    """A Trainer callback that reports each step to a progress function.

    The remark is the last training loss or, after an evaluation, the divergence and recovery on held-out windows.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._remark = progress, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember what was logged as the remark of the next steps; `GateError` for a loss that is not finite."""
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise GateError(
                "healing did not help",
                where=f"step {state.global_step}",
                why=f"the loss is {logs['loss']}",
                remedy="try a lower --rate or other text (--data); nothing was written",
            )
        if logs and "loss" in logs:
            self._remark = f"loss {float(logs['loss']):.4f}"
        if logs and "eval_recovery" in logs:
            self._remark = f"held out: {logs['eval_divergence']:.4f} nats, recovery {logs['eval_recovery']:.1%}"

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Create the folder of the checkpoint that follows.

        Trainer records a checkpoint as the best one only if its folder exists before it is saved, and with sharded
        checkpoints it would be created too late.
        """
        if state.global_step:
            Path(args.output_dir, f"checkpoint-{state.global_step}").mkdir(parents=True, exist_ok=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step."""
        self._progress("heal", state.global_step, state.max_steps, self._remark)


def _trackers() -> list[str]:
    """Installed experiment trackers; wandb only if it is configured, because it asks for a login otherwise."""
    trackers = [name for name in ("tensorboard",) if importlib.util.find_spec(name)]
    if importlib.util.find_spec("wandb") and ("WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ):
        trackers.append("wandb")
    return trackers


def _step_of(checkpoint: str | None) -> int:
    """The step of a folder named checkpoint-STEP; 0 if there is none."""
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0


def _once(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without repetitions: a resumed run evaluates its first step again, and the first entry counts."""
    first: dict[tuple[int, bool], dict[str, Any]] = {}
    for entry in log:
        first.setdefault((int(entry["step"]), "eval_loss" in entry), entry)
    return list(first.values())
