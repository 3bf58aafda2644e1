"""Text sampled from the source model: as much calibration text as one likes, at the price of forward passes.

What a conversion has to keep is the source's own behaviour, and text that the source writes shows it (LLM-QAT,
2305.17888, section 2.1). Needs the whole source in memory.

Legend: B texts at once, N windows, T tokens per window, P tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

# tokens of one text: many short ones cost less than few long ones, and show more
TEXT_LENGTH = 256
# tokens of given text that a continuation starts with
PROMPT_LENGTH = 32
# bytes of the cache and the logits of all texts that are written at once, and how many these are at most
BYTES_AT_ONCE, MOST_AT_ONCE = 2**29, 512

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
    ends = _ends(model)
    generator = torch.Generator().manual_seed(seed)
    texts: list[list[int]] = []
    done = 0
    while done < num_tokens:
        count = min(batch, 1 + (num_tokens - done) // length)
        prompt_BP = prompts(count, generator)
        given = prompt_BP.shape[1]
        for text in sample(model, prompt_BP, length, generator).tolist():
            texts.append(text[:given] + list(_until_end(text[given:], ends)))
            done += len(texts[-1])
        if progress is not None:
            progress(min(done, num_tokens), num_tokens)
    return texts


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


def texts_at_once(model: Any, length: int) -> int:
    """So many texts that a step of a small model is more than its overhead, and that the memory for all is bounded."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize * length
    logits = 3 * 4 * config.vocab_size  # these, the noise and their difference, in float32
    return max(1, min(MOST_AT_ONCE, BYTES_AT_ONCE // (cache + logits)))


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
