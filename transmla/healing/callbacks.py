"""What is done at events of the Trainer: steps told, resumed runs ended where they had, windows forgotten."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from transmla.errors import GateError
from transmla.healing.on_policy import forget
from transmla.progress import Progress


class Ended(TrainerCallback):
    """A Trainer callback that lets a resumed run do no step where training had ended."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After all steps, or when the patience had."""
        # the folder may have been moved since
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)
        stopped = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
        if stopped or state.global_step >= state.max_steps:
            control.should_training_stop = True


class Patience(EarlyStoppingCallback):
    """A Trainer callback that stops after so many evaluations without gain, whether or not the run was interrupted."""

    _is_repeated = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the count of the checkpoint."""
        inherited: Any = super()
        inherited.on_train_begin(args, state, control, **kwargs)
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]
        self._is_repeated = state.global_step > 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Count; but not the first one of a resumed run, whose state was counted before."""
        if not self._is_repeated:
            inherited: Any = super()
            inherited.on_evaluate(args, state, control, metrics, **kwargs)
        self._is_repeated = False


class Forgets(TrainerCallback):
    """A Trainer callback that deletes windows to which a resumed run would not go back."""

    def __init__(self, folder: Path, resample: int) -> None:
        self._folder, self._resample = folder, resample

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run starts at the checkpoint that was saved last."""
        if state.is_world_process_zero:
            forget(self._folder, state.global_step // self._resample)


class Told(TrainerCallback):
    """A Trainer callback that reports each step to a progress function.

    The remark is the last training loss or, after an evaluation, the divergence and recovery on held-out windows.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._remark = progress, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember what was logged as the remark of the next steps. A loss that is not finite ends the training, with
        `GateError` where no better state was saved before."""
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            if state.best_model_checkpoint is not None:
                control.should_training_stop, control.should_evaluate, control.should_save = True, False, False
                return
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
