"""Perplexity by position: whether what was converted on short windows holds at the end of long ones.

Legend: N windows, T tokens per window.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transmla.evaluation.agreement import predictions
from transmla.train.losses import text_nats

EDGES = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class ByPosition:
    """nats_NR: mean loss of each window in each range of positions edges[r] .. edges[r + 1]."""

    edges: tuple[int, ...]
    nats_NR: tuple[tuple[float, ...], ...]

    @property
    def perplexities(self) -> tuple[float, ...]:
        """One per range, over all windows."""
        return tuple(math.exp(sum(column) / len(column)) for column in zip(*self.nats_NR, strict=True))


def edges_up_to(length: int) -> tuple[int, ...]:
    """Doubling ranges that end at `length`."""
    return (*(edge for edge in EDGES if edge < length), length)


def by_position(model: Any, ids_NT: Tensor, unscored: int = 1) -> ByPosition:
    """Teacher-forced loss of a transformers causal language model, averaged over ranges of positions.

    unscored: how many of the first tokens count nowhere, as in `perplexity`
    """
    edges = edges_up_to(ids_NT.shape[1])
    rows = []
    for ids_T in ids_NT:
        made = predictions(model, ids_T[None])
        read_TD, labels_T = (x_T.to(model.device) for x_T in (made.hidden_NTD[0, :-1], ids_T[1:]))
        nats_T, _ = text_nats(read_TD, made.head.logits, labels_T, len(made.head.weight_VD))
        ranges = itertools.pairwise((unscored - 1, *edges[1:]))
        rows.append(tuple(float(nats_T[start:end].mean()) for start, end in ranges))
    return ByPosition(edges, tuple(rows))
