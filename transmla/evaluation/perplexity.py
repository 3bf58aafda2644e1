"""Perplexity over windows of a text, with its standard error, and the paired ratio of two models.

Legend: N windows, T tokens per window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor

from transmla.errors import DataError, VerificationError
from transmla.model.head import head_of
from transmla.train.losses import text_nats

# all at once: a gigabyte in float32
MANY_LOGITS = 2**28


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss per window; `standard_error` in the same unit, from the spread over windows.

    nats_N: mean cross-entropy of each window in nats; num_tokens: read, of which all but the first of a window count
    """

    nats_N: tuple[float, ...]
    num_tokens: int

    @property
    def nats(self) -> float:
        return sum(self.nats_N) / len(self.nats_N)

    @property
    def value(self) -> float:
        return math.exp(self.nats)

    @property
    def standard_error(self) -> float:
        """Of the value: exp(m) times the standard error of the mean m (delta method)."""
        return self.value * standard_error(self.nats_N)


@dataclass(frozen=True)
class Ratio:
    """Perplexity of one model over another's on the same windows; the error is that of the paired difference."""

    value: float
    standard_error: float


def text_windows(ids: list[int], length: int, num_windows: int, name: str) -> Tensor:
    """The first windows of a text, int64 [N, T]; raises `DataError` if not even one is full."""
    full = min(num_windows, len(ids) // length)
    if full < 1:
        raise DataError(
            f"the text is too short: {len(ids):,} tokens",
            where=name,
            why=f"perplexity is measured on windows of {length:,} tokens",
            remedy="use a longer text, or a smaller --length",
        )
    return torch.tensor(ids[: full * length]).view(full, length)


def perplexity(
    model: Any,
    ids_NT: Tensor,
    *,
    batch: int | None = None,
    unscored: int = 1,
    progress: Callable[[int, int], None] | None = None,
    cache: Callable[[], Any] | None = None,
    chunk: int = 64,
) -> Perplexity:
    """Teacher-forced perplexity; the first tokens of each window are not scored.

    model: a transformers causal language model
    batch: windows at once; default: 2 on CPUs, elsewhere 16 or as many as fit into memory
    unscored: how many these are, at least 1: the first token has nothing that predicts it
    cache: makes a cache that the keys and values go through, `chunk` tokens at a time: what they attend to is what
           decoding would attend to, see quantised_cache.py
    Raises `VerificationError` if the model returns NaN.
    """
    if batch is None:
        # in chunks there are few tokens and few logits of each window at once
        batch = (2 if cache is None else 8) if model.device.type == "cpu" else 16
    nats: list[float] = []

    def run(size: int) -> None:
        if progress is not None:
            progress(len(nats), len(ids_NT))
        for ids_BT in ids_NT[len(nats) :].split(size):
            ids_BT = ids_BT.to(model.device)
            if cache is None and _has_many_logits(model, ids_BT):
                loss_BT = _losses_by_rows(model, ids_BT)
            else:
                loss_BT = _losses(model, ids_BT, cache, chunk)
            nats.extend(loss_BT[:, unscored - 1 :].mean(1).tolist())
            if progress is not None:
                progress(len(nats), len(ids_NT))

    with torch.no_grad():
        find_executable_batch_size(run, starting_batch_size=batch)()
    if not all(math.isfinite(value) for value in nats):
        raise VerificationError(
            "the model returns NaN or infinity",
            where=f"window {next(i for i, value in enumerate(nats) if not math.isfinite(value))}",
            why="a loss is not finite",
            remedy="try --dtype float32; if it stays, convert again",
        )
    return Perplexity(tuple(nats), ids_NT.numel())


def _losses(model: Any, ids_BT: Tensor, cache: Callable[[], Any] | None, chunk: int) -> Tensor:
    """Next-token losses [B, T - 1], `chunk` tokens at a time through a cache if there is one."""
    through = {"use_cache": False} if cache is None else {"past_key_values": cache()}
    size = ids_BT.shape[1] if cache is None else chunk
    losses = []
    for start in range(0, ids_BT.shape[1], size):
        end = start + size
        next_BT = ids_BT[:, start + 1 : end + 1]
        logits_BTV = model(ids_BT[:, start:end], **through).logits[:, : next_BT.shape[1]].float()
        losses.append(torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), next_BT, reduction="none"))
    return torch.cat(losses, dim=1)


def _has_many_logits(model: Any, ids_BT: Tensor) -> bool:
    """Whether those of all tokens at once would be a matter of gigabytes."""
    return hasattr(model, "get_decoder") and ids_BT.numel() * model.get_input_embeddings().num_embeddings > MANY_LOGITS


def _losses_by_rows(model: Any, ids_BT: Tensor) -> Tensor:
    """Next-token losses [B, T - 1], with the logits of few tokens at a time."""
    hidden_BTD = model.get_decoder()(ids_BT, use_cache=False).last_hidden_state[:, :-1]
    head, labels_BT = head_of(model), ids_BT[:, 1:]
    loss_N, _ = text_nats(hidden_BTD.flatten(0, 1), head.logits, labels_BT.flatten(), len(head.weight_VD))
    return loss_N.view_as(labels_BT)


def ratio(model: Perplexity, source: Perplexity) -> Ratio:
    """exp of the mean paired difference in nats."""
    differences = tuple(a - b for a, b in zip(model.nats_N, source.nats_N, strict=True))
    value = math.exp(sum(differences) / len(differences))
    return Ratio(value, value * standard_error(differences))


def standard_error(values: tuple[float, ...]) -> float:
    """Of the mean of independent values; NaN for a single one, which has no spread."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
