"""Calibration text -> windows of token ids.

Legend: N windows, T tokens per window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.errors import DataError
from transmla.text.mixes import SELF, parse_mix
from transmla.text.sources import CHARACTERS_PER_TOKEN, read_text

# share of the windows that only measure, and how many at most
HELDOUT_SHARE, MAX_HELDOUT = 1 / 16, 8


@dataclass(frozen=True)
class CalibrationTokens:
    """ids_NT:   int64 [N, T]
    name:        what it was made of;  digest: SHA-256 of the ids, for the provenance file
    num_heldout: the last windows that only measure; default: a sixteenth, at most 8
    begin:       begin tokens of the tokenizer, if some windows were given them
    """

    ids_NT: Tensor
    name: str
    digest: str
    num_heldout: int = 0
    begin: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.num_heldout:
            default = min(MAX_HELDOUT, max(1, round(len(self.ids_NT) * HELDOUT_SHARE)))
            object.__setattr__(self, "num_heldout", default)


def begin_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts in front of a text by itself: nothing, a begin token or, in some families, two tokens."""
    whole, bare = (tokenizer("a", add_special_tokens=special, verbose=False).input_ids for special in (True, False))
    start = next((place for place in range(len(whole)) if whole[place : place + len(bare)] == bare), 0)
    return tuple(whole[:start])


def with_begin(ids_NT: Tensor, begin: Sequence[int]) -> Tensor:
    """A copy of windows in which begin tokens take the place of the first tokens: length and the tokens behind stay."""
    begun_NT = ids_NT.clone()
    begun_NT[:, : len(begin)] = torch.tensor(list(begin), dtype=ids_NT.dtype)
    return begun_NT


def windows(
    ids: list[int], num_tokens: int, window: int, *, name: str, prefix: Sequence[int] = ()
) -> CalibrationTokens:
    """Windows spread evenly over the text, at most `num_tokens` in all; raises `DataError`.

    At least two windows are needed: one to fit to and one held out.
    prefix: begin tokens; every second window starts with them, since the model meets both the start and the middle
            of texts
    """
    wanted = max(2, num_tokens // window)
    available = len(ids) // window
    if available < 2:
        raise DataError(
            f"the text is too short: {len(ids):,} tokens",
            where=name,
            why=f"two windows of {window:,} tokens are the least that calibration and its held-out check need",
            remedy="use a longer text, or shorter windows (--window)",
        )
    starts = torch.linspace(0, available - 1, min(wanted, available)).long().tolist()
    ids_NT = torch.tensor([ids[start * window : (start + 1) * window] for start in starts])
    ids_NT[::2] = with_begin(ids_NT[::2], prefix)
    return _named(ids_NT, name)


def calibration_tokens(
    name: str, tokenizer: Any, num_tokens: int, window: int, *, sampler: Any = None, begin: str = "half"
) -> CalibrationTokens:
    """Windows of token ids of the text called `name`; of several, "A:3+B", in turns, each with its share of the tokens.

    tokenizer: a transformers tokenizer; of special tokens, only those that it puts first are added
    sampler:   for "self", a call (num_windows, window) -> int64 [N, T]
    begin:     windows that start with these: "half" (of those from a text; what a model writes begins as it does),
               "all" or "none"
    """
    parts = parse_mix(name, "--calibration")
    if len(parts) > 1:
        whole = sum(part.weight for part in parts)
        shares = [int(num_tokens * part.weight / whole) for part in parts]
        return _mixed(
            [
                calibration_tokens(part.name, tokenizer, share, window, sampler=sampler, begin=begin)
                for part, share in zip(parts, shares, strict=True)
            ],
            name,
        )
    name, prefix = parts[0].name, () if begin == "none" else begin_tokens(tokenizer)
    if name == SELF:
        ids_NT = sampler(max(2, num_tokens // window), window)
        return _named(with_begin(ids_NT, prefix) if begin == "all" else ids_NT, name)
    text = read_text(name, max(num_tokens, 2 * window) * CHARACTERS_PER_TOKEN)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    found = windows(ids, num_tokens, window, name=name, prefix=prefix)
    return found if begin != "all" else _named(with_begin(found.ids_NT, prefix), name)


def _mixed(texts: list[CalibrationTokens], name: str | None = None) -> CalibrationTokens:
    """Windows of all texts, spread so that every stretch holds some of each; texts too short for their share give
    what they have. name: of them all; None: their own, A+B"""
    places = [
        ((number + 0.5) / len(text.ids_NT), text.ids_NT[number]) for text in texts for number in range(len(text.ids_NT))
    ]
    ids_NT = torch.stack([ids_T for _, ids_T in sorted(places, key=lambda pair: pair[0])])
    return _named(ids_NT, name or "+".join(text.name for text in texts))


def _named(ids_NT: Tensor, name: str, num_heldout: int = 0) -> CalibrationTokens:
    return CalibrationTokens(ids_NT, name, hashlib.sha256(ids_NT.numpy().tobytes()).hexdigest(), num_heldout)


def shuffled(text: CalibrationTokens, seed: int) -> CalibrationTokens:
    """The windows in random order, so that the first and the last of them are samples of the whole."""
    order = torch.randperm(len(text.ids_NT), generator=torch.Generator().manual_seed(seed))
    return _named(text.ids_NT[order], text.name)


def skipping_windows(num_windows: int, num_heldout: int, seed: int) -> Tensor:
    """Which windows skip positions, bool [N]: half of those that are fitted to, none that is held out.

    Random, because every second one would be every one of those that a step picks out in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    skipping_N = torch.rand(num_windows, generator=generator) < 0.5
    skipping_N[num_windows - num_heldout :] = False
    return skipping_N


def spread_positions(skipping_N: Tensor, window: int, context: int, seed: int) -> Tensor:
    """Positions of the tokens of all windows, int64 [N, T]: 0..T-1 but for the windows that skip some.

    A window that skips from somewhere in its middle to somewhere in the context shows distances that no window of
    its length has, at no cost (PoSE, 2309.10400, section 3). Lengths of gaps are uniform in their logarithm, from a
    quarter of the window to what is left of the context.
    """
    positions_NT = torch.arange(window).repeat(len(skipping_N), 1)
    if context <= window:
        return positions_NT
    generator = torch.Generator().manual_seed(seed)
    where, length = torch.rand(2, len(skipping_N), generator=generator, dtype=torch.float64)
    shortest, longest = max(1, min(window // 4, context - window)), context - window
    gap_N = (shortest * (longest / shortest) ** length).round().long()
    start_N = (window * (0.25 + 0.5 * where)).long().clamp_min(1)
    behind_NT = positions_NT >= start_N[:, None]
    return positions_NT + torch.where(skipping_N[:, None] & behind_NT, gap_N[:, None], 0)


def with_sampled(text: CalibrationTokens, sampled_NT: Tensor) -> CalibrationTokens:
    """Sampled windows among those of the text, spread evenly; the held-out ones stay the last, and real text."""
    fitted, heldout = text.ids_NT[: -text.num_heldout], text.ids_NT[-text.num_heldout :]
    mixed = _mixed([_named(fitted, text.name), _named(sampled_NT, f"{sampled_NT.numel():,} sampled tokens")])
    return _named(torch.cat([mixed.ids_NT, heldout]), mixed.name, text.num_heldout)
