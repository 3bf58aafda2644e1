"""What all that is packed is worth: perplexity if the packed tokens of a cache were forgotten instead.

    python benchmarks/dropped_tokens.py result.json smollm2 [OUT ...]

First and newest tokens stay, as they are exact in every packed cache that `transmla eval --quantised` measures; the
rest is masked out (StreamingLLM, 2309.17453). The windows are those of the result file, to whose source the ratio is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from transmla.evaluation.measure import windows_of
from transmla.evaluation.perplexity import Perplexity, perplexity, ratio
from transmla.evaluation.quantised_cache import RECENT
from transmla.maths.coding import SINK
from transmla.model.loading import load_any, load_tokenizer


class Forgetful:
    """A model that sees of each text what is exact in a packed cache, which is filled `RECENT` tokens at a time."""

    def __init__(self, model: Any) -> None:
        self._model, self.device = model, model.device

    def __call__(self, ids: torch.Tensor, **_: Any) -> Any:
        at = torch.arange(ids.shape[1])
        # tokens that were packed before the chunk of each query: whole steps behind the first ones, but for the newest
        before = at // RECENT * RECENT
        packed = ((before - SINK - RECENT) // RECENT * RECENT).clamp_min(0) + SINK
        seen = (at <= at[:, None]) & ((at < SINK) | (at >= packed[:, None]))
        mask = seen[None, None].expand(len(ids), -1, -1, -1)
        return self._model(ids, attention_mask=mask, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    (text, measured), *_ = result["source"]["texts"].items()
    base = Perplexity(tuple(measured["nats"]), 0)
    for name in arguments.models:
        ids_NT = windows_of(text, load_tokenizer(name), measured["length"], len(base.nats_N), result["made"]["begin"])
        found = perplexity(Forgetful(load_any(name, dtype=torch.bfloat16)), ids_NT)
        compared = ratio(found, base)
        times = f"{compared.value:.4f} ± {compared.standard_error:.4f} times the source"
        print(f"{name}: perplexity {found.value:.3f}, {times}")


if __name__ == "__main__":
    main()
