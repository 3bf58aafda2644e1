"""Text sampled from the source model: as much calibration text as one likes, at the price of forward passes.

What a conversion has to keep is the source's own behaviour, and text that the source writes shows it (LLM-QAT,
2305.17888, section 2.1). Needs the whole source in memory.

Legend: N windows, T tokens per window.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from transmla.text.decoding import ends_of, texts_at_once, write

# tokens of one text: many short ones cost less than few long ones, and show more
TEXT_LENGTH = 256
# tokens of given text that a continuation starts with
PROMPT_LENGTH = 32

Progress = Callable[[int, int], None]


def sample_texts(
    model: Any,
    num_tokens: int,
    length: int,
    *,
    seed: int,
    batch: int | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Texts at temperature 1, at least `num_tokens` tokens in all.

    model:  a transformers causal language model. Every second text starts with a random token instead of the begin
            token, which leads to all that the model was trained on
    length: tokens of a text that does not end before
    """

    def prompts(count: int, generator: torch.Generator) -> Tensor:
        start_B1 = torch.randint(model.config.vocab_size, (count, 1), generator=generator)
        start_B1[::2] = _begin(model)
        return start_B1

    return _texts(model, prompts, num_tokens, length, seed, batch, progress)


def sample_from(
    model: Any, num_windows: int, window: int, *, seed: int, batch: int | None = None, progress: Progress | None = None
) -> Tensor:
    """Windows of such texts, one text after another: int64 [N, T]."""
    length = min(TEXT_LENGTH, window)
    texts = sample_texts(model, num_windows * window, length, seed=seed, batch=batch, progress=progress)
    return _windows(texts, num_windows, window)


def continue_from(
    model: Any,
    ids_NT: Tensor,
    num_windows: int,
    *,
    seed: int,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Continuations of random pieces of the windows `ids_NT`, at temperature 1: as many windows of the same length."""
    window = ids_NT.shape[1]
    given = min(PROMPT_LENGTH, window // 2)

    def prompts(count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids_NT), (count,), generator=generator)
        starts = torch.randint(window - given, (count,), generator=generator)
        return torch.stack([ids_NT[row, start : start + given] for row, start in zip(rows, starts, strict=True)])

    length = min(TEXT_LENGTH, window)
    return _windows(_texts(model, prompts, num_windows * window, length, seed, batch, progress), num_windows, window)


def _windows(texts: list[list[int]], num_windows: int, window: int) -> Tensor:
    """All windows are full; a text is followed by the next one."""
    flat = list(chain.from_iterable(texts))
    return torch.tensor(flat[: num_windows * window]).view(num_windows, window)


def _texts(
    model: Any,
    prompts: Callable[[int, torch.Generator], Tensor],
    num_tokens: int,
    length: int,
    seed: int,
    batch: int | None,
    progress: Progress | None,
) -> list[list[int]]:
    """Prompts and what follows them up to an end token."""
    batch = batch or texts_at_once(model, length)
    generator = torch.Generator().manual_seed(seed)
    texts: list[list[int]] = []
    done = 0
    while done < num_tokens:
        count = min(batch, 1 + (num_tokens - done) // length)
        given = prompts(count, generator).tolist()
        written = write(model, given, length - len(given[0]), seed=seed, first=len(texts), batch=batch)
        texts += [prompt + text for prompt, text in zip(given, written, strict=True)]
        done = sum(map(len, texts))
        if progress is not None:
            progress(min(done, num_tokens), num_tokens)
    return texts


def _begin(model: Any) -> int:
    begin = model.config.bos_token_id
    if begin is not None:
        return int(begin)
    return next(iter(ends_of(model)), 0)
