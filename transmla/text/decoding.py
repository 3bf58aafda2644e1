"""A model writes: many texts at once, token by token.

Three things make it fast. The cache is contiguous and grows now and then; all query heads of a group read its key head
as it is, in one product; and tokens are drawn from a few rows of float32 probabilities at a time. Every text draws from
random numbers of its own, so what it becomes depends on the seed and its number; how many are written at once only
changes how products round.

Legend: B texts, T tokens of a step, S cached tokens, H query heads, G key/value heads, d head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transmla.devices import free_bytes

GROUPED = "transmla_grouped"
# the cache grows by so many tokens; between, its unused end is masked
BLOCK = 32
# bytes of the cache of all texts that are written at once, and how many these are at most
BYTES_AT_ONCE, MOST_AT_ONCE = 2**31, 512
# rows of probabilities at once, and tokens whose probabilities are summed before one of them is drawn
ROWS, RUN = 64, 256
# steps between two looks at which texts have ended
LOOK = 8


@torch.no_grad()
def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    seed: int = 0,
    first: int = 0,
    greedy: bool = False,
    batch: int | None = None,
) -> list[list[int]]:
    """What the model writes behind each prompt: at most `new_tokens` tokens, at temperature 1 or the likeliest ones.

    A text ends behind its first end token.

    model:  a transformers causal language model, of a source or converted
    first:  number of the first text; a text of the same number and seed draws the same random numbers
    batch:  texts at once; default: see `texts_at_once`
    """
    longest = max(map(len, prompts), default=0) + new_tokens
    batch = batch or texts_at_once(model, longest)
    texts: list[list[int]] = []
    with decoding(model):
        for start in range(0, len(prompts), batch):
            some = [list(prompt) for prompt in prompts[start : start + batch]]
            drawn_BN = None if greedy else random_numbers(seed, first + start, len(some), new_tokens)
            texts += _written(model, some, new_tokens, drawn_BN)
    return texts


def random_numbers(seed: int, first: int, count: int, length: int) -> Tensor:
    """Uniform numbers of the texts `first`, `first` + 1 ..., float64 [count, length]."""
    rows = [np.random.default_rng([seed % 2**63, first + number]).random(length) for number in range(count)]
    return torch.from_numpy(np.stack(rows))


def _written(model: Any, prompts: list[list[int]], new_tokens: int, drawn_BN: Tensor | None) -> list[list[int]]:
    """All texts of one batch. Prompts may differ in length: while some are still read, others are written already."""
    device = model.device
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    begun, total = min(map(len, prompts)), max(map(len, prompts)) + new_tokens
    ids_BL = torch.zeros(len(prompts), total, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        ids_BL[row, : len(prompt)] = torch.tensor(prompt, device=device)
    ends = torch.tensor(ends_of(model), dtype=torch.long, device=device)
    drawn_BN = None if drawn_BN is None else drawn_BN.to(device)
    cache = growing_cache(model)
    # rows of those that are still written; the cache has only these
    rows_B, open_B = (
        torch.arange(len(prompts), device=device),
        torch.ones(len(prompts), dtype=torch.bool, device=device),
    )
    step_BT = ids_BL[:, :begun]
    for place in range(begun, total):
        logits_BV = model(step_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        behind_B = place - lengths_B[rows_B]
        if drawn_BN is None:
            next_B = logits_BV.argmax(-1)
        else:
            next_B = draw(logits_BV, drawn_BN[rows_B].gather(1, behind_B.clamp(0, new_tokens - 1)[:, None])[:, 0])
        next_B = torch.where(behind_B < 0, ids_BL[rows_B, place], next_B)
        ids_BL[rows_B, place] = next_B
        open_B &= (behind_B < 0) | ~(torch.isin(next_B, ends) | (behind_B + 1 >= new_tokens))
        step_BT = next_B[:, None]
        if place % LOOK == 0 and 2 * (left := int(open_B.sum())) <= len(rows_B):
            if not left:
                break
            places_B = open_B.nonzero()[:, 0]
            for layer in cache.layers:
                layer.keep(places_B)  # type: ignore[union-attr]
            rows_B, open_B, step_BT = rows_B[places_B], open_B[places_B], step_BT[places_B]
    stops = set(ends.tolist())
    written = (
        ids[len(prompt) : len(prompt) + new_tokens] for ids, prompt in zip(ids_BL.tolist(), prompts, strict=True)
    )
    return [list(_until_end(ids, stops)) for ids in written]


def draw(logits_BV: Tensor, drawn_B: Tensor) -> Tensor:
    """The token of each row at which the cumulated probability passes `drawn_B`, numbers from 0 to 1: int64 [B]."""
    found = []
    for logits_nV, drawn_n in zip(logits_BV.split(ROWS), drawn_B.split(ROWS), strict=True):
        likely_nV = logits_nV.float().softmax(-1)
        missing = -likely_nV.shape[1] % RUN
        runs_nRr = torch.nn.functional.pad(likely_nV, (0, missing)).unflatten(1, (-1, RUN))
        mass_nR = runs_nRr.sum(-1).double().cumsum(-1)
        wanted_n1 = (drawn_n * mass_nR[:, -1])[:, None]
        run_n1 = torch.searchsorted(mass_nR, wanted_n1, right=True).clamp_max(mass_nR.shape[1] - 1)
        before_n1 = torch.where(run_n1 > 0, mass_nR.gather(1, (run_n1 - 1).clamp_min(0)), 0.0)
        inside_nr = runs_nRr.take_along_dim(run_n1[..., None], 1)[:, 0]
        place_n1 = torch.searchsorted(inside_nr.double().cumsum(-1), wanted_n1 - before_n1, right=True)
        place_n1 = place_n1.clamp_max(RUN - 1)
        # sums that round differently may point behind the last token that is possible at all
        possible_n1 = inside_nr.gather(1, place_n1) > 0
        place_n1 = torch.where(possible_n1, place_n1, inside_nr.argmax(-1, keepdim=True))
        found.append((run_n1 * RUN + place_n1)[:, 0])
    return torch.cat(found)


def texts_at_once(model: Any, length: int) -> int:
    """So many texts that a step is large products, within `BYTES_AT_ONCE` and half of the free memory.

    The bound that the memory sets is half of the other, a quarter of it and so on, so that it is the same tomorrow.
    """
    config = model.config.get_text_config()
    if rank := getattr(model.config, "kv_lora_rank", None):
        values = rank + model.config.qk_rope_head_dim
    else:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        values = 2 * heads * width
    cached = config.num_hidden_layers * values * model.dtype.itemsize * length
    bound = BYTES_AT_ONCE
    while bound > max(cached, free_bytes(model.device) // 2):
        bound //= 2
    return max(1, min(MOST_AT_ONCE, bound // (cached + 2 * model.dtype.itemsize * config.vocab_size)))


def ends_of(model: Any) -> list[int]:
    """Tokens behind which a text has ended, as the model's configurations say."""
    ends: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        end = getattr(config, "eos_token_id", None)
        ends |= set() if end is None else {int(one) for one in (end if isinstance(end, list | tuple) else [end])}
    return sorted(ends)


def _until_end(ids: list[int], ends: set[int]) -> Iterator[int]:
    """The tokens up to the first end token, with it."""
    for token in ids:
        yield token
        if token in ends:
            return


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """A context in which the model is not trained and its attention reads a `growing_cache` as it is."""
    before, trained = model.config._attn_implementation, model.training
    # latents are one key head for all query heads; two products in place of a fused call that was made for long texts
    model.set_attn_implementation("eager" if getattr(model.config, "kv_lora_rank", None) else GROUPED)
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(trained)


def growing_cache(model: Any) -> Cache:
    """An empty cache of `GrowingLayer`s for all layers of the model."""
    count = model.config.get_text_config().num_hidden_layers
    return Cache(layers=[GrowingLayer() for _ in range(count)])


class GrowingLayer(CacheLayerMixin):
    """Keys and values [B, G, S, d], of which only the first `length` count; masks hide the others.

    What is returned is whole, since products of contiguous tensors are many times as fast as those of slices.
    """

    keys: Any
    values: Any

    # says to transformers that the returned tensors are longer than what they hold, so that it always makes a mask
    is_compileable, is_sliding = True, False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty tensors for the first `update`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of a step, and return all with the unused end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self.keys, self.values = (
                _longer(x, new, end) for x, new in ((self.keys, key_states), (self.values, value_states))
            )
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next step sees, and where they start."""
        return _whole(self.length + query_length), 0

    def get_seq_length(self) -> int:
        """Tokens that are held."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def keep(self, rows_B: Tensor) -> None:
        """Drop all texts but these."""
        self.keys, self.values = self.keys[rows_B], self.values[rows_B]


def _whole(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _longer(old_BGSd: Tensor, new_BGTd: Tensor, length: int) -> Tensor:
    batch, groups, _, width = new_BGTd.shape
    longer = new_BGTd.new_zeros(batch, groups, _whole(length), width)
    longer[:, :, : old_BGSd.shape[2]] = old_BGSd
    return longer


def _grouped(
    module: Any,
    query_BHTd: Tensor,
    key_BGSd: Tensor,
    value_BGSd: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention [B, T, H, d] of all query heads that share a key head in one product."""
    batch, heads, length, width = query_BHTd.shape
    groups = key_BGSd.shape[1]
    rows_BGRd = query_BHTd.reshape(batch, groups, -1, width) * (width**-0.5 if scaling is None else scaling)
    scores_BHTS = (rows_BGRd @ key_BGSd.transpose(-1, -2)).view(batch, heads, length, -1)
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    if attention_mask is None and length > 1:  # a whole prompt and nothing else
        attention_mask = torch.ones_like(scores_BHTS[0, 0], dtype=torch.bool).tril()
    if attention_mask is not None:
        scores_BHTS.masked_fill_(~attention_mask, -torch.inf)
    weights_BHTS = scores_BHTS.softmax(-1, dtype=torch.float32).to(value_BGSd.dtype)
    attended_BGRd = weights_BHTS.view(batch, groups, -1, key_BGSd.shape[2]) @ value_BGSd
    return attended_BGRd.view(batch, heads, length, -1).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED, _grouped)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, sdpa_mask)
