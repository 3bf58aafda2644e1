"""What the gains of a token gain: transform coded caches with gains chosen in several ways.

    python benchmarks/coding_gains.py smollm2 --text wikitext2-valid.raw c4-sample.jsonl --out smollm2-gains.json
    python benchmarks/coding_gains.py smollm2-160-32-coded --text wikitext2-valid.raw c4-sample.jsonl --out ...

Of a source (`eval --coded-source`) or of a folder that `transmla quantise` has prepared: mean divergence of the
predictions from those with an exact cache, in nats per token, 64 tokens at a time through the cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from transmla.checkpoint.companions import tokenizer
from transmla.evaluation.coded_source import CodedSource
from transmla.evaluation.measure import windows_of
from transmla.evaluation.quantised_cache import RECENT
from transmla.maths.coding import SINK
from transmla.model import modeling_transmla as modeling
from transmla.model.loading import is_converted, load_any, open_model
from transmla.targets.quantise import MIX, TOKENS, WINDOW
from transmla.text.windows import calibration_tokens

# fewest bits of coordinates that have the wider gain, and gains that are tried
STEPS = {
    "the root of the mean square": (9, (0,)),
    "of all coordinates, the best of seven": (1, modeling.GAINS_TRIED),
    "of those with 6 bits and more, the best of seven": (modeling.WIDE_BITS, modeling.GAINS_TRIED),
}


@torch.no_grad()
def divergence(model: Any, ids_T: Tensor, exact_TV: Tensor, cache: Any) -> float:
    """Mean over the tokens of one window."""
    parts = [model(ids_t[None], past_key_values=cache).logits[0] for ids_t in ids_T.split(RECENT)]
    found_TV = torch.cat(parts).float().log_softmax(-1)
    return float((exact_TV.exp() * (exact_TV - found_TV)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", default=["wikitext-valid"])
    parser.add_argument("--windows", type=int, default=1, help="of each text")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--bits", type=float, nargs="+", default=[5, 3.3, 2, 1])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, source = load_any(arguments.model, dtype=getattr(torch, arguments.dtype)), open_model(arguments.model)
    cutter = tokenizer(source)
    windows = [
        (text, ids_T)
        for text in arguments.text
        for ids_T in windows_of(text, cutter, arguments.length, arguments.windows)
    ]
    with torch.no_grad():
        exact = [model(ids_T[None]).logits[0].float().log_softmax(-1) for _, ids_T in windows]
    coded = None
    if not is_converted(Path(arguments.model)):
        coded = CodedSource(model, source, calibration_tokens(MIX, cutter, TOKENS, WINDOW).ids_NT)
    rows = []
    for name, (wide, gains) in STEPS.items():
        with patch.multiple(modeling, WIDE_BITS=wide, GAINS_TRIED=gains, FEW_BITS=0):
            for bits in arguments.bits:
                losses = []
                for (_, ids_T), exact_TV in zip(windows, exact, strict=True):
                    cache = (
                        coded.cache(bits) if coded else model.latent_cache(f"coded{bits:g}", sink=SINK, recent=RECENT)
                    )
                    losses.append(divergence(model, ids_T, exact_TV, cache))
                row = {"step": name, "bits": bits, "divergence": losses, "mean": sum(losses) / len(losses)}
                print(name, bits, f"{row['mean']:.5f} nats", flush=True)
                rows.append(row)
    made = {name: value for name, value in vars(arguments).items() if name != "out"}
    made |= {"model": Path(arguments.model).name, "windows_of": [text for text, _ in windows]}
    arguments.out.write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
