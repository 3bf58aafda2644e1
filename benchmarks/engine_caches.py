"""llama.cpp's own quantised caches on converted models: which run, what they hold, what they cost beside f16.

    python benchmarks/engine_caches.py FILE.gguf ... --tokenizer FOLDER --python VENV/bin/python --out OUT.json
        [--text wikitext-valid] [--windows 4] [--context 512] [--scored 48]

VENV holds `pip install xllamacpp`, llama.cpp with its server built in. Each window is read up to the last `--scored`
tokens; these then come one by one, so every prediction reads the packed cache. Whole distributions are compared with
those of the first cache, f16 without flash attention. Each case runs in a process of its own, since llama.cpp may abort
where it does not agree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TYPES = ("F16", "Q8_0", "Q4_0")
FLASH = ("DISABLED", "ENABLED")


def serve(task: dict[str, Any]) -> None:
    """In the engine's Python: the loss of each scored token, and log probabilities of all tokens, into files."""
    import numpy as np
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = task["model"], task["context"], 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = task["threads"]
    kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{task['type']}")
    settings.cache_type_k = settings.cache_type_v = kind  # of latent attention both have to be the same
    settings.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{task['flash']}")
    settings.warmup, settings.verbosity = False, 5
    server = xllamacpp.Server(settings)
    nats, tables = [], []
    for ids in task["windows"]:
        for end in range(len(ids) - task["scored"], len(ids)):
            answer = server.handle_completions({
                "prompt": ids[:end], "max_tokens": 1, "temperature": 0, "cache_prompt": True,
                "logprobs": task["vocabulary"],
            })  # fmt: skip
            if "choices" not in answer:
                raise RuntimeError(str(answer)[:300])
            table = np.full(task["vocabulary"], -40.0, dtype=np.float32)
            for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                table[one["id"]] = one["logprob"]
            nats.append(-float(table[ids[end]]))
            tables.append(table)
    np.save(task["tables"], np.stack(tables))
    Path(task["nats"]).write_text(json.dumps(nats))


def run(python: str, task: dict[str, Any]) -> tuple[str | None, str]:
    """Why a case does not run, or None; and what the engine said."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(task))
        file.flush()
        done = subprocess.run(
            [python, __file__, "--serve", file.name], capture_output=True, text=True, errors="replace", check=False
        )
    said = done.stdout + done.stderr
    if done.returncode == 0:
        return None, said
    reasons = re.findall(r"(?:llama_init_from_model|GGML_ASSERT|ggml_abort|assert)[^\n]*", said)
    return (reasons[0] if reasons else said.strip().splitlines()[-1])[:200], said


def main() -> None:
    """All cases of all files, one after the other."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("files", nargs="*")
    words.add_argument("--serve")
    words.add_argument("--tokenizer")
    words.add_argument("--python", default=sys.executable)
    words.add_argument("--out")
    words.add_argument("--engine", default="llama.cpp in xllamacpp", help="its version, for the result")
    words.add_argument("--text", default="wikitext-valid")
    for name, default in (("windows", 4), ("context", 512), ("scored", 48), ("threads", 1)):
        words.add_argument(f"--{name}", type=int, default=default)
    given = words.parse_args()
    if given.serve:
        serve(json.loads(Path(given.serve).read_text("utf-8")))
        return
    import numpy as np

    from transmla.model.loading import load_tokenizer
    from transmla.text.sources import read_text

    tokenizer = load_tokenizer(given.tokenizer)
    text = read_text(given.text, 12 * given.context * given.windows, evaluation=True)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    length = given.context - 8
    task = {
        "context": given.context, "scored": given.scored, "threads": given.threads, "vocabulary": len(tokenizer),
        "windows": [ids[length * number : length * (number + 1)] for number in range(given.windows)],
    }  # fmt: skip
    rows = []
    for file in given.files:
        reference = base = None
        for kind, flash in ((kind, flash) for kind in TYPES for flash in FLASH):
            with tempfile.TemporaryDirectory() as folder:
                tables, nats = os.path.join(folder, "tables.npy"), os.path.join(folder, "nats.json")
                case = {"model": file, "type": kind, "flash": flash, "tables": tables, "nats": nats}
                why, said = run(given.python, task | case)
                row: dict[str, Any] = {"file": Path(file).name, "cache": kind.lower(), "flash_attention": flash.lower()}
                rows.append(row | {"refused": why})
                if why is None:
                    found, losses = np.load(tables).astype(np.float64), json.loads(Path(nats).read_text("utf-8"))
                    if reference is None:
                        reference, base = found, losses
                    assert base is not None
                    divergences = (np.exp(reference) * (reference - found)).sum(-1)
                    changes = [one - other for one, other in zip(losses, base, strict=True)]
                    # said once more of a context that it measures first
                    sizes = set(re.findall(r"size = +([\d.]+) MiB \( *(\d+) cells", said))
                    rows[-1] |= {
                        "bytes_per_token": sum(float(size) * 2**20 / int(cells) for size, cells in sizes) or None,
                        "ratio": math.exp(statistics.mean(changes)),
                        "ratio_error": math.exp(statistics.mean(changes))
                        * statistics.stdev(changes)
                        / math.sqrt(len(changes)),
                        "divergence": float(divergences.mean()),
                        "perplexity": math.exp(statistics.mean(losses)),
                    }
                print(json.dumps(rows[-1]), flush=True)
    if given.out:
        Path(given.out).write_text(json.dumps({"rows": rows, "setting": {
            "text": given.text, "windows": given.windows, "context": length, "scored": given.scored,
            "engine": given.engine,
        }}, indent=1) + "\n", encoding="utf-8")  # fmt: skip


if __name__ == "__main__":
    main()
