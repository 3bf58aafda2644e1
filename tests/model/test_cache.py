"""What is cached, and everything that generation does to a cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.model.folders import LAYERS, RANK, ROPE
from tests.model.test_attention import relative

Load = Callable[..., Any]


def numel(cache: Any) -> int:
    return sum(t.numel() for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t) and t.dim())


def prompt(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def greedy_without_cache(model: Any, ids: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | kwargs
    output: torch.Tensor = model.generate(**prompt(ids), eos_token_id=None, **settings)
    return output


def test_cache_holds_rank_plus_rope_values(ours: Load, ids: torch.Tensor) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        ours()(ids, past_key_values=cache)
        ours()(ids[:, :1], past_key_values=cache)
    assert numel(cache) == 2 * 25 * LAYERS * (RANK + ROPE)


def test_greedy_equals_generation_without_cache(ours: Load, ids: torch.Tensor, device: torch.device) -> None:
    model, ids = ours(device=device), ids.to(device)
    expected = greedy_without_cache(model, ids, 8)
    assert len(set(expected[:, 24:].flatten().tolist())) > 3, "this model repeats itself, the test sees nothing"
    assert torch.equal(generate(model, ids), expected)


def test_static_cache_equals_dynamic(ours: Load, ids: torch.Tensor) -> None:
    model = ours()
    assert torch.equal(generate(model, ids, cache_implementation="static", disable_compile=True), generate(model, ids))
    chunked = generate(model, ids, cache_implementation="static", disable_compile=True, prefill_chunk_size=7)
    assert torch.equal(chunked, generate(model, ids))
    cache = StaticCache(config=model.config, max_cache_len=32)
    full_mask = torch.ones_like(ids)
    with torch.no_grad():
        parts = [
            model(ids[:, a:b], attention_mask=full_mask[:, :b], past_key_values=cache).logits
            for a, b in ((0, 15), (15, 20), (20, 21), (21, 24))
        ]
        assert relative(torch.cat(parts, dim=1), model(ids).logits) < 1e-5
    assert numel(cache) == 2 * 32 * LAYERS * (RANK + ROPE)


def test_beams_and_sampling(ours: Load, ids: torch.Tensor) -> None:
    model = ours()
    cached = generate(model, ids, num_beams=3)
    assert torch.equal(cached, generate(model, ids, num_beams=3, use_cache=False))
    assert not torch.equal(cached, generate(model, ids)), "beams found nothing new, the test sees nothing"
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        drawn.append(generate(model, ids, do_sample=True, top_k=20, num_return_sequences=2, use_cache=use_cache))
    assert torch.equal(*drawn)


def test_crop_repeat_select_then_continue(ours: Load, ids: torch.Tensor) -> None:
    model, cache = ours(), DynamicCache()
    with torch.no_grad():
        full = model(ids).logits
        model(ids[:, :20], past_key_values=cache)
        cache.crop(-6)
        assert relative(model(ids[:, 14:18], past_key_values=cache).logits, full[:, 14:18]) < 1e-5
        cache.batch_repeat_interleave(2)
        rows = ids.repeat_interleave(2, dim=0)
        again = model(rows[:, 18:21], past_key_values=cache).logits
        assert relative(again, full[:, 18:21].repeat_interleave(2, dim=0)) < 1e-5
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.reorder_cache(torch.LongTensor([1, 0]))
        assert relative(model(ids.flip(0)[:, 21:], past_key_values=cache).logits, full.flip(0)[:, 21:]) < 1e-5


@pytest.mark.parametrize("lookup", [False, True])
def test_assisted_generation_equals_greedy(ours: Load, ids: torch.Tensor, lookup: bool) -> None:
    model = ours()
    helper = {"prompt_lookup_num_tokens": 3} if lookup else {"assistant_model": ours()}
    assert torch.equal(generate(model, ids[:1], **helper), generate(model, ids[:1]))
