"""How much an error that goes with the value costs, found by trying: see `stretch` in modeling_transmla.py.

Legend: N windows, T tokens of one, t tokens of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from transmla.progress import Progress

# what is tried; bits per value that it is tried with, and at most so many windows
COHERENCES, CHOSEN_WITH, CHOSEN_ON = (1.0, 1.5, 2.0, 3.0), 2.0, 4
# tokens that go through a cache at once; the newest of them are exact
STEP = 64


def chosen_coherence(
    model: Any, ids_NT: Tensor, cache: Callable[[float], Cache], progress: Progress | None = None
) -> float:
    """Of `COHERENCES`, that of the cache with which predictions diverge least from those with an exact one.

    Models differ: errors that go with the value add up over 30 layers, and not over five (benchmarks/quantised.md).

    ids_NT: windows, of which at most `CHOSEN_ON` are used;  cache: makes an empty cache with a coherence
    """
    losses, stride = dict.fromkeys(COHERENCES, 0.0), -(-len(ids_NT) // CHOSEN_ON)
    chosen_NT = ids_NT[::stride].to(model.device)
    with torch.no_grad():
        for number, ids_T in enumerate(chosen_NT):
            exact_TV = model(ids_T[None], use_cache=False).logits[0].float().log_softmax(-1)
            for coherence in COHERENCES:
                losses[coherence] += divergence_through(model, ids_T, exact_TV, cache(coherence))
            if progress is not None:
                progress("choose levels", number + 1, len(chosen_NT), "")
    return min(COHERENCES, key=lambda coherence: losses[coherence])


@torch.no_grad()
def divergence_through(model: Any, ids_T: Tensor, exact_TV: Tensor, cache: Cache) -> float:
    """Mean divergence over the tokens of one text that go through a cache in steps of `STEP`, nats.

    exact_TV: log-probabilities with an exact cache
    """
    nats, start = 0.0, 0
    for part_t in ids_T.split(STEP):
        wanted_tV = exact_TV[start : start + len(part_t)]
        found_tV = model(part_t[None], past_key_values=cache).logits[0].float().log_softmax(-1)
        nats += float((wanted_tV.exp() * (wanted_tV - found_tV)).sum())
        start += len(part_t)
    return nats / len(ids_T)
