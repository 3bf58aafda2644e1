"""The steps that `transmla bench` times: fill a cache, decode with it.

Legend: B batch, S cached tokens, T tokens decoded.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import Cache, DynamicCache

from transmla.evaluation.roofline import wait

PREFILL_CHUNK = 512


@torch.inference_mode()
def fill(model: Any, ids_BS: Tensor, make: Callable[[], Cache] | None = None) -> Cache:
    """A cache that has read these tokens, chunk by chunk; make: gives an empty one, by default the model's own of
    transformers, in which layers with a window hold no more than that."""
    cache = DynamicCache(config=model.config) if make is None else make()
    for chunk in torch.split(ids_BS, PREFILL_CHUNK, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.inference_mode()
def decode(model: Any, cache: Cache, ids_BT: Tensor, device: torch.device) -> float:
    """Seconds that these tokens take one by one."""
    wait(device)
    started = time.perf_counter()
    for token_B1 in torch.split(ids_BT, 1, dim=1):
        model(token_B1, past_key_values=cache)
    wait(device)
    return time.perf_counter() - started


@torch.inference_mode()
def packing(cache: Any, steps: int, device: torch.device, repeats: int = 3) -> float:
    """Seconds per step that packing takes, in all layers: every so many steps a cache packs as many tokens at once, and
    `steps` that are taken back again and again never come so far, if they are not more than twice that."""
    rows = [
        (layer.code, layer.exact.new_zeros(len(layer.exact), layer.step, layer.exact.shape[-1]))
        for layer in cache.layers
        if getattr(layer, "code", None) is not None and layer.exact is not None and steps < 2 * layer.step
    ]
    taken = []
    for _ in range(repeats if rows else 0):
        wait(device)
        started = time.perf_counter()
        for code, exact_BNk in rows:
            code.encode(exact_BNk)
        wait(device)
        taken.append(time.perf_counter() - started)
    return min(taken) / rows[0][1].shape[1] if taken else 0.0


def forgetful(cache: Any) -> dict[int, Any]:
    """The layers of a cache that drop what leaves their window, as they are: these cannot be cropped."""
    # every update replaces their tensors and changes none
    return {index: copy.copy(one) for index, one in enumerate(cache.layers) if getattr(one, "is_sliding", False)}


def rewind(cache: Any, steps: int, windows: Mapping[int, Any]) -> None:
    """Take the last `steps` tokens out of a cache again. windows: its forgetful layers before them"""
    if not windows:
        cache.crop(-steps)
        return
    for index, layer in enumerate(cache.layers):
        if index in windows:
            cache.layers[index] = copy.copy(windows[index])
        else:
            layer.crop(-steps)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether that is what an error says, on any device; also when no batch size was small enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return should_reduce_batch_size(error) or "No executable batch size found" in str(error)
