"""How closely a model follows its source, token by token: KL divergence and agreement of the first choice.

Legend: N windows, T tokens per window, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.evaluation.perplexity import standard_error
from transmla.model.head import Head, head_of
from transmla.train.losses import few_rows

# tokens whose logits are in memory at once
CHUNK = 256


@dataclass(frozen=True)
class Predictions:
    """What a model predicts, without the model: inputs of its head, and the head.

    hidden_NTD: in the model's dtype, on the CPU;  head: hidden [T, D] -> logits [T, V]
    """

    hidden_NTD: Tensor
    head: Head


@dataclass(frozen=True)
class Mean:
    """A mean over windows and its standard error."""

    values_N: tuple[float, ...]

    @property
    def value(self) -> float:
        return sum(self.values_N) / len(self.values_N)

    @property
    def standard_error(self) -> float:
        return standard_error(self.values_N)


@dataclass(frozen=True)
class Agreement:
    """kl: KL(source || model) in nats per token;  top1: share of tokens whose most likely successor is the same"""

    kl: Mean
    top1: Mean


def predictions(model: Any, ids_NT: Tensor, progress: Callable[[int, int], None] | None = None) -> Predictions:
    """Of a transformers causal language model, window by window; the model may be dropped afterwards."""
    hidden = []
    with torch.no_grad():
        for done, ids_T in enumerate(ids_NT):
            output = model.get_decoder()(ids_T[None].to(model.device), use_cache=False)
            hidden.append(output.last_hidden_state[0].cpu())
            if progress is not None:
                progress(done + 1, len(ids_NT))
    return Predictions(torch.stack(hidden), head_of(model))


def agreement(model: Predictions, source: Predictions) -> Agreement:
    """Of two predictions for the same windows."""
    kl, top1 = [], []
    # what one of them has more are rows without a token
    vocabulary = min(len(model.head.weight_VD), len(source.head.weight_VD))
    with torch.no_grad():
        for own_TD, wanted_TD in zip(model.hidden_NTD, source.hidden_NTD, strict=True):
            divergence, same = 0.0, 0
            for own, wanted in zip(own_TD.split(CHUNK), wanted_TD.split(CHUNK), strict=True):
                pairs = ((own, model), (wanted, source))
                read = [_logits(*pair, vocabulary) for pair in pairs]
                for few in few_rows(len(own), vocabulary, read[0].device):
                    own_TV, wanted_TV = (logits_TV[few].float().log_softmax(-1) for logits_TV in read)
                    wanted_TV = wanted_TV.to(own_TV.device)
                    divergence += float((wanted_TV.exp() * (wanted_TV - own_TV)).sum())
                    same += int((own_TV.argmax(-1) == wanted_TV.argmax(-1)).sum())
            kl.append(divergence / len(own_TD))
            top1.append(same / len(own_TD))
    return Agreement(Mean(tuple(kl)), Mean(tuple(top1)))


def _logits(hidden_TD: Tensor, made: Predictions, vocabulary: int) -> Tensor:
    return made.head.logits(hidden_TD.to(made.head.weight_VD.device))[:, :vocabulary]
