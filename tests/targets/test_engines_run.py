"""The engines themselves on a converted stories260k, compared with the stock class in float32.

    pytest -m engines

Nothing is installed here. An engine is looked for in this Python, or in the one that an environment variable names
(TRANSMLA_PYTHON_LLAMA_CPP, TRANSMLA_PYTHON_MLX, TRANSMLA_PYTHON_VLLM), since they need other versions of the same
packages; where it is missing, its tests are skipped and say so. benchmarks/engines.py does this on a real model.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import transmla
from tests.families import MakeSource
from transmla.checkpoint.gguf.write import QUANTISER
from transmla.model.loading import load_tokenizer
from transmla.text.sources import read_text

pytestmark = pytest.mark.engines

RUNNER = Path(__file__).parents[2] / "benchmarks" / "engine_runner.py"
PYTHONS = {"llama.cpp": "LLAMA_CPP", "MLX-LM": "MLX", "vLLM (CPU)": "VLLM", "vLLM (CPU, transformers)": "VLLM"}
MODULES = {"LLAMA_CPP": "llama_cpp", "MLX": "mlx_lm", "VLLM": "vllm"}
# relative deviation of the perplexity, and KL to the reference in nats, that a number format explains
F32, HALF, EIGHT_BIT, FOUR_BIT = (5e-4, 1e-4), (5e-3, 2e-3), (5e-3, 5e-3), (0.05, 0.05)
# one window is too few for these bounds: rounding moves its perplexity up or down by half a percent
LENGTH, NUM_WINDOWS = 256, 8


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "mla"
    transmla.convert("smoke", folder)
    return folder


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    text = read_text("tinystories-valid", 12 * LENGTH * NUM_WINDOWS, evaluation=True)
    ids = load_tokenizer("stories260k")(text, add_special_tokens=False, verbose=False).input_ids
    return [ids[LENGTH * number : LENGTH * (number + 1)] for number in range(NUM_WINDOWS)]


def python_of(engine: str) -> str:
    python = os.environ.get(f"TRANSMLA_PYTHON_{PYTHONS[engine]}", sys.executable)
    found = subprocess.run(
        [python, "-c", f"import {MODULES[PYTHONS[engine]]}"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip(f"{engine} is not installed: {(found.stderr.strip().splitlines() or ['no message'])[-1]}")
    return python


def run(engine: str, model: Path, dtype: str, windows: list[list[int]], folder: Path) -> tuple[dict[str, Any], Any]:
    task = {
        "engine": engine, "model": str(model), "dtype": dtype, "windows": windows, "prefixes": windows,
        "prompt": windows[0][:20], "num_greedy": 24, "contexts": [LENGTH], "steps": 4, "threads": 2,
        "out": str(folder / "l.npz"),
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(task))
    command = [python_of(engine), str(RUNNER), str(folder / "task.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert not result["errors"], result["errors"]
    return result, np.load(folder / "l.npz")["last"].astype(np.float64)


def check(
    converted: Path, windows: list[list[int]], result: dict[str, Any], last: Any, tolerance: tuple[float, float]
) -> None:
    """Perplexity, distribution behind each window and, in full precision, greedy text."""
    transmla.register()
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    ids, prompt = torch.tensor(windows), torch.tensor([windows[0][:20]])
    with torch.no_grad():
        logits = model(ids).logits
        nats = float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        text = model.generate(
            prompt, do_sample=False, max_new_tokens=24, min_new_tokens=24, pad_token_id=0,
            attention_mask=torch.ones_like(prompt),
        )[0, 20:].tolist()  # fmt: skip
    own, found = (torch.log_softmax(one.double(), -1) for one in (logits[:, -1], torch.tensor(last)))
    deviation = math.exp(sum(result["nats"]) / len(windows) - nats) - 1
    divergence = float((own.exp() * (own - found)).sum(-1).mean())
    print(f"perplexity {deviation:+.5f}, KL {divergence:.2e}")
    assert abs(deviation) < tolerance[0] and divergence < tolerance[1]
    if tolerance == F32:
        assert result["greedy"] == text


@pytest.mark.parametrize(
    ("type", "tolerance"), [("f32", F32), ("bf16", HALF), ("f16", HALF), ("q8_0", EIGHT_BIT), ("q4_k_m", FOUR_BIT)]
)
def test_llama_cpp(
    converted: Path, windows: list[list[int]], tmp_path: Path,
    type: str, tolerance: tuple[float, float],
) -> None:  # fmt: skip
    python_of("llama.cpp")
    out = tmp_path / "model.gguf"
    if type == "q4_k_m" and importlib.util.find_spec("llama_cpp") is None and not shutil.which(QUANTISER):
        pytest.skip(f"neither {QUANTISER} nor the package llama_cpp is installed here")
    transmla.export(converted, out, type=type)
    result, last = run("llama.cpp", out, type, windows, tmp_path)
    check(converted, windows, result, last, tolerance)
    # 32 values of 2 bytes in 5 layers: the latent alone is cached
    assert result["bytes_per_token"] == pytest.approx(32 * 2 * 5, rel=0.05)


def test_mlx(converted: Path, windows: list[list[int]], tmp_path: Path) -> None:
    result, last = run("MLX-LM", converted, "float32", windows, tmp_path)
    check(converted, windows, result, last, F32)
    assert result["bytes_per_token"] == 32 * 4 * 5


def test_mlx_with_biases(lively: MakeSource, windows: list[list[int]], tmp_path: Path) -> None:
    """Every bias of the stock form, and the constant in the queries' latent."""
    python_of("MLX-LM")
    folder = tmp_path / "mla"
    transmla.convert(str(lively(model_type="qwen2")), folder, latent=16, rope=8, refine="off", tokens=4096, window=256)
    result, last = run("MLX-LM", folder, "float32", windows, tmp_path)
    check(folder, windows, result, last, F32)
    assert result["bytes_per_token"] == 24 * 4 * 3


def test_vllm_with_biases(lively: MakeSource, windows: list[list[int]], tmp_path: Path) -> None:
    """The stock class in vLLM has every bias; vLLM's own class drops them without a word."""
    python_of("vLLM (CPU)")
    sizes: dict[str, Any] = {"hidden": 512, "heads": 4, "kv_heads": 4, "head_dim": 80, "max_position_embeddings": 512}
    folder, source = tmp_path / "mla", lively(model_type="qwen2", layers=2, **sizes)
    settings: dict[str, Any] = {"refine": "off", "tokens": 4096, "window": 256}
    transmla.convert(str(source), folder, latent=512, rope=64, **settings)
    result, last = run("vLLM (CPU, transformers)", folder, "float32", windows, tmp_path)
    check(folder, windows, result, last, F32)
    assert result["bytes_per_token"] == pytest.approx(576 * 4 * 2, rel=0.05)
    result, last = run("vLLM (CPU)", folder, "float32", windows, tmp_path)
    with pytest.raises(AssertionError):
        check(folder, windows, result, last, F32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", F32), ("bfloat16", HALF)])
def test_vllm(
    converted: Path, windows: list[list[int]], tmp_path: Path, dtype: str, tolerance: tuple[float, float]
) -> None:
    transmla.export(converted, tmp_path / "padded", to="vllm", size="512+64")
    result, last = run("vLLM (CPU)", tmp_path / "padded", dtype, windows, tmp_path)
    check(converted, windows, result, last, tolerance)


@pytest.mark.parametrize("model_type", ["qwen3", "mixtral"])
def test_vllm_with_the_own_form(lively: MakeSource, windows: list[list[int]], tmp_path: Path, model_type: str) -> None:
    """The plugin: transmla has to be installed in vLLM's Python. benchmarks/served.py does it with all families."""
    python_of("vLLM (CPU)")
    sizes: dict[str, Any] = {"hidden": 640, "heads": 8, "kv_heads": 4, "head_dim": 128, "max_position_embeddings": 512}
    folder, source = tmp_path / "mla", lively(model_type=model_type, layers=2, **sizes)
    transmla.convert(str(source), folder, latent=512, rope=64, refine="off", tokens=4096, window=256)
    result, last = run("vLLM (CPU)", folder, "float32", windows, tmp_path)
    check(folder, windows, result, last, F32)
    assert result["bytes_per_token"] == pytest.approx(576 * 4 * 2, rel=0.05)
