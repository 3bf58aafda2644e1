"""What a cache really holds, read from its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def measured_bytes_per_token(model: Any, num_tokens: int = 64) -> float:
    """Bytes that one more token adds to the model's default cache, all layers, in the model's dtype.

    The difference between a text and half of it, so that anything of fixed size drops out.
    """
    sizes = []
    for length in (num_tokens // 2, num_tokens):
        ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
        with torch.no_grad():
            sizes.append(cache_bytes(model(ids, use_cache=True).past_key_values))
    return (sizes[1] - sizes[0]) / (num_tokens - num_tokens // 2)


def held_bytes(cache: Any) -> int:
    """Bytes of memory behind all tensors of a cache: also those with room for more tokens, or that a view keeps."""
    storages = {}
    for layer in cache.layers:
        for value in (layer.tensors() if hasattr(layer, "tensors") else vars(layer)).values():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a transformers cache, of a `LatentCache` without room for more tokens."""
    return sum(
        value.nbytes
        for layer in cache.layers
        for value in (layer.tensors() if hasattr(layer, "tensors") else vars(layer)).values()
        if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.uint8)
    )
