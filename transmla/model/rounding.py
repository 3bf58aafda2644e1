"""Training with latents rounded as a packed cache rounds them, so that the weights know.

A token attends to the keys that it would find in the cache: the first and the newest exact, the others rounded. All
tokens of a window do so at once, with keys of both kinds side by side and a mask. Gradients pass as if nothing had been
rounded (straight-through, Bengio et al., 1308.3432, section 2).

Legend: B windows, H heads, T tokens, S keys, r kv_lora_rank, e qk_rope_head_dim, k = r + e.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transmla.model.modeling_transmla import CachedLatent, GroupCode

# first tokens of a document that stay exact, as in a `LatentCache` unless it is told otherwise
SINK = 4


class Rounding:
    """The rule of a `LatentCache` with integers of so many bits.

    recent: newest tokens that stay exact, and up to as many more, until that many are packed together
    sink:   first tokens of a document that do
    """

    def __init__(self, rank: int, rope: int, bits: int, recent: int, sink: int = SINK) -> None:
        self.code, self.sink, self.recent = GroupCode(rank, rope, bits), sink, recent
        self._exact_BTS: Tensor | None = None

    def begin(self, position_ids: Tensor | None) -> None:
        """With the next forward; positions of its tokens in their documents [B, T], None: nothing is rounded."""
        self._exact_BTS = None if position_ids is None else self.exact(position_ids)

    def exact(self, places_BT: Tensor) -> Tensor:
        """Which keys each token finds exact, bool [..., T, S]; places_BT: of the tokens in their documents [..., T]"""
        step = max(1, self.recent)
        packed_BT = ((places_BT - self.recent) // step * step).clamp_min(0)
        places_B1S = places_BT[..., None, :]
        return (places_B1S >= packed_BT[..., None]) | (places_B1S < self.sink)

    def attend(
        self,
        decompressed: Callable[..., tuple[Tensor, Tensor | None]],
        q_nope_BHTn: Tensor,
        q_rot_BHTe: Tensor,
        key_B1Sk: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What `decompressed` gives for keys that are exact or rounded, as each token would find them."""
        if self._exact_BTS is None:
            return decompressed(q_nope_BHTn, q_rot_BHTe, key_B1Sk, mask, **kwargs)
        exact_B1TS = self._exact_BTS[:, None]
        if mask is None:
            mask = torch.ones_like(exact_B1TS).tril()
        return decompressed(q_nope_BHTn, q_rot_BHTe, *self._beside(key_B1Sk, mask, exact_B1TS), **kwargs)

    def read(self, key_BSk: Tensor, seen_BTS: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens of windows attend to, each of which is read from its beginning: exact keys and behind them
        rounded ones [..., 2 S, k], and which of both each token finds, bool [..., T, 2 S].

        key_BSk:  what is cached of each token [..., S, k]
        seen_BTS: which tokens each of them sees, bool [..., T, S] with T = S
        """
        return self._beside(key_BSk, seen_BTS, self.exact(torch.arange(key_BSk.shape[-2], device=key_BSk.device)))

    def _beside(self, key_BSk: Tensor, mask_BTS: Tensor, exact_BTS: Tensor) -> tuple[Tensor, Tensor]:
        """Exact and rounded keys, and a mask, boolean or additive, by which each token finds one kind of every key."""
        if mask_BTS.dtype == torch.bool:
            kinds = [mask_BTS & exact_BTS, mask_BTS & ~exact_BTS]
        else:
            least = torch.finfo(mask_BTS.dtype).min
            kinds = [mask_BTS.masked_fill(~exact_BTS, least), mask_BTS.masked_fill(exact_BTS, least)]
        return torch.cat([key_BSk, self.rounded(key_BSk)], dim=-2), torch.cat(kinds, dim=-1)

    def rounded(self, key_BSk: Tensor) -> Tensor:
        """The rounded keys, with the gradient of the exact ones."""
        with torch.no_grad():
            rounded_BSk = self.code.decode(self.code.encode(key_BSk.detach()), key_BSk.dtype)
        # plus nothing, which has the gradient
        return rounded_BSk + (key_BSk - key_BSk.detach())


class Rounded:
    """Before the class of an attention module: what it attends to goes through `rounding`."""

    rounding: Rounding

    def decompressed(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As of that class, for rounded keys."""
        plain: Any = super()
        return self.rounding.attend(plain.decompressed, *args, **kwargs)


@functools.cache
def _rounded(kind: Any) -> Any:
    return type(f"Rounded{kind.__name__}", (Rounded, kind), {})


def round_latents(model: Any, bits: int, recent: int, sink: int = SINK) -> Rounding:
    """Make a converted model attend to rounded latents, in place; returns what has to `begin` each forward."""
    config = model.config
    rounding = Rounding(config.kv_lora_rank, config.qk_rope_head_dim, bits, recent, sink)
    for module in model.modules():
        if isinstance(module, CachedLatent):
            attention: Any = module
            attention.__class__ = _rounded(attention.__class__)
            attention.rounding = rounding
    return rounding
