"""Text sampled from the source model: as much calibration text as one likes, at the price of forward passes.

What a conversion has to keep is the source's own behaviour, and text that the source writes shows it (LLM-QAT,
2305.17888, section 2.1). Needs the whole source in memory.

Legend: B texts at once, N windows, T tokens per window, P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

# tokens of one text: many short ones cost less than few long ones, and show more
TEXT_LENGTH = 256
# tokens of given text that a continuation starts with
PROMPT_LENGTH = 32
BATCH = 128

Progress = Callable[[int, int], None]


def sample_from(
    model: Any, num_windows: int, window: int, *, seed: int, batch: int = BATCH, progress: Progress | None = None
) -> Tensor:
    """Texts at temperature 1, one after another: int64 [N, T].

    model: a transformers causal language model. Every second text starts with a random token instead of the begin
           token, which leads to all that the model was trained on
    """
    begin = _begin(model)

    def prompts(count: int, generator: torch.Generator) -> Tensor:
        start_B1 = torch.randint(model.config.vocab_size, (count, 1), generator=generator)
        start_B1[::2] = begin
        return start_B1

    return _windows(model, prompts, num_windows, window, seed, batch, progress)


def continue_from(
    model: Any,
    ids_NT: Tensor,
    num_windows: int,
    *,
    seed: int,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Tensor:
    """Continuations of random pieces of the windows `ids_NT`, at temperature 1: as many windows of the same length."""
    length = min(PROMPT_LENGTH, ids_NT.shape[1] // 2)

    def prompts(count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids_NT), (count,), generator=generator)
        starts = torch.randint(ids_NT.shape[1] - length, (count,), generator=generator)
        return torch.stack([ids_NT[row, start : start + length] for row, start in zip(rows, starts, strict=True)])

    return _windows(model, prompts, num_windows, ids_NT.shape[1], seed, batch, progress)


def _windows(
    model: Any,
    prompts: Callable[[int, torch.Generator], Tensor],
    num_windows: int,
    window: int,
    seed: int,
    batch: int,
    progress: Progress | None,
) -> Tensor:
    """Texts until all windows are full; what an end token ends is followed by the next text."""
    length, wanted = min(TEXT_LENGTH, window), num_windows * window
    ends = _ends(model)
    generator = torch.Generator().manual_seed(seed)
    flat: list[int] = []
    while len(flat) < wanted:
        count = min(batch, 1 + (wanted - len(flat)) // length)
        prompt_BP = prompts(count, generator)
        given = prompt_BP.shape[1]
        for text in sample(model, prompt_BP, length, generator).tolist():
            flat += text[:given]
            flat += _until_end(text[given:], ends)
        if progress is not None:
            progress(min(len(flat), wanted), wanted)
    return torch.tensor(flat[:wanted]).view(num_windows, window)


@torch.no_grad()
def sample(model: Any, prompt_BP: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Each prompt and its continuation at temperature 1, int64 [B, length] on the CPU.

    One cache of the final size, which nothing copies; the most likely token under Gumbel noise is a sample
    (Maddison et al., 1411.0030).
    """
    cache = StaticCache(config=model.config, max_cache_len=length)
    ids = prompt_BP
    step = prompt_BP.to(model.device)
    for _ in range(length - prompt_BP.shape[1]):
        logits_BV = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float().cpu()
        noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
        next_B1 = (logits_BV - noise_BV.log_()).argmax(-1, keepdim=True)
        ids = torch.cat([ids, next_B1], dim=1)
        step = next_B1.to(model.device)
    return ids


def _begin(model: Any) -> int:
    begin = model.config.bos_token_id
    if begin is not None:
        return int(begin)
    return next(iter(_ends(model)), 0)


def _ends(model: Any) -> tuple[int, ...]:
    end = model.config.eos_token_id
    if end is None:
        return ()
    return tuple(end) if isinstance(end, list) else (int(end),)


def _until_end(ids: list[int], ends: tuple[int, ...]) -> Iterator[int]:
    """The tokens up to the first end token, with it."""
    for token in ids:
        yield token
        if token in ends:
            return
