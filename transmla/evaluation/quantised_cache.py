"""Caches that hold rounded values, to measure what a quantised cache costs in quality.

A simulation: values are rounded to the grid that a quantised cache would store, and computed with in the model's dtype.
Every cached token is rounded; real implementations keep the newest ones exact, which is a little kinder.

Legend: B batch, G key/value heads (1 for a latent), T tokens, d values per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# values that share one scale and one zero point, 16 bits each
GROUP = 32


def bits_per_value(bits: int) -> float:
    """Stored bits per cached value, scale and zero point included."""
    return bits + 2 * 16 / GROUP


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """`x` on an asymmetric grid of 2^bits levels per group of `GROUP` neighbours along `dim`.

    A last group that is not full has a grid of its own.
    """
    parts = [_rounded_group(part, bits, dim) for part in x.split(GROUP, dim=dim)]
    return torch.cat(parts, dim=dim)


def _rounded_group(x: Tensor, bits: int, dim: int) -> Tensor:
    wide = x.float()
    low, high = wide.amin(dim, keepdim=True), wide.amax(dim, keepdim=True)
    # scale and zero point are stored in half precision
    low = low.half().float()
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-7).half().float().clamp_min(1e-7)
    return (((wide - low) / scale).round().clamp(0, 2**bits - 1) * scale + low).to(x.dtype)


def keys_by_channel(bits: int) -> Callable[[Tensor], Tensor]:
    """Keys [B, G, T, d]: neighbours in time share a grid, since channels differ in size (KIVI, 2402.02750)."""
    return lambda x: rounded(x, bits, dim=-2)


def values_by_token(bits: int) -> Callable[[Tensor], Tensor]:
    """Values [B, G, T, d]: neighbouring channels of one token share a grid."""
    return lambda x: rounded(x, bits, dim=-1) if x.shape[-1] else x


def latents_by_token(bits: int, rank: int) -> Callable[[Tensor], Tensor]:
    """What latent attention caches [B, 1, T, r + e]: the latent like values, the rotary key behind it like keys."""

    def both(x: Tensor) -> Tensor:
        latent, rotary = x.split([rank, x.shape[-1] - rank], dim=-1)
        return torch.cat([rounded(latent, bits, dim=-1), rounded(rotary, bits, dim=-2)], dim=-1)

    return both


def rounding_cache(key: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor]) -> Cache:
    """A cache for one forward pass over a text, to be given as past_key_values; whole groups of tokens at once."""

    class Layer(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            kept: tuple[Tensor, Tensor] = super().update(key(key_states), value(value_states), *args, **kwargs)
            return kept

    return Cache(layer_class_to_replicate=Layer)
