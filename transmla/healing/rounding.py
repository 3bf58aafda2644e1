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

    sink:   first tokens of a document that stay exact
    recent: newest tokens that do, and up to as many more, until that many are packed together
    """

    def __init__(self, rank: int, rope: int, bits: int, sink: int, recent: int) -> None:
        self.code, self.sink, self.recent = GroupCode(rank, rope, bits), sink, recent
        self._exact_BTS: Tensor | None = None

    def begin(self, position_ids: Tensor | None) -> None:
        """With the next forward; positions of its tokens in their documents [B, T], None: nothing is rounded."""
        if position_ids is None:
            self._exact_BTS = None
            return
        step = max(1, self.recent)
        packed_BT = ((position_ids - self.recent) // step * step).clamp_min(0)
        self._exact_BTS = (position_ids[:, None] >= packed_BT[:, :, None]) | (position_ids < self.sink)[:, None]

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
        if mask.dtype == torch.bool:
            kinds = [mask & exact_B1TS, mask & ~exact_B1TS]
        else:
            least = torch.finfo(mask.dtype).min
            kinds = [mask.masked_fill(~exact_B1TS, least), mask.masked_fill(exact_B1TS, least)]
        both = torch.cat([key_B1Sk, self.rounded(key_B1Sk)], dim=2)
        return decompressed(q_nope_BHTn, q_rot_BHTe, both, torch.cat(kinds, dim=-1), **kwargs)

    def rounded(self, key_B1Sk: Tensor) -> Tensor:
        """The rounded keys, with the gradient of the exact ones."""
        with torch.no_grad():
            packed = self.code.encode(key_B1Sk.detach()[:, 0])
            rounded_B1Sk = self.code.decode(packed, key_B1Sk.dtype)[:, None]
        # plus nothing, which has the gradient
        return rounded_B1Sk + (key_B1Sk - key_B1Sk.detach())


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
    rounding = Rounding(config.kv_lora_rank, config.qk_rope_head_dim, bits, sink, recent)
    for module in model.modules():
        if isinstance(module, CachedLatent):
            attention: Any = module
            attention.__class__ = _rounded(attention.__class__)
            attention.rounding = rounding
    return rounding
