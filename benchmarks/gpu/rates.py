"""Steps of healing on random models of SmolLM2's shape: tokens per second of several ways to run them, and what the
kernels of a step take. The values of the weights do not change how long it takes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transmla.evaluation.roofline import product_rate
from transmla.geometry import gqa_geometry, mla_geometry
from transmla.healing.pace import multiply_adds
from transmla.healing.student import compile_layers, halve_frozen, select_trained, share_frozen, teach
from transmla.healing.teacher import OnlineTeacher
from transmla.healing.train import autocast
from transmla.model.modeling_transmla import UnfoldedConfig, UnfoldedForCausalLM
from transmla.recipe import find_recipe, load_recipe
from transmla.targets.stock import deepseek_v3_config
from transmla.train import losses
from transmla.train.adam import RelativeAdam
from transmla.train.losses import Objective

# kernels that are listed of a step
LISTED = 30
# (name, windows at once, what is trained, what is compiled)
WAYS = (
    ("as it is, 16 windows", 16, "attention", ()),
    ("as it is, 64 windows", 64, "attention", ()),
    ("loss compiled, 64 windows", 64, "attention", ("loss",)),
    ("layers and loss compiled, 64 windows", 64, "attention", ("layers", "loss")),
    ("layers and loss compiled, 16 windows", 16, "attention", ("layers", "loss")),
    ("everything trained, layers and loss compiled, 64 windows", 64, "all", ("layers", "loss")),
)


def heal_rates(run: Any, attempt: Callable[[Callable[[], Any]], Any]) -> dict[str, Any]:
    """Rows of `one_way`, while there is time; run: a stage that is under way."""
    rows: list[dict[str, Any]] = []
    found = {"rows": rows, "product_rate": product_rate(run.device, torch.bfloat16)}
    for name, windows, train, compiled in WAYS:
        row: dict[str, Any] = {"way": name, "windows": windows, "train": train, "compiled": list(compiled)}
        if run.left < (40 if "layers" in compiled else 10) and not run.tiny:
            row["failed"] = "no time left"
        else:
            one = attempt(lambda w=windows, t=train, c=compiled: one_way(run, w, t, c))
            row |= one if isinstance(one, dict) else {"failed": one}
        rows.append(row)
        run.keep(found)
        gc.collect()
        torch.cuda.empty_cache() if run.cuda else None
    return found


def models(device: torch.device, tiny: bool, train: str) -> tuple[Any, Any]:
    """(student, source), as heal prepares them."""
    path = find_recipe("smollm2-135m")
    assert path is not None
    shape = load_recipe(path).model
    assert shape is not None
    config = shape.config | {"rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 1e5}
    if tiny:
        config |= {"num_hidden_layers": 2, "vocab_size": 512}
    config["max_position_embeddings"] = 8192
    values = deepseek_v3_config(config, mla_geometry(gqa_geometry(config, ""), 96, 32), 1e5, 8192, "float32")
    values = {key: value for key, value in values.items() if key not in ("auto_map", "model_type", "dtype")}
    torch.manual_seed(0)
    with device:
        source = LlamaForCausalLM._from_config(
            LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"}), dtype=torch.float32
        )
        student = UnfoldedForCausalLM._from_config(UnfoldedConfig(**values), dtype=torch.float32)
    source.to(device).eval().requires_grad_(False)
    halve_frozen(source)
    teacher = OnlineTeacher(source, autocast("bfloat16", device))
    student = teach(student.to(device), teacher, Objective())
    select_trained(student, train)
    halve_frozen(student)
    share_frozen(student, source)
    return student.train(), source


def one_way(run: Any, windows: int, train: str, compiled: tuple[str, ...]) -> dict[str, Any]:
    """Median seconds of a step, tokens per second beside the floor of the products, the peak, and the kernels."""
    student, source = models(run.device, run.tiny, train)
    length, windows = (128, 2) if run.tiny else (1024, windows)
    torch._dynamo.reset()
    losses._compiled.cache_clear()
    # there may be no compiler on a CPU, where only the tracing is tried
    backend = None if run.cuda else "eager"
    with traced_by(backend):
        if "layers" in compiled:
            compile_layers(student, source)
        student.objective = Objective(compiled="loss" in compiled)
        found = _timed(run, student, source, windows, length)
    losses._compiled.cache_clear()
    return found


@contextmanager
def traced_by(backend: str | None) -> Iterator[None]:
    """All that is compiled here, as heal compiles it, is by this backend; None: the usual one."""
    plain = torch.compile
    if backend is not None:
        torch.compile = lambda function, **_: plain(function, backend=backend)
    try:
        yield
    finally:
        torch.compile = plain


def _timed(run: Any, student: Any, source: Any, windows: int, length: int) -> dict[str, Any]:
    precision = autocast("bfloat16", run.device)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = RelativeAdam(trained, lr=1e-5)
    vocabulary = int(source.config.vocab_size)
    ids_BT = torch.randint(vocabulary, (windows, length), device=run.device)
    given = {
        "input_ids": ids_BT, "position_ids": torch.arange(length, device=run.device).expand(windows, -1),
        "labels": ids_BT.roll(-1, 1), "index": torch.arange(windows, device=run.device),
    }  # fmt: skip

    def wait() -> None:
        torch.cuda.synchronize() if run.cuda else None

    def step() -> float:
        wait()
        started = time.perf_counter()
        with precision():
            loss = student(**given)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - started

    torch.cuda.reset_peak_memory_stats() if run.cuda else None
    first = step() + step()
    taken = sorted(step() for _ in range(1 if run.tiny else 5))
    seconds = taken[len(taken) // 2]
    floor = multiply_adds(student, source) / product_rate(run.device, torch.bfloat16)
    kernels: list[list[Any]] = []
    with suppress(RuntimeError):  # a profiler that does not work here costs no rate
        kernels = _kernels(step, run.cuda)
    return {
        "seconds": seconds, "slowest": taken[-1], "first_seconds": first,
        "tokens_per_second": windows * length / seconds,
        "of_floor": floor * windows * length / seconds, "num_trained": sum(weight.numel() for weight in trained),
        "peak": torch.cuda.max_memory_allocated() if run.cuda else None, "kernels": kernels,
    }  # fmt: skip


def _kernels(step: Callable[[], float], cuda: bool) -> list[list[Any]]:
    """[name, calls, milliseconds] of what a step takes longest for, on the device."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as measured:
        step()

    def spent(one: Any) -> float:
        return float(one.self_device_time_total if cuda else one.self_cpu_time_total) / 1e3

    rows = sorted(measured.key_averages(), key=spent, reverse=True)
    total = ["all", sum(one.count for one in rows), round(sum(map(spent, rows)), 3)]
    return [total, *([one.key[:110], one.count, round(spent(one), 3)] for one in rows[:LISTED])]
