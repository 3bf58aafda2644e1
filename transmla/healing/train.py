"""Training with transformers' Trainer, which accelerate runs on one device or with DDP or FSDP2."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import ConcatDataset, RandomSampler
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from transmla.checkpoint.destination import disk_errors
from transmla.checkpoint.store import first_few
from transmla.devices import narrow_dtype
from transmla.errors import VerificationError
from transmla.healing.callbacks import Ended, Forgets, Patience, Told
from transmla.healing.curves import METRICS
from transmla.healing.on_policy import OnPolicy
from transmla.healing.pace import Clock
from transmla.healing.schedule import Schedule
from transmla.healing.scores import by_text, divergence_at_start
from transmla.healing.student import attention_part, plain
from transmla.healing.windows import Windows
from transmla.processes import Processes
from transmla.progress import Progress
from transmla.recipe import Healing
from transmla.train.adam import LEAST_OF_ADAPTERS, RelativeAdam


def precision_on(precision: str, device: torch.device) -> str:
    """ "bfloat16" or "float32"; for "auto", bfloat16 where the hardware multiplies it. Emulated, it is several times as
    slow as float32."""
    if precision != "auto":
        return precision
    return "float32" if narrow_dtype(device) is None else "bfloat16"


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A function that makes contexts in which matrix products are computed in `precision`, "bfloat16" or "float32"."""
    assert precision != "auto"
    if precision == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def recompute_activations(model: Any) -> None:
    """Keep the inputs of layers alone for backward, and compute the rest of their activations again."""
    # the method has this name in newer versions of transformers
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def arguments(settings: Healing, plan: Schedule, rate: float, folder: Path, device: str) -> TrainingArguments:
    """The settings as transformers' arguments; checkpoints go to `folder`."""
    trainer_arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=settings.micro,
        per_device_eval_batch_size=settings.micro,
        gradient_accumulation_steps=plan.accumulated,
        learning_rate=rate,
        max_grad_norm=0.0,  # no clipping: the size of RelativeAdam's steps does not depend on that of the gradients
        bf16=settings.precision == "bfloat16",
        use_cpu=device == "cpu",
        ddp_find_unused_parameters=False,
        eval_strategy="steps",
        eval_steps=plan.every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=plan.every,
        save_total_limit=2,  # with 1 it deletes the newest at its end, and a run killed later would train again
        load_best_model_at_end=True,
        metric_for_best_model="eval_score",
        greater_is_better=False,
        include_for_metrics=["loss"],
        logging_strategy="steps",
        logging_nan_inf_filter=False,  # it would show the mean of the finite ones instead
        logging_steps=max(1, plan.steps // 100),
        report_to=_trackers(),
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    # or what `accelerate config` says would hold in the place of float32
    trainer_arguments.mixed_precision = "bf16" if trainer_arguments.bf16 else "no"
    # one GPU per process; Trainer would otherwise wrap the model in DataParallel
    trainer_arguments._n_gpu = min(1, trainer_arguments.n_gpu)
    return trainer_arguments


@dataclass(frozen=True)
class Trained:
    """The result of `distil`: the best weights that were measured, and what was logged.

    tensors:         trained parameters by name, float32 on the CPU
    log:             `log_history` of the Trainer
    best_step:       step with the lowest held-out score (scores.py), whose weights these are; 0 is the start
    raised:          step -> texts whose divergence was larger than at the start, by more than its error
    clock:           how long the steps of this run took
    num_trained:     number of trained parameters
    rate:            largest step of the optimizer, relative to the size of the row that it changes
    plan:            the schedule, which knows the tokens of each step
    before, after:   `METRICS` of each text before the first step and after `best_step`
    """

    tensors: dict[str, Tensor]
    log: list[dict[str, Any]]
    best_step: int
    num_trained: int
    rate: float
    plan: Schedule
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    raised: dict[int, list[str]] = field(default_factory=dict)
    clock: Clock | None = None

    @property
    def tokens(self) -> int:
        """Tokens trained on until the best step."""
        return self.plan.tokens(self.best_step)


def distil(
    student: Any,
    settings: Healing,
    plan: Schedule,
    rates: tuple[float, float],
    folder: Path,
    device: str,
    train: Windows,
    long: Windows | None,
    heldout: list[Windows],
    names: list[str],
    processes: Processes,
    progress: Progress,
) -> Trained:
    """Train the student against its teacher and return the best weights. Every process calls this.

    student:  a `Student`, possibly with adapters
    plan:     number of steps and size of batches
    rates:    largest step of the optimizer, relative to the size of the row that it changes: of the attention and
              adapters, and of what else is trained
    folder:   where checkpoints are kept; training resumes from the newest one
    device:   "cpu" or "cuda"
    train:    windows to train on;  long: those of the last steps
    heldout:  held-out windows of each text;  names: names of these texts
    """
    clock = Clock(plan.tokens)
    callbacks: list[TrainerCallback] = [Told(progress), clock, Ended()]
    if settings.patience is not None:
        callbacks.append(Patience(settings.patience))
    batches = Batches(student, settings, plan, train, long, folder.parent / "on-policy", processes, progress)
    if settings.on_policy:
        callbacks.append(Forgets(batches.own_folder, settings.resample))

    def metrics(evaluation: EvalPrediction) -> dict[str, float]:
        divergence_N = np.asarray(evaluation.predictions[0], dtype=np.float64)
        start_N = divergence_at_start(
            folder.parent / "start.npy", divergence_N, is_start=not trainer.state.global_step, writes=processes.first
        )
        found = by_text(evaluation, [len(windows) for windows in heldout], names, start_N, settings.cross_entropy)
        # the Trainer does so itself but for names that begin like that already, as those of texts may
        return {f"eval_{key}": value for key, value in found.items()}

    trainer = Healer(
        model=student,
        args=arguments(settings, plan, rates[0], folder, device),
        train_dataset=train,
        eval_dataset=ConcatDataset(heldout),
        compute_metrics=metrics,
        callbacks=callbacks,
    )
    trainer.batches, trainer.rest_rate = batches, rates[1]
    trainer.share_of_rate = partial(plan.share_of_rate, warmup=settings.warmup)
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
    raised = {step: [name for name in names if entry[f"eval_{name}/raised"]] for step, entry in entries.items()}
    return Trained(tensors, log, best_step, sum(sizes.values()), rates[0], plan, before, after, raised, clock)


class Batches:
    """What each batch of a step really is: windows of text as the Trainer draws them, some of them exchanged for
    windows that the model wrote (on_policy.py), and long windows in the last steps."""

    def __init__(
        self,
        student: Any,
        settings: Healing,
        plan: Schedule,
        train: Windows,
        long: Windows | None,
        own_folder: Path,
        processes: Processes,
        progress: Progress,
    ) -> None:
        self.own_folder, self._plan, self._long, self._processes = own_folder, plan, long, processes
        self._student = plain(student)
        self._layerwise_steps = round(settings.layerwise * plan.steps)
        self._step, self._batch = -1, 0
        self._own: OnPolicy | None = None
        if settings.on_policy:
            per_step = plan.batch // processes.size

            def precision() -> AbstractContextManager[Any]:
                return autocast(settings.precision, self._student.device)()

            self._own = OnPolicy(self._student, train, settings, per_step, own_folder, processes, precision, progress)

    def batch(self, step: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The next batch of this step. given: the one that the Trainer drew"""
        self._batch = self._batch + 1 if step == self._step else 0
        self._step = step
        self._student.layerwise = step < self._layerwise_steps
        if self._long is not None and step >= self._plan.short_steps:
            done = (step - self._plan.short_steps) * self._plan.accumulated + self._batch
            first = (done * self._processes.size + self._processes.rank) * self._plan.long_rows
            rows = [self._long[(first + row) % len(self._long)] for row in range(self._plan.long_rows)]
            device = given["input_ids"].device
            return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        return given if self._own is None else self._own.mixed(step, given)


class Healer(Trainer):
    """transformers' Trainer with `RelativeAdam`, whose steps are proportional to the size of the row they change.

    batches:   makes each batch of training from the one that was drawn; None: it is as it is
    rest_rate: rate of what is trained outside the attention; None: that of the arguments
    share_of_rate: step -> share of these rates
    """

    batches: Batches | None = None
    rest_rate: float | None = None
    share_of_rate: Callable[[int], float] | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> RandomSampler:
        """All windows in a new order again and again, for all steps: the Trainer would end a pass with a step of fewer
        windows where the batches do not divide them."""
        given = self.args
        batch = given.train_batch_size * given.gradient_accumulation_steps * given.world_size
        windows: Any = self.train_dataset if train_dataset is None else train_dataset
        return RandomSampler(windows, num_samples=given.max_steps * batch)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of a step; none where training has ended, which the Trainer would find out after a step."""
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's, on the batch of `batches`."""
        if self.batches is not None:
            inputs = self.batches.batch(self.state.global_step, self._prepare_inputs(inputs))
        found: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return found

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The rates by `share_of_rate`, created on the first call."""
        if self.lr_scheduler is None and self.share_of_rate is not None:
            given: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(given, self.share_of_rate)
        return super().create_scheduler(num_training_steps, optimizer)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, created on the first call. Adapters start at zero, so they get a least step size."""
        if self.optimizer is None:
            whole: Any = self.model if model is None else model
            trained = [(name, parameter) for name, parameter in whole.named_parameters() if parameter.requires_grad]
            adapters = [parameter for name, parameter in trained if "lora_" in name]
            part = "" if self.rest_rate is None else attention_part(whole)
            weights = [parameter for name, parameter in trained if "lora_" not in name and part in name]
            others = [parameter for name, parameter in trained if "lora_" not in name and part not in name]
            groups: list[dict[str, Any]] = [
                {"params": weights}, {"params": adapters, "least": LEAST_OF_ADAPTERS},
                {"params": others, "lr": self.rest_rate},
            ]  # fmt: skip
            self.optimizer = RelativeAdam([group for group in groups if group["params"]], lr=self.args.learning_rate)
        return self.optimizer


def last_checkpoint(folder: Path) -> str | None:
    """The path of the newest complete checkpoint in `folder`, or None.

    Incomplete checkpoints are deleted. They have no readable trainer_state.json, which is written last, or lack another
    part, if a kill came while an old one was removed. So are those without the best one until then.
    """
    by_step, best = {}, {}
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text("utf-8"))
            step = state["global_step"]
            if not _is_whole(path):
                raise ValueError("a kill came while it was removed")
            by_step[step], best[step] = path, state.get("best_global_step")
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    for step in [step for step in by_step if best[step] and best[step] not in by_step]:
        shutil.rmtree(by_step.pop(step), ignore_errors=True)
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
    if missing := names - tensors.keys():
        raise VerificationError(
            "what was trained cannot be found",
            where="the model behind the training",
            why=f"it has no parameters {first_few(sorted(missing))}",
            remedy="train without a wrapper that renames parameters; the checkpoints of the run are kept",
        )
    return tensors


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
