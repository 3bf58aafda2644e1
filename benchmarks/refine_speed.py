"""Cost of a distillation step against its floor: the matrix products it cannot do without, at the rate at which the
machine multiplies such matrices when it does nothing else. Both are measured alternately in one run.

    python benchmarks/refine_speed.py SRC [--latent 96 --rope 32 --window 1024 --repeats 5] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import transmla
from transmla.checkpoint.journal import Journal
from transmla.conversion.block import BlockDistiller
from transmla.conversion.descent import tokens_per_pass
from transmla.conversion.kept import KeptLayers
from transmla.conversion.levels import LEVELS, Descent
from transmla.conversion.run import Run
from transmla.maths.attention import MlaWeights, inverse_frequencies
from transmla.maths.closed_form import ClosedForm
from transmla.model.source import SourceModel
from transmla.processes import ALONE
from transmla.progress import silent
from transmla.text.windows import CalibrationTokens


def random_weights(run: Run) -> MlaWeights:
    mla, gqa = run.plan.mla, run.plan.gqa
    heads, hidden, rank, rope = mla.num_attention_heads, mla.hidden_size, mla.kv_lora_rank, mla.qk_rope_head_dim
    nope, value = mla.qk_nope_head_dim, mla.v_head_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape) / shape[-1] ** 0.5

    return MlaWeights(
        q_nope_HnD=normal(heads, nope, hidden),
        q_rope_HeD=normal(heads, rope, hidden),
        kv_down_rD=normal(rank, hidden),
        k_rope_eD=normal(rope, hidden),
        k_up_Hnr=normal(heads, nope, rank),
        v_up_Hvr=normal(heads, value, rank),
        o_DHv=normal(hidden, heads * value),
        inv_freq_M=inverse_frequencies(1e4, rope),
        scaling=gqa.head_dim**-0.5,
    ).to(device=run.device)


def multiply_adds(run: Run, window: int) -> dict[str, float]:
    """Of one token of one step, by part. Backward goes through everything, weights of attention get gradients."""
    config, mla = run.plan.source.config, run.plan.mla
    layers, hidden = mla.num_hidden_layers, mla.hidden_size
    keys, values = mla.qk_nope_head_dim + mla.qk_rope_head_dim, mla.v_head_dim
    attended = mla.num_attention_heads * window / 2  # a token sees half of the window on average
    return {
        "projections": 3 * layers * mla.attention_weights,
        "MLP": 2 * layers * 3 * hidden * int(config["intermediate_size"]),
        # forward: scores, outputs; backward: scores again, and gradients of queries, keys, probabilities, values
        "attention": layers * attended * ((keys + values) + (3 * keys + 2 * values)),
        "head": 3 * int(config["vocab_size"]) * hidden,
    }


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--latent", type=int, default=96)
    parser.add_argument("--rope", type=int, default=32)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    planned = transmla.plan(arguments.source, latent=arguments.latent, rope=arguments.rope)
    device = torch.device(arguments.device)
    model = SourceModel(planned.source, planned.family, planned.gqa, device)
    layers = planned.mla.num_hidden_layers
    windows = max(1, tokens_per_pass(device) // arguments.window)
    ids_NT = torch.randint(
        int(planned.source.config["vocab_size"]), (windows * (arguments.repeats + 1) + 1, arguments.window)
    )
    text = CalibrationTokens(ids_NT, "random", "", num_heldout=1)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        kept = KeptLayers(Journal(Path(folder) / "out", {}), planned.mla, ALONE, device)
        run = Run(planned, model, text, kept, ClosedForm(), LEVELS["fast"], device, ALONE, silent)
        streams = run.streams()
        block = [model.layer(index).narrowed(run.compute) for index in range(layers)]
        weights = [random_weights(run) for _ in range(layers)]
        distiller = BlockDistiller(block, weights, streams, model.ends(run.compute), Descent(1.0, windows, 1e-3))
        places = {place: place for place in range(len(ids_NT))}
        steps = distiller.descender.steps(lambda here: distiller.losses(here, distiller.trained)[0], places, windows)
        hidden, inner = planned.mla.hidden_size, int(planned.source.config["intermediate_size"])
        left, right = (
            torch.randn(shape, device=device, dtype=run.compute) for shape in ((2048, hidden), (hidden, inner))
        )
        found: dict[str, list[float]] = {"step": [], "rate": []}
        for repeat in range(arguments.repeats + 1):
            taken = seconds(lambda: next(steps), device)
            count = 20
            multiplied = seconds(lambda count=count: [left @ right for _ in range(count)], device)
            if repeat:  # the first of each warms up
                found["step"].append(taken / (windows * arguments.window))
                found["rate"].append(count * 2048 * hidden * inner / multiplied)
    parts = multiply_adds(run, arguments.window)
    step, rate = statistics.median(found["step"]), statistics.median(found["rate"])
    result = {
        "model": Path(arguments.source).name, "latent": arguments.latent, "rope": arguments.rope,
        "window": arguments.window, "device": device.type, "dtype": str(run.compute),
        "multiply_adds_per_token": parts, "multiply_adds_per_second": rate, "seconds_per_token": step,
        "times_the_floor": step * rate / sum(parts.values()),
        "spread": [min(found["step"]) / step, max(found["step"]) / step],
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
