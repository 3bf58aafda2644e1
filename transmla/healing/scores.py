"""What is measured on held-out windows, and which state is the best one: the nearest to its source on all texts alike.

A state that is further from the source than the start on any text, by more than the error of the paired difference, is
never the best one: what training gains on its own text it may lose on another.

Legend: N held-out windows of all texts.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from transformers import EvalPrediction

Array = np.ndarray


def by_text(
    evaluation: EvalPrediction,
    counts: list[int],
    names: list[str],
    start_N: Array | None = None,
    cross_entropy: float = 0.0,
) -> dict[str, float]:
    """`METRICS` over all held-out windows, and over those of each text with the key prefixed "NAME/"; and `score`.

    evaluation:    divergence, nats and source_nats of each window, in the order of the texts, and the losses
    counts:        number of windows of each text;  names: names of the texts
    start_N:       divergence of each window before training
    cross_entropy: share of the loss that is the text's own

    score: what the best state has least of: the mean over texts of the divergence, or of the mix with the loss on the
    text that is trained on; infinite if a loss is, and if any text is "NAME/raised": 1.0 where its divergence rose by
    more than its error
    """
    divergence, nats, source_nats = (np.asarray(part, dtype=np.float64) for part in evaluation.predictions)
    metrics: dict[str, float] = {}
    start, scores = 0, []
    for name, count in zip(["", *(f"{name}/" for name in names)], [sum(counts), *counts], strict=True):
        part = slice(0, count) if not name else slice(start, start + count)
        start += count if name else 0
        gap = source_nats[part] - nats[part]
        recovery = float(np.exp(gap.mean()))
        metrics |= {
            f"{name}divergence": float(divergence[part].mean()),
            f"{name}nats": float(nats[part].mean()),
            f"{name}source_nats": float(source_nats[part].mean()),
            f"{name}recovery": recovery,
            f"{name}recovery_error": recovery * float(gap.std(ddof=1)) / math.sqrt(count),
        }
        if name:
            scores.append((1 - cross_entropy) * divergence[part].mean() + cross_entropy * nats[part].mean())
            metrics[f"{name}raised"] = float(start_N is not None and _has_risen(divergence[part] - start_N[part]))
    is_raised = any(metrics[f"{name}/raised"] for name in names)
    score = float(np.mean(scores))
    is_finite = math.isfinite(score) and (evaluation.losses is None or np.isfinite(evaluation.losses).all())
    metrics["score"] = score if is_finite and not is_raised else math.inf
    return metrics


def _has_risen(rise_N: Array) -> bool:
    return bool(rise_N.mean() > rise_N.std(ddof=1) / math.sqrt(len(rise_N)))


def divergence_at_start(path: Path, divergence_N: Array, *, is_start: bool, writes: bool) -> Array:
    """Divergences of the windows before training: these if they are, else those of `path`, which a resumed run reads.

    writes: whether this process keeps them in the file
    """
    if not is_start or path.is_file():
        found: Array = np.load(path, allow_pickle=False)
        return found
    if writes:
        partial = path.with_suffix(".partial.npy")
        np.save(partial, divergence_N)
        os.replace(partial, path)
    return divergence_N
