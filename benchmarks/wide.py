"""What a conversion needs at the sizes of large models: seconds by stage, memory over time, how well it generalises.

    python benchmarks/wide.py WORK --layers 2 --tokens 8192 --out benchmarks/results/wide/NAME.json
    python benchmarks/wide.py WORK ... --checkout OTHER      # another checkout of transmla, for a comparison

A checkpoint of the recipe's shape is made in WORK, layer by layer, of random lively weights (rows of length about 1, of
queries and keys 2), in bfloat16 shards of one layer each; then it is converted in a process of its own, whose resident
memory is read all the time. Random weights say nothing of quality, but a regression that fits noise is seen all the
same: errors of each layer on the windows that it was fitted to, and on held-out ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from transmla.recipe import find_recipe, load_recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.families import add_tokenizer

CHILD = """
import json, sys, time
import transmla
settings, progress_file = json.loads(sys.argv[1]), sys.argv[2]
spent, last = {}, time.monotonic()
def progress(stage, done, total, remark):
    global last
    now = time.monotonic()
    spent[stage] = spent.get(stage, 0.0) + now - last
    last = now
    print(f"{stage} {done}/{total} {remark}", file=sys.stderr, flush=True)
found = transmla.convert(progress=progress, **settings)
report = {"seconds": found.seconds, "spent": spent, "tokens": found.num_calibration_tokens,
          "layers": [vars(layer) for layer in found.layers], "verified": found.verification.relative_error}
open(progress_file, "w").write(json.dumps(report))
"""


def make_source(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of random weights, of which never more than a layer is in memory."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True)
    settings = LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(settings).state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    files: dict[str, str] = {}
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        generator = torch.Generator().manual_seed(number)
        save_file({name: _lively(name, shapes[name], generator) for name in names}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    add_tokenizer(folder)


def _lively(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    weight = torch.empty(shape)
    if name.endswith("norm.weight"):
        return weight.normal_(1.0, 0.3, generator=generator).bfloat16()
    if "embed" in name:
        return weight.normal_(0.0, 0.05, generator=generator).bfloat16()
    # scores of attention with a deviation of 4: a mean over all tokens would be nothing but rounding
    size = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
    return weight.normal_(0.0, size * shape[-1] ** -0.5, generator=generator).bfloat16()


def watched(command: list[str], environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Run a command; its resident memory in GiB, once a second at first, less often later, and the peak that the system
    has counted."""
    started, curve, every = time.monotonic(), [], 1.0
    with log.open("w") as stderr, subprocess.Popen(command, env=environment, stderr=stderr, cwd=log.parent) as process:
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                anonymous = seen.memory_full_info().uss if len(curve) % 10 == 0 else None
                curve.append(
                    [time.monotonic() - started, seen.memory_info().rss / 2**30, anonymous and anonymous / 2**30]
                )
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                break
            every = min(10.0, every * 1.01)
            time.sleep(every)
    if process.returncode:
        raise SystemExit(f"the conversion failed, see {log}")
    return {
        # the only child; in KiB, on a Mac in bytes
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        / (2**30 if sys.platform == "darwin" else 2**20),
        "rss_gib": [[round(x, 2) for x in point if x] for point in curve],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipe", default="llama-3-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths and the number of heads by this")
    parser.add_argument("--latent", type=int, default=512)
    parser.add_argument("--rope", type=int, default=64)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--refine", default="off")
    parser.add_argument("--block-layers", type=int, help="layers that are refined together")
    parser.add_argument("--theta", type=float)
    parser.add_argument("--dtype", help="of the written weights")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    path = find_recipe(args.recipe)
    assert path is not None
    shape = load_recipe(path).model
    assert shape is not None
    config = shape.config | {"rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    if args.layers:
        config["num_hidden_layers"] = args.layers
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        config[key] //= args.shrink
    name = f"{args.recipe}-{config['num_hidden_layers']}-{args.shrink}"
    source = args.work / name
    make_source(source, config)
    target = args.work.resolve() / f"{name}-mla"
    settings = {"source": str(source.resolve()), "destination": str(target), "restart": True, "refine": args.refine}
    settings |= {"latent": args.latent, "rope": args.rope, "tokens": args.tokens, "theta": args.theta}
    settings |= {"dtype": args.dtype, "block_layers": args.block_layers}
    settings = {key: value for key, value in settings.items() if value is not None}
    shutil.rmtree(target, ignore_errors=True)
    result = args.work.resolve() / "report.json"
    environment = os.environ | {"PYTHONPATH": str(args.checkout.resolve())}
    command = [sys.executable, "-c", CHILD, json.dumps(settings), str(result)]
    found = watched(command, environment, args.work / f"{name}.log")
    shapes = {key: config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    kept = {key: value for key, value in settings.items() if key not in ("source", "destination", "restart")}
    report = {"model": args.recipe, "shape": shapes, "settings": kept, "threads": torch.get_num_threads()}
    report |= json.loads(result.read_text()) | found
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    losses = [(layer["stream_loss_fitted"], layer["stream_loss_heldout"]) for layer in report["layers"]]
    print(f"{report['seconds']:.0f} s, peak {report['peak_rss_gib']:.2f} GiB")
    print("stream error fitted, held out:", *(f"{fitted:.2%} {heldout:.2%}" for fitted, heldout in losses))


if __name__ == "__main__":
    main()
