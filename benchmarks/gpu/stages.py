"""What each stage of the campaign measures: functions of a `Run` that return plain values.

Legend: B batch, S cached tokens, T query tokens, H heads.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from plan import cache_bytes, expanded_bytes, extrapolated, healing_tokens, texts
from rates import heal_rates
from transformers import DeepseekV3ForCausalLM as StockForCausalLM
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from weights import pack

import transmla
from transmla.checkpoint.provenance import commit, portable_name, versions
from transmla.evaluation.roofline import Rates, machine_rates, step_cost
from transmla.evaluation.steps import ran_out_of_memory
from transmla.geometry import gqa_geometry, mla_geometry
from transmla.model import modeling_transmla as own
from transmla.model.loading import load, load_any
from transmla.recipe import find_recipe, load_recipe
from transmla.targets.stock import deepseek_v3_config

ROOT = Path(__file__).resolve().parents[2]
# (latent, rotary) of the 8B shape: two ways to spend 576 values
SHAPES = ((512, 64), (448, 128))
# latent caches of our class that are timed beside the growing one of transformers
CACHES = ("exact", "int8", "int4")


@dataclass
class Run:
    """One stage that is under way. keep: writes what was found so far, so that an end by force loses nothing."""

    device: torch.device
    tiny: bool
    source: str
    data: Path | None
    out: Path
    end: float
    refine: str
    keep: Callable[[Any], None]

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def work(self) -> Path:
        """Converted folders, which later stages use."""
        folder = self.out / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.cuda else torch.float32


def run_one(name: str, args: Namespace) -> None:
    """Run a stage in this process and write what it finds to OUT/stages/NAME.found.json."""
    path = args.out / "stages" / f"{name}.found.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)

    def keep(found: Any) -> None:
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        name_of = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        machine = {"device_name": name_of, "versions": versions(), "commit": commit() or _revision(args.data)}
        content = {"result": _finite(found), "machine": machine, "peak": {"host": host, "gpu": gpu}}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
        partial.rename(path)

    source = args.source if args.source is not None and not args.tiny else "stories260k"
    run = Run(device, args.tiny, source, args.data, args.out, time.monotonic() + args.seconds - 3, args.refine, keep)
    keep(_STAGES[name](run))


def _revision(data: Path | None) -> str | None:
    file = data / "revision.txt" if data is not None else None
    return file.read_text("utf-8").strip() or None if file is not None and file.is_file() else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(run: Run) -> dict[str, Any]:
    """Rates of the machine, and what is missing there."""
    wanted = ("accelerate", "gguf", "jsonschema", "matplotlib", "psutil", "rich", "click", "pytest", "datasets", "peft")
    found: dict[str, Any] = {"missing": [name for name in wanted if importlib.util.find_spec(name) is None]}
    found["rates"] = vars(machine_rates(run.device, run.dtype))
    found["threads"] = torch.get_num_threads()
    if run.cuda:
        found |= {"memory": torch.cuda.get_device_properties(0).total_memory, "cuda": torch.version.cuda}
        found["capability"] = list(torch.cuda.get_device_capability())
    return found


def tests(run: Run) -> dict[str, Any]:
    """Tests that have a CUDA variant; elsewhere they are skipped, and say why."""
    where = ["tests/maths", "tests/model"] if run.tiny else ["tests"]
    options = [
        "-m",
        "cuda",
        "-W",
        "default",
        "-q",
        "-rsfE",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
    ]
    options += ["-p", "no:benchmark", "-p", "no:randomly"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", "4"]
    log = run.out / "stages" / "pytest.log"  # stays if time runs out
    code = None
    with log.open("w", encoding="utf-8") as file, suppress(subprocess.TimeoutExpired):
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *where],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "4"}, stdout=file, stderr=subprocess.STDOUT,
            timeout=max(1.0, run.left - 3),
        ).returncode  # fmt: skip
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    told = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    return {"code": code, "summary": lines[-1] if lines else "", "lines": told[:60], "tail": lines[-40:]}


def own_form(run: Run) -> dict[str, Any]:
    """Random lively models of families in their own form: float32 on the device against the CPU, each way to attend."""
    from tests.families import lively_source

    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    text = ROOT / "transmla" / "data" / "wikitext2-train-excerpt.txt"
    found: dict[str, Any] = {}
    for model_type in ("qwen3", "gemma3_text", "qwen2", "gemma2"):
        sizes = {"model_type": model_type, "layers": 4, "head_dim": 16}
        source = lively_source(run.work / f"{model_type}-source", **sizes)
        folder = run.work / f"{model_type}-own"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier call, which was ended
        given: dict[str, Any] = {"latent": 24, "rope": 8, "tokens": 2048, "window": 64, "refine": "off"}
        report = transmla.convert(str(source), folder, device=str(run.device), calibration=str(text), **given)
        there, here = load(folder, dtype=torch.float32, device=run.device), load(folder, dtype=torch.float32)
        row: dict[str, Any] = {"form": report.plan.form, "verified": report.verification.relative_error}
        with torch.no_grad():
            wanted = here(ids).logits
            row["logits"] = _relative(there(ids.to(run.device)).logits.cpu(), wanted)
            kernels: dict[str, Any] = {}
            for kernel in ("rows", "products", "heads"):
                with _forced(kernel):
                    kernels[kernel] = _attempt(lambda there=there, wanted=wanted: _stepwise(there, ids, wanted))
            row["cached_logits"] = kernels
            written = here.generate(ids, max_new_tokens=16, do_sample=False)
            for cache in ("dynamic", "static"):
                options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
                generated = _attempt(
                    lambda there=there, options=options: there.generate(
                        ids.to(run.device), max_new_tokens=16, do_sample=False, **options
                    ).cpu()
                )
                row[f"{cache}_tokens_equal"] = (
                    generated
                    if isinstance(generated, str)
                    else generated.shape == written.shape and bool(torch.equal(generated, written))
                )
            if run.cuda:
                narrow = load(folder, dtype=torch.bfloat16, device=run.device)
                row["bfloat16_cached_logits"] = _attempt(
                    lambda narrow=narrow, wanted=wanted: _stepwise(narrow, ids, wanted)
                )
        found[model_type] = row
        run.keep(found)
    return found


def _stepwise(model: Any, ids: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error of logits that are made token by token behind half of a text."""
    cache, half = DynamicCache(), ids.shape[1] // 2
    ids = ids.to(model.device)
    parts = [model(ids[:, :half], past_key_values=cache).logits]
    parts += [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(half, ids.shape[1])]
    return _relative(torch.cat(parts, dim=1).float().cpu(), wanted)


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _attempt(work: Callable[[], Any]) -> Any:
    """What a call returns, or in words why it does not."""
    try:
        return work()
    except Exception as error:  # Triton's are of no kind that is known here
        short = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        told = "out of memory" if ran_out_of_memory(error) else short
    _free()  # what the error held
    return told


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _forced(kernel: str | None) -> Iterator[None]:
    """Absorbed attention by this kernel, whatever `_kernel` would choose; "heads" knows no mask."""
    chosen = own._kernel

    def forced(q_BHTk: torch.Tensor, key_B1Sk: torch.Tensor, mask: torch.Tensor | None) -> str:
        fits = kernel is not None and (kernel != "heads" or (mask is None and q_BHTk.shape[2] == 1))
        return str(kernel) if fits else chosen(q_BHTk, key_B1Sk, mask)

    if kernel is not None:
        own._kernel = forced
    try:
        yield
    finally:
        own._kernel = chosen


def milliseconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of repeats, after two to warm up."""
    taken = []
    for number in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def kernels(run: Run) -> dict[str, Any]:
    """Attention alone: one query per head against a latent cache, and prefill at the widths of the expanded heads."""
    attend = torch.nn.functional.scaled_dot_product_attention
    rates, heads, repeats = machine_rates(run.device, run.dtype), 4 if run.tiny else 32, 2 if run.tiny else 10
    decoding: list[dict[str, Any]] = []
    prefill: list[dict[str, Any]] = []
    found = {"rates": vars(rates), "heads": heads, "decoding": decoding, "prefill": prefill}
    shapes = [
        (rank, rope, batch, size)
        for rank, rope in ((512, 64), (448, 128), (96, 32))
        for batch in (1, 16)
        for size in ([64] if run.tiny else [2048, 8192, 65536])
    ]
    for rank, rope, batch, size in shapes:
        query, key = _query_and_key(run, heads, rank + rope, batch, size)
        rows, scale = query.transpose(1, 2), (rank + rope) ** -0.5
        ways: dict[str, Callable[[], Any]] = {
            "rows": lambda q=rows, k=key: attend(q, k, k),
            "heads": lambda q=query, k=key: attend(q, k, k, enable_gqa=True),
            "products": lambda q=rows, k=key, r=rank, s=scale: own._products(q, k, r, None, s),
        }
        row: dict[str, Any] = {"rank": rank, "rope": rope, "batch": batch, "context": size}
        row["chosen"] = own._kernel(query, key, None)
        row["floor_ms"] = 1e3 * key.numel() * key.itemsize / rates.bytes
        # one fused call of grouped heads at a width above 256 expands the key for every head
        if rank + rope > 256 and batch * size > 2**17:
            del ways["heads"]
        for name, way in ways.items():
            row[name] = _attempt(lambda way=way: milliseconds(way, run.device, repeats))
        decoding.append(row)
        run.keep(found)
    for query_width, value_width in ((192, 128), (256, 128), (128, 128)):
        for size in [64] if run.tiny else [2048, 8192, 32768]:
            shape = (1, heads, size)
            q, k = (torch.randn(*shape, query_width, device=run.device, dtype=run.dtype) for _ in range(2))
            v = torch.randn(*shape, value_width, device=run.device, dtype=run.dtype)
            row = {"query_width": query_width, "value_width": value_width, "tokens": size}
            row["floor_ms"] = 1e3 * heads * size**2 / 2 * (query_width + value_width) / rates.multiply_adds
            row["as_it_is"] = _attempt(partial(_prefill_ms, q, k, v, 0, repeats))
            row["padded"] = _attempt(partial(_prefill_ms, q, k, v, query_width - value_width, repeats))
            if run.cuda:
                row["backends"] = _backends(q, k, v, repeats, run.device)
            prefill.append(row)
            run.keep(found)
    if run.cuda:  # at last: a kernel that fails can leave the device unusable
        for row, (rank, rope, batch, size) in zip(decoding, shapes, strict=True):
            query, key = _query_and_key(run, heads, rank + rope, batch, size)
            one = _attempt(partial(_split, query, key, rank, repeats))
            row |= one if isinstance(one, dict) else {"split": one}
            run.keep(found)
    return found


def _query_and_key(run: Run, heads: int, width: int, batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random [B, H, 1, k] and [B, 1, S, k]."""
    given = {"device": run.device, "dtype": run.dtype}
    return torch.randn(batch, heads, 1, width, **given), torch.randn(batch, 1, size, width, **given)


def _split(query_BH1k: torch.Tensor, key_B1Sk: torch.Tensor, rank: int, repeats: int) -> dict[str, float]:
    """Milliseconds by the kernel of split_decode.py, and how far its result is from that of two products."""
    from split_decode import split_decode

    scale = query_BH1k.shape[-1] ** -0.5
    call = partial(split_decode, query_BH1k[:, :, 0], key_B1Sk[:, 0], rank, scale)
    wanted_B1Hr, _ = own._products(query_BH1k.transpose(1, 2), key_B1Sk, rank, None, scale)
    error = _relative(call().float(), wanted_B1Hr[:, 0].float())
    return {"split": milliseconds(call, query_BH1k.device, repeats), "split_error": error}


def _prefill_ms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: int, repeats: int) -> float:
    """Milliseconds of causal attention with values that are padded by `pad`."""

    def attend() -> torch.Tensor:
        wide = torch.nn.functional.pad(v, (0, pad)) if pad else v
        return torch.nn.functional.scaled_dot_product_attention(q, k, wide, is_causal=True)

    return milliseconds(attend, q.device, repeats)


def _backends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each fused kernel by itself; the plain one would need all scores in memory."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend, found = torch.nn.functional.scaled_dot_product_attention, {}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        with sdpa_kernel([getattr(SDPBackend, name)]):
            found[name] = _attempt(lambda: milliseconds(lambda: attend(q, k, v, is_causal=True), device, repeats))
    return found


# ---- whole models


def big_config(tiny: bool, layers: int) -> dict[str, Any]:
    """config.json of so many layers of Llama 3 8B, of a long context; small, if tiny."""
    path = find_recipe("llama-3-8b")
    assert path is not None
    shape = load_recipe(path).model
    assert shape is not None
    config = shape.config | {"num_hidden_layers": layers, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "hidden_act": "silu"}
    config |= {"bos_token_id": 1, "eos_token_id": 2}
    if tiny:
        config |= {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        config |= {"head_dim": 32, "vocab_size": 512}
    return config


def big_models(run: Run, layers: int) -> dict[str, Callable[[], Any]]:
    """Makers of random models of one shape: the source's class, ours and the stock one."""
    config = big_config(run.tiny, layers)
    gqa = gqa_geometry(config, "config.json")

    def latent(model_class: Any, rank: int, rope: int) -> Callable[[], Any]:
        if run.tiny:
            rank, rope = rank // 16, rope // 4
        values = deepseek_v3_config(config, mla_geometry(gqa, rank, rope), 5e5, 131072, "bfloat16")
        values = {key: value for key, value in values.items() if key not in ("auto_map", "model_type", "dtype")}
        return lambda: _random(run, model_class, DeepseekV3Config(**values))

    settings = LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    makers: dict[str, Callable[[], Any]] = {"source": lambda: _random(run, LlamaForCausalLM, settings)}
    for rank, rope in SHAPES:
        makers[f"own class, {rank}+{rope}"] = latent(own.DeepseekV3ForCausalLM, rank, rope)
    makers[f"stock class, {SHAPES[0][0]}+{SHAPES[0][1]}"] = latent(StockForCausalLM, *SHAPES[0])
    return makers


def _random(run: Run, model_class: Any, config: Any) -> Any:
    """With weights as transformers draws them, made on the device."""
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with run.device:
        model = model_class._from_config(config, dtype=run.dtype)
    return model.to(run.device).eval()


@torch.inference_mode()
def filled_cache(model: Any, batch: int, context: int) -> DynamicCache:
    """A cache of random values, of the shapes that the model caches: what is timed does not depend on them."""
    probe, cache = DynamicCache(), DynamicCache()
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=probe)
    for index, layer in enumerate(probe.layers):
        key, value = (
            torch.randn(batch, one.shape[1], context, one.shape[3], device=one.device, dtype=one.dtype)
            for one in (layer.keys, layer.values)
        )
        cache.update(key, value, index)
    return cache


@torch.inference_mode()
def filled_latent_cache(model: Any, kind: str, batch: int, context: int) -> Any:
    """The same as a cache of our class, of numbers as it stores them."""
    cache: Any = own.LatentCache(model.config, kind)
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    for layer in cache.layers:
        layer.append(torch.randn(batch, 1, context, width, device=model.device, dtype=model.dtype))
        layer.settle()
    return cache


@torch.inference_mode()
def decoding(run: Run, model: Any, batch: int, context: int, rates: Rates, kind: str | None = None) -> dict[str, Any]:
    """Steps of one token: median, slowest and fastest of three runs of eight, in milliseconds, beside the roofline.

    kind: of a `LatentCache`; None: transformers' growing cache
    """
    steps, repeats = (2, 1) if run.tiny else (8, 3)
    itemsize = torch.empty(0, dtype=run.dtype).element_size()
    needed = 2 * cache_bytes(model.config, batch, context, itemsize)  # a growing cache is copied in each step
    if type(model) is StockForCausalLM:
        needed += 2 * expanded_bytes(model.config, batch, context, itemsize)
    if run.cuda and needed > torch.cuda.mem_get_info()[0] * 0.95:
        return {"failed": f"needs about {needed / 2**30:.0f} GiB"}
    torch.cuda.reset_peak_memory_stats() if run.cuda else None
    cache = filled_cache(model, batch, context) if kind is None else filled_latent_cache(model, kind, batch, context)
    token = torch.zeros(batch, 1, dtype=torch.long, device=run.device)

    def decode() -> None:
        for _ in range(steps):
            model(token, past_key_values=cache)
        if run.cuda:
            torch.cuda.synchronize()

    decode()
    cache.crop(-steps)
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        decode()
        taken.append(1e3 * (time.perf_counter() - started) / steps)
        cache.crop(-steps)
    multiply_adds, moved = step_cost(model, batch, context, cache_bytes(model.config, batch, context, itemsize))
    return {
        "ms": statistics.median(taken),
        "fastest": min(taken),
        "slowest": max(taken),
        "floor_ms": 1e3 * max(multiply_adds / rates.multiply_adds, moved / rates.bytes),
        "peak": torch.cuda.max_memory_allocated() if run.cuda else None,
    }


def prefill_cost(config: Any, parameters: int, batch: int, tokens: int) -> float:
    """Multiply-adds of a text from nothing to its last logits: every weight but those of embedding and head for every
    token, the head once, and half of the square of attention, as the expanded heads compute it."""
    head = config.vocab_size * config.hidden_size
    ends = head if config.tie_word_embeddings else 2 * head
    if getattr(config, "kv_lora_rank", None):
        width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        width = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    attention = config.num_hidden_layers * config.num_attention_heads * width * tokens**2 / 2
    return float(batch * ((parameters - ends) * tokens + head + attention))


@torch.inference_mode()
def prefill(run: Run, model: Any, batch: int, tokens: int, rates: Rates) -> dict[str, Any]:
    """A whole text at once into an empty cache, in milliseconds, beside the roofline."""
    torch.cuda.reset_peak_memory_stats() if run.cuda else None
    vocabulary = int(model.config.vocab_size)
    ids = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(run.device)
    ms = milliseconds(
        lambda: model(ids, past_key_values=DynamicCache(), logits_to_keep=1), run.device, 1 if run.tiny else 3
    )
    cost = prefill_cost(model.config, sum(weight.numel() for weight in model.parameters()), batch, tokens)
    peak = torch.cuda.max_memory_allocated() if run.cuda else None
    return {"ms": ms, "floor_ms": 1e3 * cost / rates.multiply_adds, "peak": peak}


def _speed(run: Run, makers: dict[str, Callable[[], Any]], contexts: list[int], prompts: list[int]) -> dict[str, Any]:
    """Model after model, alone in memory: prefill and decoding. What is worth most comes first, while there is time."""
    rates, rows = machine_rates(run.device, run.dtype), []  # type: ignore[var-annotated]
    found = {"rates": vars(rates), "rows": rows}
    for count, (name, make) in enumerate(makers.items()):
        end = run.left * (1 - 1 / (len(makers) - count))  # what is left for the others
        model = make()
        cells: list[tuple[str, int, int, str | None]] = [
            ("decoding", batch, size, None) for size in contexts for batch in (1, 16)
        ]
        cells += [("prefill", batch, size, None) for size in prompts for batch in (1, 16) if batch * size <= 2**17]
        if name.startswith("own"):
            sizes = [(1, contexts[-1]), (16, contexts[min(1, len(contexts) - 1)])]
            cells += [("decoding", *size, kind) for kind in CACHES for size in sizes]
            cells += [("decoding", *size, kernel) for kernel in ("rows", "heads", "products") for size in sizes]
        for kind, batch, size, kernel in cells:
            row: dict[str, Any] = {"model": name, "kind": kind, "batch": batch, "tokens": size, "kernel": kernel}
            measure: Callable[..., dict[str, Any]] = decoding if kind == "decoding" else prefill
            if kernel in CACHES:
                row |= {"kernel": None, "cache": kernel}
                measure, kernel = partial(decoding, kind=kernel), None
            if run.left < max(end, 2.0):
                row["failed"] = "no time left"
            else:
                with _forced(kernel):
                    one = _attempt(partial(measure, run, model, batch, size, rates))
                row |= one if isinstance(one, dict) else {"failed": one}
            _free()
            rows.append(row)
            run.keep(found)
        del model
        _free()
    return found


def speed_8b(run: Run) -> dict[str, Any]:
    contexts, prompts = ([64], [64]) if run.tiny else ([2048, 8192, 32768, 65536], [2048, 8192, 32768])
    return _speed(run, big_models(run, 1 if run.tiny else 4), contexts, prompts)


def speed(run: Run) -> dict[str, Any]:
    """SmolLM2: beyond the 8,192 positions that it was trained on, times mean the same, and its text would not."""
    folder = run.work / "96-32"

    def stock() -> Any:
        model = StockForCausalLM.from_pretrained(str(folder), dtype=run.dtype, local_files_only=True)
        return model.to(run.device).eval()

    makers: dict[str, Callable[[], Any]] = {
        "source": lambda: load_any(run.source, dtype=run.dtype, device=str(run.device)),
        "own class": lambda: load(folder, dtype=run.dtype, device=str(run.device)),
        "stock class": stock,
    }
    contexts, prompts = ([64], [64]) if run.tiny else ([2048, 8192, 32768, 65536], [2048, 8192])
    return _speed(run, makers, contexts, prompts)


def graphs(run: Run) -> dict[str, Any]:
    """A decoding step over a static cache: eagerly, as a CUDA graph and through torch.compile. SmolLM2 if it is there,
    else the 8B shape."""
    rows: list[dict[str, Any]] = []
    found = {"rows": rows}
    makers: dict[str, Callable[[], Any]] = {}
    if (run.work / "96-32").is_dir():
        makers["source"] = lambda: load_any(run.source, dtype=run.dtype, device=str(run.device))
        makers["own class"] = lambda: load(run.work / "96-32", dtype=run.dtype, device=str(run.device))
    else:
        makers = {name: make for name, make in big_models(run, 1 if run.tiny else 4).items() if "stock" not in name}
    batches, context = ((1,), 64) if run.tiny else ((1, 16), 2048)
    # a capture that fails can leave the device unusable, so what is safe comes first
    for way in ("eager", "compiled", "graph") if run.cuda else ("eager", "compiled"):
        for name, make in makers.items():
            model = make()
            for batch in batches:
                row: dict[str, Any] = {"model": name, "batch": batch, "context": context, "way": way}
                ms = _attempt(partial(_static_step, run, model, batch, context, way))
                row |= {"failed": ms} if isinstance(ms, str) else ms
                rows.append(row)
                run.keep(found)
            del model
            _free()
    return found


@torch.no_grad()
def _static_step(run: Run, model: Any, batch: int, context: int, way: str) -> dict[str, Any]:
    """Median milliseconds of a step, and the seconds before the first."""
    cache: Any = StaticCache(config=model.config, max_cache_len=context + 64)
    token = torch.zeros(batch, 1, dtype=torch.long, device=run.device)
    model(token, past_key_values=cache)  # allocates it

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    def step() -> torch.Tensor:
        logits: torch.Tensor = model(token, past_key_values=cache).logits
        return logits

    call: Callable[[], Any] = step
    rewind()
    started = time.perf_counter()
    if way == "compiled":
        torch._dynamo.reset()
        settings: dict[str, Any] = {"mode": "reduce-overhead"} if run.cuda else {"backend": "eager"}
        call = torch.compile(step, fullgraph=True, **settings)
        call()
    elif way == "graph":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        call = graph.replay
    rewind()
    wanted = step().float()
    rewind()
    before = time.perf_counter() - started
    agrees = None
    if way == "compiled":
        agrees = _relative(call().float(), wanted)
        rewind()
    ms = milliseconds(call, run.device, 4 if run.tiny else 20)
    return {"ms": ms, "first_seconds": before, "relative_difference": agrees}


# ---- conversion and healing


def _watch(run: Run, found: dict[str, Any]) -> Callable[[str, int, int, str], None]:
    """A progress function: seconds that go by in each stage, and what is remarked, kept as they come."""
    spent: dict[str, float] = found.setdefault("spent", {})
    remarks: list[list[Any]] = found.setdefault("remarks", [])
    last = kept = time.monotonic()

    def progress(stage: str, done: int, total: int, remark: str) -> None:
        nonlocal last, kept
        now = time.monotonic()
        spent[stage] = spent.get(stage, 0.0) + now - last
        last = now
        if remark.startswith("held out") and (not remarks or remarks[-1][2] != remark):
            remarks.append([done, total, remark])
        if now - kept > 5:
            kept = now
            run.keep(found)

    return progress


def _mix(run: Run) -> str:
    file = run.data / "wikitext2-train-part.txt" if run.data is not None else None
    return str(file) if file is not None and file.is_file() else "wikitext"


def _quality(run: Run, folder: Path, found: dict[str, Any]) -> None:
    """Perplexity on the texts, of the folder and its source, as `quality`."""
    settings: dict[str, Any] = {"windows": 2, "length": 128} if run.tiny else {"windows": 16, "length": 1024}
    names = texts(run.data)
    report = transmla.evaluate(
        folder, run.source, text=list(names.values()), device=str(run.device), **settings
    ).plain()
    by_path = {portable_name(path): name for name, path in names.items()}
    found["quality"] = {by_path[path]: ratio for path, ratio in report["comparison"]["texts"].items()}
    found["perplexity"] = {by_path[path]: one for path, one in report["model"]["texts"].items()}
    run.keep(found)


def _convert(run: Run, name: str, latent: int, rope: int, refine: str) -> dict[str, Any]:
    found: dict[str, Any] = {"refine": refine}
    settings: dict[str, Any] = {"latent": latent, "rope": rope, "refine": refine}
    file = _mix(run)
    settings["calibration"] = (
        f"{file}:4+code:2+synthetic:5+continued:3" if refine == "full" else f"{file}:2+synthetic+code"
    )
    if run.tiny:
        settings |= {"latent": 24 if latent < 100 else 40, "rope": 8, "tokens": 2048, "window": 128, "theta": 1e4}
    folder = run.work / name
    if not folder.is_dir():
        report = transmla.convert(run.source, folder, device=str(run.device), progress=_watch(run, found), **settings)
        found |= {"seconds": report.seconds, "tokens": report.num_calibration_tokens, "theta": report.theta}
        found["heldout_ratio"] = math.exp(report.heldout.converted - report.heldout.source)
        found["distilled"] = [[block.loss_before, block.loss_after, block.steps] for block in report.blocks]
        run.keep(found)
    _quality(run, folder, found)
    return found


def convert_96_32(run: Run) -> dict[str, Any]:
    return _convert(run, "96-32", 96, 32, run.refine)


def convert_160_32(run: Run) -> dict[str, Any]:
    return _convert(run, "160-32", 160, 32, run.refine)


def heal(run: Run) -> dict[str, Any]:
    """As many tokens as the time allows, and the texts before (of the conversion) and after."""
    found: dict[str, Any] = {}
    folder, target = run.work / "96-32", run.work / "96-32-healed"
    wiki, rest = _mix(run), "synthetic:3+continued:2+code"
    more = {name: run.data / f"{name}.txt" for name in ("docs", "modules")} if run.data is not None else {}
    data = "+".join(
        [f"{wiki}:3", rest, *(f"{more[name]}:{share}" for name, share in (("docs", 8), ("modules", 2))
                              if name in more and more[name].is_file())]
    )  # fmt: skip
    watched = next(iter(texts(run.data).values()))
    if run.tiny:  # the model that ships knows nothing but stories
        data, watched = "stories", "tinystories-valid"
    window, batch = (128, 4) if run.tiny else (1024, 32)
    compiled, rate = _fastest(run)
    found |= {"compiled": compiled, "data": data.replace(str(run.data), "DATA")}
    if not target.is_dir():  # else an earlier call has come that far
        tokens = 16384 if run.tiny else healing_tokens(min(run.left - 30, 300), rate, fixed=75.0 if compiled else 45.0)
        report = transmla.heal(
            folder, target, source=run.source, device=str(run.device), tokens=tokens, window=window, batch=batch,
            micro=batch, compile=compiled, rate=5e-3 if run.tiny else 1.4e-3, data=data, watch=watched,
            evaluations=2 if run.tiny else 8, heldout=2 if run.tiny else 8, restart=True, progress=_watch(run, found),
        )  # fmt: skip
        found |= {"tokens": report.tokens, "distinct": report.distinct, "passes": list(report.passes.values())}
        found |= {"seconds": report.seconds, "num_trained": report.num_trained, "rate": report.rate}
        found |= {"before": list(report.before.values()), "after": list(report.after.values())}
        found["tokens_per_second"] = report.tokens / found["spent"]["heal"]
    curve = json.loads((target / "healing.json").read_text("utf-8"))
    found["curve"] = [[one["tokens"], one["loss"]] for one in curve["heldout"]]
    found["loss"] = [[one["tokens"], one["loss"]] for one in curve["train"]]
    run.keep(found)
    _quality(run, target, found)
    pack(target, run.source, run.out / "back", 15 * 2**20)
    return found


def _fastest(run: Run) -> tuple[bool, float]:
    """Whether compiled layers pay, and tokens per second, as heal-rate has found; else those of the first visit."""
    rates: dict[bool, float] = {}
    with suppress(OSError, ValueError, KeyError):  # it may not have run, or not have come that far
        record = json.loads((run.out / "stages" / "heal-rate.json").read_text("utf-8"))
        for row in record["result"]["rows"]:
            ways = row["train"] == "attention" and set(row["compiled"]) in (set(), {"layers", "loss"})
            if ways and "tokens_per_second" in row:  # else it has failed, or was left out
                way = bool(row["compiled"])
                rates[way] = max(rates.get(way, 0.0), row["tokens_per_second"])
    plain, compiled = rates.get(False, 55_000.0), rates.get(True, 0.0)
    return (True, compiled) if compiled > 1.15 * plain else (False, plain)


def convert_8b(run: Run) -> dict[str, Any]:
    """Random layers of the 8B shape from disk to disk: seconds per layer and peak memory."""
    from tests.families import add_tokenizer

    layers = 2
    config = big_config(run.tiny, layers)
    source = run.work / "8b-source"
    if not (source / "config.json").is_file():
        settings = LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
        model = _random(run, LlamaForCausalLM, settings)
        _enliven(model)
        unfinished = source.with_name("8b-source.new")
        shutil.rmtree(unfinished, ignore_errors=True)  # of an earlier call, which was ended
        model.to(torch.bfloat16).save_pretrained(unfinished, max_shard_size="2GB")
        add_tokenizer(unfinished)
        unfinished.rename(source)
        del model
        _free()
        torch.cuda.reset_peak_memory_stats() if run.cuda else None
    found: dict[str, Any] = {"layers": layers}
    shutil.rmtree(run.work / "8b", ignore_errors=True)
    given: dict[str, Any] = {"latent": 512, "rope": 64, "window": 2048, "tokens": 180224, "theta": 5e5}
    if run.tiny:
        given = {"latent": 48, "rope": 16, "window": 64, "tokens": 1024, "theta": 5e5}
    report = transmla.convert(
        str(source), run.work / "8b", device=str(run.device), restart=True, progress=_watch(run, found), **given
    )
    found |= {"seconds": report.seconds, "tokens": report.num_calibration_tokens}
    found["verified"] = report.verification.relative_error
    found["of_32_layers"] = extrapolated(found["spent"], layers, 32)
    return found


@torch.no_grad()
def _enliven(model: Any) -> None:
    """Weights at which every part of a layer matters: rows of length about 1, of queries and keys 2, norms around 1."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.normal_(1.0, 0.3)
        else:
            # scores of attention with a deviation of 4: a mean over all tokens would be nothing but rounding
            size = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            weight.normal_(0.0, size * weight.shape[-1] ** -0.5 if "embed" not in name else 0.05)


_STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "environment": environment,
    "tests": tests,
    "own-form": own_form,
    "heal-rate": lambda run: heal_rates(run, _attempt),
    "kernels": kernels,
    "speed-8b": speed_8b,
    "convert-8b": convert_8b,
    "convert-96-32": convert_96_32,
    "speed": speed,
    "heal": heal,
    "graphs": graphs,
    "convert-160-32": convert_160_32,
}
