"""Tokens to steps, losses to recoveries, logs to curves."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from transmla.healing.curves import healing_curve, write_curve
from transmla.healing.train import Healer, arguments, by_text, last_checkpoint, learning_rate, schedule
from transmla.recipe import Healing
from transmla.train.adam import LEAST, LEAST_OF_ADAPTERS, RelativeAdam


@pytest.mark.parametrize(
    ("settings", "processes", "steps", "batch", "accumulated", "every", "windows"),
    [
        ({"tokens": 300_000, "window": 1024}, 1, 300, 1, 1, 30, 293),
        ({"tokens": 300_000, "window": 1024, "batch": 4}, 1, 80, 4, 4, 8, 293),
        ({"tokens": 300_000, "window": 1024, "batch": 4}, 2, 80, 4, 2, 8, 293),
        ({"tokens": 300_000, "window": 1024, "batch": 3}, 2, 80, 4, 2, 8, 293),
        ({"tokens": 100_000_000, "window": 1024}, 8, 1530, 64, 8, 153, 97656),
        ({"tokens": 300_000, "window": 1024, "distinct": 100_000}, 1, 300, 1, 1, 30, 98),
        ({"tokens": 10, "window": 1024}, 1, 1, 1, 1, 1, 1),
    ],
)
def test_schedule(
    settings: dict[str, int], processes: int, steps: int, batch: int, accumulated: int, every: int, windows: int
) -> None:
    found = schedule(Healing(**settings), processes)  # type: ignore[arg-type]
    assert (found.steps, found.batch, found.accumulated, found.every) == (steps, batch, accumulated, every)
    assert found.num_windows == windows and found.steps % found.every == 0
    assert found.steps * found.batch * settings["window"] >= settings["tokens"]


def test_small_models_take_larger_steps() -> None:
    assert [learning_rate(Healing(), count) for count in (10**5, 10**8, 10**10)] == [1e-2, 5e-4, 5e-4]
    assert learning_rate(Healing(rate=3e-4), 10**10) == 3e-4


def test_adapters_may_start_at_nothing(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False) for name in ("plain", "lora_B", "frozen")})
    model["frozen"].requires_grad_(False)
    settings = Healing(precision="float32")
    given = arguments(settings, schedule(settings, 1), 0.01, tmp_path, "cpu")
    groups = Healer(model=model, args=given, eval_dataset=[]).create_optimizer().param_groups
    assert [(len(group["params"]), group["least"]) for group in groups] == [(1, LEAST), (1, LEAST_OF_ADAPTERS)]


def test_steps_are_shares_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 64, generator=generator, dtype=torch.float64) * torch.tensor([[10.0], [0.1], [0.0]])
    relative = torch.nn.Parameter(start.clone())
    optimizer = RelativeAdam([relative], lr=1e-2, least=0.5)
    for _ in range(5):
        # what torch's Adam does in one step, row by row, with the rate times the size of the row as it is then
        before, sizes = relative.detach().clone(), relative.detach().square().mean(-1).sqrt().clamp_min(0.5)
        relative.grad = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        state = {key: value.clone() for key, value in optimizer.state[relative].items()}
        gradient = relative.grad.clone()
        optimizer.step()
        for row, size in enumerate(sizes):
            plain = torch.nn.Parameter(before[row].clone())
            adam = torch.optim.Adam([plain], lr=1e-2 * float(size), betas=(0.9, 0.95), eps=1e-12)
            if state:
                adam.state[plain] = {
                    key: (value if key == "step" else value[row]).clone() for key, value in state.items()
                }
            plain.grad = gradient[row].clone()
            adam.step()
            assert torch.allclose(relative[row], plain, rtol=1e-9, atol=1e-12)


def test_recovery_of_each_text_and_its_error() -> None:
    nats, source = np.array([2.0, 2.2, 3.0, 3.0]), np.array([1.9, 2.0, 2.5, 2.5])
    found: Any = SimpleNamespace(predictions=(nats - source, nats, source))
    metrics = by_text(found, [2, 2], ["a", "b"])
    assert metrics["a/recovery"] == pytest.approx(math.exp(-0.15))
    assert metrics["b/recovery"] == pytest.approx(math.exp(-0.5)) and metrics["b/recovery_error"] == 0
    assert metrics["recovery"] == pytest.approx(math.exp(-1.3 / 4))
    # two windows: half of their difference is the standard error of the mean
    assert metrics["a/recovery_error"] == pytest.approx(math.exp(-0.15) * 0.05)
    assert metrics["a/divergence"] == pytest.approx(0.15) and metrics["b/source_nats"] == 2.5


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_with(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, text in ((8, '{"global_step": 8}'), (100, '{"global_step": 100}'), (108, '{"glob'), (116, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-8"]


def test_curves(tmp_path: Path) -> None:
    log: list[dict[str, Any]] = [{"step": 2, "loss": 0.5, "learning_rate": 1e-4, "grad_norm": 1.0, "epoch": 1.0}]
    for step in (0, 2):
        log.append({"step": step, "eval_loss": 0.4 - step / 10})
        log[-1] |= {f"eval_a/{key}": 0.5 for key in ("divergence", "nats", "source_nats", "recovery", "recovery_error")}
    curve = healing_curve(log, 1000, ["a"])
    assert curve["train"] == [{"step": 2, "loss": 0.5, "grad_norm": 1.0, "tokens": 2000}]
    assert [(one["tokens"], one["loss"]) for one in curve["heldout"]] == [(0, 0.4), (2000, pytest.approx(0.2))]
    write_curve(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
