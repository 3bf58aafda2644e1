"""Tokens to steps, losses to recoveries, logs to curves."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from transmla.healing.choice import with_mix
from transmla.healing.curves import healing_curve, write_curve
from transmla.healing.pace import Clock, multiply_adds, times_floor
from transmla.healing.schedule import Schedule, learning_rate, rest_rate, schedule
from transmla.healing.scores import by_text, divergence_at_start
from transmla.healing.train import Batches, Healer, arguments, last_checkpoint, precision_on
from transmla.processes import Processes
from transmla.progress import silent
from transmla.recipe import MIX, Healing
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


@pytest.mark.parametrize(("narrow", "wanted"), [(torch.bfloat16, "bfloat16"), (None, "float32")])
def test_products_are_in_what_the_device_multiplies(
    monkeypatch: pytest.MonkeyPatch, narrow: torch.dtype | None, wanted: str
) -> None:
    """Unless they are asked for: emulated ones are several times as slow as float32."""
    monkeypatch.setattr("transmla.healing.train.narrow_dtype", lambda device: narrow)
    device = torch.device("cpu")
    assert precision_on(Healing().precision, device) == wanted
    assert [precision_on(asked, device) for asked in ("bfloat16", "float32")] == ["bfloat16", "float32"]


def test_adapters_may_start_at_nothing(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False) for name in ("plain", "lora_B", "frozen")})
    model["frozen"].requires_grad_(False)
    settings = Healing(precision="float32")
    given = arguments(settings, schedule(settings, 1), 0.01, tmp_path, "cpu")
    groups = Healer(model=model, args=given, eval_dataset=[]).create_optimizer().param_groups
    assert [(len(group["params"]), group["least"]) for group in groups] == [(1, LEAST), (1, LEAST_OF_ADAPTERS)]


@pytest.mark.parametrize(("tokens", "steps", "warmup"), [(1000, 1, 0), (20_000, 2, 1), (1_000_000, 63, 4)])
def test_a_single_step_has_a_rate(tmp_path: Path, tokens: int, steps: int, warmup: int) -> None:
    settings = Healing(tokens=tokens, window=1024, batch=16)
    plan = schedule(settings, 1)
    rates = rates_of(settings, plan, tmp_path)
    assert plan.steps == len(rates) == steps and rates.index(0.01) == warmup


def test_each_process_exchanges_its_share(tmp_path: Path) -> None:
    """Of the windows of a step that it has itself."""
    settings = Healing(tokens=400_000, window=256, batch=8, on_policy=0.25, resample=4)
    plan = schedule(settings, 2)
    student: Any = SimpleNamespace(layerwise=None)
    train: Any = None
    batches = Batches(student, settings, plan, train, None, tmp_path, Processes(1, 2), silent)
    own = batches._own
    assert own is not None
    written: Any = [{"input_ids": torch.full((256,), 7)}] * 4
    own._windows = lambda block: written  # type: ignore[method-assign]
    given = {"input_ids": torch.zeros(1, 256, dtype=torch.long)}
    for step in range(4):
        found = [batches.batch(step, given)["input_ids"][0, 0].item() for _ in range(plan.accumulated)]
        assert found == [0, 0, 0, 7]


def rates_of(settings: Healing, plan: Schedule, folder: Path) -> list[float]:
    """Of each step, as the Trainer has them."""
    model = torch.nn.Linear(8, 8, bias=False)
    trainer = Healer(model=model, args=arguments(settings, plan, 0.01, folder, "cpu"), eval_dataset=[])
    trainer.share_of_rate = partial(plan.share_of_rate, warmup=settings.warmup)
    trainer.create_optimizer_and_scheduler(plan.steps)
    rates = []
    for _ in range(plan.steps):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0
    return rates


def test_rates_rise_and_fall(tmp_path: Path) -> None:
    """From nothing to the whole rate in the first steps, then along a cosine to nothing."""
    settings = Healing(tokens=100 * 1024, window=1024, batch=1, warmup=0.1)
    plan = schedule(settings, 1)
    rates = rates_of(settings, plan, tmp_path)
    assert plan.steps == 100 and rates[:11] == pytest.approx([number / 1000 for number in range(11)])
    assert rates[55] == pytest.approx(0.005) and rates[32] == pytest.approx(0.005 * (1 + math.cos(math.pi * 22 / 90)))
    assert 0 < rates[99] < 1e-5


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


def test_steps_are_shares_of_what_a_matrix_was_at_first() -> None:
    start = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    relative, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = RelativeAdam([relative], lr=0.3, each="matrix")
    adam = torch.optim.Adam([plain], lr=0.3 * float(start.square().mean().sqrt()), betas=(0.9, 0.95), eps=1e-12)
    for _ in range(5):
        for one, step in ((relative, optimizer), (plain, adam)):
            one.grad = one.detach() - 1
            step.step()
    assert torch.allclose(relative, plain, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(start.square().mean(), plain.square().mean(), rtol=0.2)


@pytest.mark.parametrize("each", ["row", "matrix"])
def test_what_is_loaded_lies_where_the_parameter_does(device: torch.device, each: str) -> None:
    """On one GPU the Trainer reads the state of an optimizer to the CPU."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(3, 8, generator=generator) for _ in range(3))
    whole = torch.nn.Parameter(start.to(device))
    optimizer = RelativeAdam([whole], lr=1e-2, each=each)
    whole.grad = gradients[0].to(device)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0] = {
        name: value.cpu().clone() if isinstance(value, torch.Tensor) else value
        for name, value in state["state"][0].items()
    }
    kept, meta = torch.nn.Parameter(whole.detach().clone()), torch.nn.Parameter(torch.empty(3, 8, device="meta"))
    for parameter in (meta, kept):
        resumed = RelativeAdam([parameter], lr=1e-2, each=each)
        resumed.load_state_dict(state)
        found = resumed._state_of(parameter, each).values()
        assert {value.device for value in found if isinstance(value, torch.Tensor)} == {parameter.device}
    kept.grad = whole.grad = gradients[1].to(device)
    resumed.step()
    optimizer.step()
    assert torch.equal(kept, whole)


def test_recovery_of_each_text_and_its_error() -> None:
    nats, source = np.array([2.0, 2.2, 3.0, 3.0]), np.array([1.9, 2.0, 2.5, 2.5])
    found = EvalPrediction((nats - source, nats, source), None)  # type: ignore[arg-type]
    metrics = by_text(found, [2, 2], ["a", "b"])
    assert metrics["a/recovery"] == pytest.approx(math.exp(-0.15))
    assert metrics["b/recovery"] == pytest.approx(math.exp(-0.5)) and metrics["b/recovery_error"] == 0
    assert metrics["recovery"] == pytest.approx(math.exp(-1.3 / 4))
    # two windows: half of their difference is the standard error of the mean
    assert metrics["a/recovery_error"] == pytest.approx(math.exp(-0.15) * 0.05)
    assert metrics["a/divergence"] == pytest.approx(0.15) and metrics["b/source_nats"] == 2.5


def test_a_state_that_is_further_on_one_text_is_not_the_best(tmp_path: Path) -> None:
    nats = np.zeros(4)
    start = np.array([0.5, 0.7, 1.0, 1.2])

    def score(after: list[float], last: float = 1.0, **kwargs: Any) -> tuple[float, float, float]:
        losses = np.array([1.0, 1.0, 1.0, last])
        found = EvalPrediction((np.array(after), nats + 2, nats + 1), None, losses=losses)  # type: ignore[arg-type]
        metrics = by_text(found, [2, 2], ["a", "b"], start, **kwargs)
        return metrics["score"], metrics["a/raised"], metrics["b/raised"]

    # the mean over texts, however many windows each has
    assert score([0.3, 0.5, 1.0, 1.2]) == (pytest.approx(0.75), 0, 0)
    assert score([0.1, 0.1, 1.4, 1.1]) == (pytest.approx(0.675), 0, 0)  # b rose by 0.15 ± 0.25
    assert score([0.1, 0.1, 1.2, 1.4]) == (math.inf, 0, 1)  # by 0.2 in both windows
    assert score([0.1, 0.1, 1.5, 1.22]) == (math.inf, 0, 1)  # by 0.26 ± 0.24
    assert score([0.1, 0.1, 1.45, 1.15]) == (pytest.approx(0.7), 0, 0)  # by 0.2 ± 0.25
    assert score([0.3, 0.5, 1.0, 1.2], cross_entropy=0.5)[0] == pytest.approx((0.75 + 2) / 2)
    assert score([math.nan, 0.5, 1.0, 1.2])[0] == score([0.1, 0.1, 0.1, 0.1], last=math.inf)[0] == math.inf
    path = tmp_path / "start.npy"
    assert divergence_at_start(path, start, is_start=True, writes=True) is start
    # a resumed run measures another state first
    assert divergence_at_start(path, start / 2, is_start=False, writes=True).tolist() == start.tolist()
    assert divergence_at_start(path, start / 2, is_start=True, writes=True).tolist() == start.tolist()


def test_long_windows_take_their_share_of_the_tokens() -> None:
    settings = Healing(tokens=400_000, window=1024, long_share=0.1, long_window=4096, batch=2, micro=2)
    plan = schedule(settings, 2)
    # windows of 1,024 per step: 4, of 4,096: one in each process
    assert (plan.batch, plan.long_rows, plan.long_batch, plan.long_steps) == (4, 1, 2, 5)
    assert plan.tokens(plan.short_steps) == plan.short_steps * 4 * 1024
    assert plan.tokens(plan.steps) - plan.tokens(plan.short_steps) == 5 * 2 * 4096 == 40_960
    assert 400_000 <= plan.tokens(plan.steps) < 480_000 and plan.long_windows == 10
    assert plan.num_windows == 352, "nine tenths of the tokens come in short windows"
    assert schedule(Healing(tokens=400_000, micro=16, long_share=0.5), 1).long_rows == 4
    assert schedule(Healing(), 1).long_steps == 0
    # as many windows a step as there are tokens for, however few of them come in short windows
    assert schedule(Healing(tokens=100_000_000, long_share=0.9), 1).batch == 64


def test_long_windows_have_rates_of_their_own(tmp_path: Path) -> None:
    """In the last tenth of the tokens a single cosine over all has a hundredth of its sum."""
    settings = Healing(tokens=400_000, window=1024, long_share=0.1, long_window=4096, batch=1)
    plan = schedule(settings, 1)
    rates = rates_of(settings, plan, tmp_path)
    short, long = rates[: plan.short_steps], rates[plan.short_steps :]
    assert short == rates_of(settings, replace(plan, steps=plan.short_steps, long_steps=0), tmp_path)
    alone = rates_of(settings, replace(plan, steps=plan.long_steps, long_steps=0), tmp_path)
    assert long == pytest.approx([0.3 * rate for rate in alone])
    assert plan.share_of_rate(0, 0.05) == 0.0
    many = schedule(settings.with_overrides(long_share=0.8), 1)
    assert max(rates_of(settings, many, tmp_path)[many.short_steps :]) == pytest.approx(0.8 * 0.01, rel=0.02)
    one = replace(plan, steps=plan.short_steps + 1, long_steps=1)
    assert one.share_of_rate(plan.short_steps, 0.05) == 0.3, "a single step is not spent on rising"


@pytest.mark.parametrize(("precision", "wanted"), [("float32", "no"), ("bfloat16", "bf16")])
def test_the_precision_is_not_that_of_accelerate_s_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, wanted: str
) -> None:
    """`accelerate launch` hands it on, whatever is asked for."""
    for said in ("bf16", "fp16", "no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
        settings = Healing(precision=precision)
        given = arguments(settings, schedule(settings, 1), 0.01, tmp_path, "cpu")
        assert given.mixed_precision == wanted
        assert Healer(model=torch.nn.Linear(2, 2), args=given, eval_dataset=[]).accelerator.mixed_precision == wanted


def test_long_windows_are_dealt_to_processes_batches_and_steps(tmp_path: Path) -> None:
    """Each once as long as there are enough, behind all steps on short ones; layers learn for themselves at first."""
    settings = Healing(tokens=400_000, window=64, long_share=0.1, long_window=128, batch=8, micro=4, layerwise=0.25)
    plan = schedule(settings, 2)
    assert (plan.accumulated, plan.long_rows, plan.long_batch) == (1, 2, 4)
    settings, plan = settings.with_overrides(micro=2), schedule(settings.with_overrides(micro=2), 2)
    assert (plan.accumulated, plan.long_rows, plan.long_batch) == (2, 1, 4)
    long: Any = [{"input_ids": torch.full((128,), number)} for number in range(plan.long_windows - 3)]
    given = {"input_ids": torch.zeros(2, 64, dtype=torch.long)}
    seen: dict[int, list[int]] = {}
    for rank in range(2):
        student: Any = SimpleNamespace(layerwise=None)
        batches = Batches(student, settings, plan, long, long, tmp_path, Processes(rank, 2), silent)
        for step in range(plan.steps):
            for _ in range(plan.accumulated):
                found = batches.batch(step, given)
                assert student.layerwise == (step < round(plan.steps / 4))
                assert (found is given) == (step < plan.short_steps)
                if found is not given:
                    seen.setdefault(step, []).extend(found["input_ids"][:, 5].tolist())
    assert len(seen) == plan.long_steps > 3
    for done, step in enumerate(sorted(seen)):
        assert sorted(seen[step]) == sorted((4 * done + number) % len(long) for number in range(4))


def test_models_that_answer_learn_maths_as_well() -> None:
    for template, data, wanted in ((None, None, MIX), ("{{ x }}", None, f"{MIX}+maths"), ("{{ x }}", "code", "code")):
        assert with_mix(Healing(data=data), SimpleNamespace(chat_template=template)).data == wanted
    assert with_mix(Healing(), object()).mix == MIX and "code" in MIX


def test_rates_outside_the_attention(tmp_path: Path) -> None:
    rates = [
        rest_rate(Healing(**given), count)
        for given in ({}, {"rate": 1e-3}, {"rate_rest": 7e-4})
        for count in (10, 10**8)
    ]
    assert rates == [pytest.approx(3e-3), pytest.approx(1.5e-4), *[pytest.approx(3e-4)] * 2, 7e-4, 7e-4]
    model = torch.nn.ModuleDict({"layer": torch.nn.ModuleDict({
        "self_attn": torch.nn.Linear(8, 8, bias=False), "mlp": torch.nn.Linear(8, 8, bias=False),
    })})  # fmt: skip
    given = arguments(Healing(), schedule(Healing(), 1), 0.01, tmp_path, "cpu")
    trainer = Healer(model=model, args=given, eval_dataset=[])
    trainer.rest_rate = 0.002
    groups = trainer.create_optimizer().param_groups
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(1, 0.01), (1, 0.002)]
    assert groups[0]["params"][0] is model["layer"]["self_attn"].weight


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_with(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, text in ((8, '{"global_step": 8}'), (100, '{"global_step": 100}'), (108, '{"glob'), (116, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (tmp_path / f"checkpoint-{step}" / name).touch()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-8"]


def test_the_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was given to a GPU may take long after the call has returned."""
    now, queued = 0.0, 0.0

    def wait(device: torch.device) -> None:
        nonlocal now, queued
        now, queued = now + queued, 0.0

    monkeypatch.setattr("transmla.healing.pace.wait", wait)
    monkeypatch.setattr("transmla.healing.pace.time.perf_counter", lambda: now)
    clock, given = Clock(lambda step: 100 * step), SimpleNamespace(device=torch.device("cuda"))
    for step in range(3):
        queued = 50.0  # of measuring
        clock.on_step_begin(given, SimpleNamespace(global_step=step), None)
        queued = 2.0
        clock.on_step_end(given, SimpleNamespace(global_step=step + 1), None)
    assert (clock.seconds, clock.trained, clock.rate) == (6.0, 300, 50.0)


def test_the_floor_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward of both, backward of the student, gradients of what is trained; at the rate of every process."""

    def cost(model: torch.nn.Module, *of: int) -> tuple[float, float]:
        assert of == (1, 0, 0)
        return float(sum(weight.numel() for weight in model.parameters())), 0.0

    monkeypatch.setattr("transmla.healing.pace.step_cost", cost)
    monkeypatch.setattr("transmla.healing.pace.product_rate", lambda device, dtype: 700.0)
    student = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(5, 2, bias=False))
    student[0].requires_grad_(False)
    assert multiply_adds(student, None) == 2 * 30 + 10
    per_token = multiply_adds(student, torch.nn.Linear(7, 3, bias=False))
    assert per_token == 2 * 30 + 10 + 21
    where = (torch.float32, torch.device("cpu"), 2)
    clock: Any = SimpleNamespace(rate=20.0)  # ten tokens per second in each of two processes
    assert times_floor(clock, per_token, *where) == pytest.approx(0.1 / (91 / 700))
    clock.rate = 0.0
    assert times_floor(clock, per_token, *where) == 0.0


def test_curves(tmp_path: Path) -> None:
    log: list[dict[str, Any]] = [{"step": 2, "loss": 0.5, "learning_rate": 1e-4, "grad_norm": 1.0, "epoch": 1.0}]
    for step in (0, 2):
        log.append({"step": step, "eval_loss": 0.4 - step / 10})
        log[-1] |= {f"eval_a/{key}": 0.5 for key in ("divergence", "nats", "source_nats", "recovery", "recovery_error")}
    curve = healing_curve(log, lambda step: 1000 * step, ["a"])
    assert curve["train"] == [{"step": 2, "loss": 0.5, "grad_norm": 1.0, "tokens": 2000}]
    assert [(one["tokens"], one["loss"]) for one in curve["heldout"]] == [(0, 0.4), (2000, pytest.approx(0.2))]
    write_curve(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
