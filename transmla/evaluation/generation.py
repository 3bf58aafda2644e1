"""What a model writes: does it repeat itself, does it come to an end, and would its source have written that?

Likelihood does not show it: a model a few percent of perplexity from its source may repeat itself ten times as often
(When Perplexity Lies, 2603.26556).

Legend: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from transmla.evaluation.agreement import Mean
from transmla.evaluation.perplexity import standard_error
from transmla.model.head import head_of
from transmla.text.chats import templated
from transmla.text.decoding import ends_of, write

# kinds of prompts that a user would write, which go through the chat template where there is one
ASKED = ("question", "request", "maths")
WAYS = ("greedy", "sampled")
# measures that are a mean over texts
MEASURES = ("repeated_2", "repeated_4", "ended", "length")
# runs of so many tokens are counted over all texts
GRAMS = (1, 2)


@dataclass(frozen=True)
class Prompt:
    """kind: of the eight kinds of prompts.json;  ids: with what the tokenizer or the chat template puts around it"""

    kind: str
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """Texts behind the prompts, in their order, without the prompts, as token ids; an end token is the last.

    repeated_2, repeated_4: of each text, share of runs of 2 and 4 tokens that occurred in it before
    ended: 1.0 where it ended by itself;  length: tokens
    """

    texts: tuple[tuple[int, ...], ...]
    repeated_2: tuple[float, ...]
    repeated_4: tuple[float, ...]
    ended: tuple[float, ...]
    length: tuple[float, ...]

    def plain(self, tokenizer: Any) -> dict[str, Any]:
        """For JSON, with the texts themselves."""
        values = {name: list(getattr(self, name)) for name in MEASURES}
        texts = [tokenizer.decode(text, skip_special_tokens=True) for text in self.texts]
        return values | {"ids": [list(text) for text in self.texts], "texts": texts}


def shipped_prompts(tokenizer: Any, context: int | None = None) -> list[Prompt]:
    """The prompts that ship, as this tokenizer reads them; those longer than `context` tokens are cut at the front."""
    rows = json.loads((resources.files("transmla.data") / "prompts.json").read_text("utf-8"))
    return [
        Prompt(row["kind"], row["text"], tuple(_ids(tokenizer, row["kind"], row["text"])[-(context or 0) :]))
        for row in rows
    ]


def _ids(tokenizer: Any, kind: str, text: str) -> list[int]:
    if kind in ASKED and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        text = templated(tokenizer, turns, kind, ask=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    return list(tokenizer(text, verbose=False).input_ids)


def written(model: Any, prompts: Sequence[Prompt], new_tokens: int, *, greedy: bool, seed: int = 0) -> Written:
    """What the model writes behind the prompts, at most `new_tokens` tokens each: greedily, or at temperature 1."""
    texts = write(model, [prompt.ids for prompt in prompts], new_tokens, seed=seed, greedy=greedy)
    return measured(texts, ends_of(model))


def measured(texts: Sequence[Sequence[int]], ends: Sequence[int]) -> Written:
    """The measures of texts, in which an end token is not counted as a part of the text."""
    bodies = [text[:-1] if text and text[-1] in ends else text for text in texts]
    return Written(
        texts=tuple(tuple(text) for text in texts),
        repeated_2=tuple(repeated_share(body, 2) for body in bodies),
        repeated_4=tuple(repeated_share(body, 4) for body in bodies),
        ended=tuple(float(len(body) < len(text)) for body, text in zip(bodies, texts, strict=True)),
        length=tuple(float(len(body)) for body in bodies),
    )


def repeated_share(ids: Sequence[int], size: int) -> float:
    """Share of runs of `size` tokens that occurred earlier in the text; 0 where there are none."""
    runs = _runs(ids, size)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct_share(texts: Sequence[Sequence[int]], size: int) -> float:
    """Different runs of `size` tokens over all runs of all texts (distinct-n of Li et al., 1510.03055); 0 for none."""
    runs = [run for ids in texts for run in _runs(ids, size)]
    return len(set(runs)) / len(runs) if runs else 0.0


def _runs(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]


def compared(model: dict[str, Any], source: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """way -> measure -> value of the source and of the model, difference and the error of the paired difference.

    model, source: plain values of two `Written`s by way, of the same prompts. The error of the distinct runs, which are
    those of all texts together, is that of the jackknife over prompts
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for way in WAYS:
        own, base = model[way], source[way]
        found[way] = {}
        for name in MEASURES:
            differences = tuple(a - b for a, b in zip(own[name], base[name], strict=True))
            found[way][name] = _row(_mean(base[name]), _mean(own[name]), standard_error(differences))
        bodies = [_bodies(one) for one in (base, own)]
        for size in GRAMS:
            without = [
                distinct_share(bodies[1][:at] + bodies[1][at + 1 :], size)
                - distinct_share(bodies[0][:at] + bodies[0][at + 1 :], size)
                for at in range(len(bodies[0]))
            ]
            # the jackknife: (n - 1) times the error that the mean of these would have
            error = (len(without) - 1) * standard_error(tuple(without))
            shares = [distinct_share(texts, size) for texts in bodies]
            found[way][f"distinct_{size}"] = _row(shares[0], shares[1], error)
    return found


def _row(source: float, model: float, error: float) -> dict[str, float]:
    return {"source": source, "model": model, "difference": model - source, "standard_error": error}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _bodies(one: dict[str, Any]) -> list[list[int]]:
    return [ids[:-1] if ended else ids for ids, ended in zip(one["ids"], one["ended"], strict=True)]


@dataclass(frozen=True)
class Judged:
    """A distribution over the vocabulary at every token of some texts, without the model that predicts it.

    hidden: inputs of the head for each text, [T, D], in the model's dtype on the CPU;  logits: of some of them
    """

    hidden: tuple[Tensor, ...]
    logits: Callable[[Tensor], Tensor]


@torch.no_grad()
def predictions_for(model: Any, prompts: Sequence[Prompt], texts: Sequence[Sequence[int]]) -> Judged:
    """What the model predicts for every token of the texts behind the prompts."""
    head, hidden = head_of(model), []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([[*prompt.ids, *text]], device=model.device)
        out_TD = model.get_decoder()(ids, use_cache=False).last_hidden_state[0]
        hidden.append(out_TD[len(prompt.ids) - 1 : -1].cpu())

    def logits(some_TD: Tensor) -> Tensor:
        return head.logits(some_TD.to(head.weight_VD.device)).float().cpu()

    return Judged(tuple(hidden), logits)


@torch.no_grad()
def acceptance(model: Judged, source: Judged, texts: Sequence[Sequence[int]], *, greedy: bool) -> Mean:
    """Share of the model's tokens that its source accepts as a draft's (Leviathan et al., 2211.17192), of each text.

    greedy: a token is accepted if it is the source's likeliest one; otherwise by speculative sampling, whose chance is
            the sum over the vocabulary of the smaller one of the two probabilities
    """
    shares = []
    for own_TD, base_TD, text in zip(model.hidden, source.hidden, texts, strict=True):
        if not text:
            continue
        base_TV = source.logits(base_TD)
        if greedy:
            accepted_T = (base_TV.argmax(-1) == torch.tensor(list(text))).float()
        else:
            own_TV = model.logits(own_TD)
            vocabulary = min(own_TV.shape[-1], base_TV.shape[-1])
            chances = (logits_TV[:, :vocabulary].softmax(-1) for logits_TV in (own_TV, base_TV))
            accepted_T = torch.minimum(*chances).sum(-1)
        shares.append(float(accepted_T.mean()))
    return Mean(tuple(shares))
