"""Multi-head latent attention that caches the latent and attends in latent space.

This file is self-contained: it is copied into each converted folder, and `auto_map` of config.json names it. So it
is one file with several parts:

LatentCache              a cache that grows in place, exact or as packed integers
CachedLatent             attention over a cache of `kv_lora_rank + qk_rope_head_dim` values per token, nothing expanded
DeepseekV3ForCausalLM    parameters, their names and results of transformers' deepseek_v3, with that cache
UnfoldedForCausalLM      the same for training, without the folded norm
TransmlaForCausalLM ...  a source's own class, with latent attention in place of its own

Shape legend: B batch, T query tokens, S cached tokens, D hidden_size, H num_attention_heads, r kv_lora_rank,
e qk_rope_head_dim, k = r + e, n qk_nope_head_dim, v v_head_dim, N tokens that are packed or unpacked at once.
"""

import copy
import functools
import heapq
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.utils import logging

logger = logging.get_logger(__name__)

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class FoldedRMSNorm(nn.Module):
    """RMSNorm of a latent so small that epsilon dominates: multiplies by weight / sqrt(eps).

    Not a subclass of the stock norm, because kernel libraries replace modules of that class.
    """

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, latent_BTr: torch.Tensor) -> torch.Tensor:
        """The scaled latent [B, T, r], in the dtype of the input; warns if it is called for training."""
        if self.training and torch.is_grad_enabled():
            logger.warning_once(
                "This checkpoint is for inference only: its latent norm is folded (latent_norm_folded in config.json), "
                "so the latent rows of kv_a_proj_with_mqa are about 1e-5, and an optimizer step destroys them. Train "
                "the unfolded form (transmla unfold), and fold it again afterwards (transmla fold)."
            )
        # weight / sqrt(eps) overflows float16
        wide = torch.promote_types(latent_BTr.dtype, torch.float32)
        scale_r = self.weight.to(wide) * self.variance_epsilon**-0.5
        scaled_BTr: torch.Tensor = latent_BTr.to(wide) * scale_r
        return scaled_BTr.to(latent_BTr.dtype)


class LatentGain(nn.Module):
    """What an unfolded checkpoint has in place of the latent norm: multiplies each channel by a weight."""

    weight: nn.Parameter

    def forward(self, latent_BTr: torch.Tensor) -> torch.Tensor:
        """The scaled latent [B, T, r]."""
        return latent_BTr * self.weight


FLOAT16_MAX = 65504.0
# values of one token that share a scale and a zero point, float16 each
GROUP = 32
# bits of a rotary key in the formats int2 to int8
ROTARY_BITS = 8
# neighbours in importance that get the same number of bits: what they add to a token is whole bytes
DEALT_TOGETHER = 8
# bits of what one token has of its own in the coded formats: two gains, powers of 2^(1/8) from 2^-16 on
GAIN_BITS, GAIN_STEPS, GAIN_ZERO = 16, 8, 128
# coordinates with so many bits have a gain of their own, which is some of these steps above that of the others: their
# levels are fine enough for a wider grid, and what lies beyond the last of them costs most
WIDE_BITS, GAINS_TRIED = 6, (0, 2, 4, 6, 8, 11, 14)
# latents with fewer bits per value than this have it for those of so many alone: what a wider grid takes from the
# others costs more there than what it holds (benchmarks/quantised.md, "The gain of a token")
FEW_BITS, WIDE_BITS_OF_FEW = 3.0, 8
# values that are packed at once, each of them with all gains that are tried
ENCODED = 2**20
# values that attention unpacks at once, of all texts together: on a CPU they stay in its caches; and least tokens
UNPACKED = {"cpu": 2**20, "other": 2**26}
LEAST_BLOCK = 128
# of which scores there are at most so many at once, unless that would be less than a block
SCORES = 2**28
# buffers that grow get room for a sixteenth more, in pieces of so many tokens: copying stays small beside reading
PIECE = 64


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers below 2^bits in uint8 [..., x] as bytes [..., y]; 3 bits are two and one, 5 are four and one, and so on.

    The last byte of each part is filled up with zeros.
    """
    parts = []
    for size in _parts(bits):
        part = codes & (2**size - 1)
        codes = codes >> size if size < 8 else codes
        part = nn.functional.pad(part, (0, -part.shape[-1] % (8 // size)))
        # values that share a byte are a whole part of the row apart: unpacked, each part is one piece
        places = part.unflatten(-1, (8 // size, -1)).unbind(-2)
        packed = places[0].clone()
        for place, value in enumerate(places[1:], 1):
            packed |= value << (size * place)
        parts.append(packed)
    return torch.cat(parts, dim=-1)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` integers that `pack` was given, uint8 [..., count]."""
    found, shift, start = None, 0, 0
    for size in _parts(bits):
        width = packed_width(count, size)
        part = packed[..., start : start + width]
        if size < 8:
            # nothing is shifted in the first of a byte, nor is there anything above the last
            shifted = [part >> (size * place) if place else part for place in range(8 // size)]
            places = [place & (2**size - 1) for place in shifted[:-1]]
            part = torch.cat((*places, shifted[-1]), dim=-1)[..., :count]
        found = part if found is None else found | (part << shift)
        shift, start = shift + size, start + width
    assert found is not None
    return found


def _parts(bits: int) -> list[int]:
    return [size for size in (8, 4, 2, 1) if bits & size]


def packed_width(count: int, bits: int) -> int:
    """Bytes that `pack` makes of `count` integers."""
    return sum(-(-count * size // 8) for size in _parts(bits))


class GroupCode:
    """Latents on a grid of 2^bits levels per group of 32 values of a token, rotary keys on one of 2^8.

    Per group a float16 scale and a float16 zero point. Nothing has to be known of the model.
    """

    # of the coordinates in what `decode` gives if that is asked for: as they are
    order: torch.Tensor | None = None
    stored = ("codes", "scales")

    def __init__(self, rank: int, rope: int, bits: int) -> None:
        # number of values, groups and bits of each part
        parts = ((rank, bits), (rope, max(bits, ROTARY_BITS)))
        self.parts = [(size, -(-size // GROUP), part_bits) for size, part_bits in parts if size]

    @property
    def bytes_per_token(self) -> int:
        """Of one text and layer."""
        return sum(4 * groups + packed_width(size, bits) for size, groups, bits in self.parts)

    def encode(self, x_BNk: torch.Tensor) -> dict[str, torch.Tensor]:
        """Packed integers [B, N, bytes], and scales and zero points [B, N, 2 groups]."""
        codes, scales = [], []
        for part, (size, groups, bits) in zip(
            x_BNk.split([size for size, _, _ in self.parts], dim=-1), self.parts, strict=True
        ):
            # a group that is not full is filled up with its last value
            last = part[..., -1:].expand(*part.shape[:-1], groups * GROUP - size)
            wide = torch.cat((part, last), dim=-1).float().unflatten(-1, (groups, -1))
            # what float16 cannot hold saturates, and is not infinity
            low = wide.amin(-1, keepdim=True).clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
            spread = wide.amax(-1, keepdim=True) - low.float()
            step = (spread / (2**bits - 1)).clamp(1e-7, FLOAT16_MAX).half()
            found = ((wide - low.float()) / step.float()).round().clamp(0, 2**bits - 1)
            codes.append(pack(found.flatten(-2)[..., :size].to(torch.uint8), bits))
            scales += [step[..., 0].float(), low[..., 0].float()]
        # side by side before they are halved again: autocast to bfloat16 joins no float16
        return {"codes": torch.cat(codes, dim=-1), "scales": torch.cat(scales, dim=-1).half()}

    def decode(
        self, packed: dict[str, torch.Tensor], dtype: torch.dtype, ordered: bool = False, room: int = 0
    ) -> torch.Tensor:
        """[B, N + room, k], of which the last `room` tokens are there to be written; rounded to the dtype once"""
        wide = torch.promote_types(dtype, torch.float32)
        codes, scales = packed["codes"], packed["scales"].to(wide)
        tokens, width = codes.shape[-2], sum(size for size, _, _ in self.parts)
        whole = torch.empty((*codes.shape[:-2], tokens + room, width), dtype=wide, device=codes.device)
        found = whole[..., :tokens, :]
        at, bytes_at = 0, 0
        if all(bits == 8 for _, _, bits in self.parts):
            found.copy_(codes)
        else:
            for size, _, bits in self.parts:
                width = packed_width(size, bits)
                found[..., at : at + size].copy_(unpack(codes[..., bytes_at : bytes_at + width], bits, size))
                at, bytes_at = at + size, bytes_at + width
        by_part = scales.split([groups for _, groups, _ in self.parts for _ in range(2)], dim=-1)
        # side by side in memory, which is faster to read
        step, low = (torch.cat(by_part[which::2], dim=-1) for which in range(2))
        if all(size == groups * GROUP for size, groups, _ in self.parts):
            found.unflatten(-1, (-1, GROUP)).mul_(step[..., None]).add_(low[..., None])
        else:
            widths = [min(GROUP, size - place) for size, _, _ in self.parts for place in range(0, size, GROUP)]
            for number, (width, end) in enumerate(zip(widths, itertools.accumulate(widths), strict=True)):
                found[..., end - width : end].mul_(step[..., number, None]).add_(low[..., number, None])
        return whole.to(dtype)


class TransformCode:
    """Every coordinate has bits of its own, by its importance, and levels that fit how its values are distributed.

    The folder is prepared for it (`transmla quantise`): its latents are in a basis in which they are uncorrelated and
    errors of the coordinates add up. What is stored of a token beside the integers are two gains, by which its values
    are divided: the root of their mean square, and for coordinates with many bits, of a few gains from there on, that
    which leaves the least error.

    layer:  mean, deviation and importance of each coordinate [k];  bits: of each coordinate, of which some may be 0
    levels: by bits, ascending, of a coordinate of deviation 1
    wide:   bits from which on a coordinate has the second gain; None: `WIDE_BITS`
    """

    stored = ("codes", "gains")

    def __init__(
        self, layer: dict[str, list[float]], bits: list[int], levels: list[list[float]], wide: int | None = None
    ) -> None:
        self._wide = WIDE_BITS if wide is None else wide
        order = sorted(range(len(bits)), key=lambda place: -bits[place])
        # bits and number of coordinates
        self.runs = [(size, len(list(run))) for size, run in itertools.groupby(order, lambda place: bits[place])]
        self._num_wide = sum(count for size, count in self.runs if size >= self._wide)
        self.order = torch.tensor(order)
        self.back = self.order.argsort()
        self._mean, self._deviation = torch.tensor(layer["mean"]), torch.tensor(layer["deviation"])
        self._weight = torch.tensor(layer["importance"])[self.order]
        self._levels = {size: torch.tensor(levels[size]) for size, _ in self.runs}
        self._gains = torch.exp2((torch.arange(2 ** (GAIN_BITS // 2), dtype=torch.float64) - GAIN_ZERO) / GAIN_STEPS)
        self._tried = torch.tensor([GAIN_ZERO + step for step in GAINS_TRIED], dtype=torch.int32)
        self._tables: dict[torch.dtype, Any] = {}

    @property
    def bytes_per_token(self) -> int:
        """Of one text and layer."""
        return GAIN_BITS // 8 + sum(packed_width(count, bits) for bits, count in self.runs)

    def _on(self, device: torch.device) -> None:
        if self._mean.device != device:
            for name, value in vars(self).items():
                if isinstance(value, torch.Tensor):
                    setattr(self, name, value.to(device))
            self._levels = {size: values.to(device) for size, values in self._levels.items()}
            self._tables = {}

    def _in(self, dtype: torch.dtype) -> tuple[dict[int, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Levels by bits, mean, deviation and gains in a dtype, made once."""
        if dtype not in self._tables:
            levels = {bits: values.to(dtype) for bits, values in self._levels.items()}
            rest = (values.to(dtype) for values in (self._mean, self._deviation, self._gains))
            self._tables[dtype] = (levels, *rest)
        return self._tables[dtype]

    def encode(self, x_BNk: torch.Tensor) -> dict[str, torch.Tensor]:
        """Packed integers [B, N, bytes], and gains [B, N, 2]: of few bits, of many."""
        self._on(x_BNk.device)
        tokens = max(1, ENCODED // max(1, len(x_BNk) * x_BNk.shape[-1]))
        parts = [self._encode(part_BNk) for part_BNk in x_BNk.split(tokens, dim=-2)]
        return {name: torch.cat([part[name] for part in parts], dim=-2) for name in parts[0]}

    def _encode(self, x_BNk: torch.Tensor) -> dict[str, torch.Tensor]:
        """Some tokens, with G gains tried."""
        z_BNk = (x_BNk.float() - self._mean) / self._deviation
        size_BN1 = z_BNk.square().mean(-1, keepdim=True).sqrt().clamp(1e-5, 6e4)
        z_BNk = z_BNk[..., self.order]
        tried_BNG = (size_BN1.log2() * GAIN_STEPS).round().int().add(self._tried).clamp(0, len(self._gains) - 1)
        gains_BNG = self._gains.float()[tried_BNG]
        wide_BNGk, start = z_BNk[..., None, : self._num_wide] / gains_BNG.unsqueeze(-1), 0
        found, error_BNG = [], torch.zeros_like(gains_BNG)
        for bits, count in self.runs:
            if bits < self._wide:
                continue
            levels, part = self._levels[bits], wide_BNGk[..., start : start + count].contiguous()
            places = torch.bucketize(part, (levels[1:] + levels[:-1]) / 2, out_int32=True)
            error_BNG += ((levels[places] - part).square() * self._weight[start : start + count]).sum(-1)
            found.append(places)
            start += count
        best_BN1 = (error_BNG * gains_BNG.square()).argmin(-1, keepdim=True)
        gains = torch.cat((tried_BNG[..., :1], tried_BNG.gather(-1, best_BN1)), dim=-1).to(torch.uint8)
        near_BNk = z_BNk / self._gains.float()[gains[..., :1].int()]
        codes, start = [], 0
        for number, (bits, count) in enumerate(self.runs):
            levels = self._levels[bits]
            if bits >= self._wide:
                at = best_BN1.unsqueeze(-1).expand(*best_BN1.shape, count)
                places = found[number].gather(-2, at).squeeze(-2)
            elif bits:
                part = near_BNk[..., start : start + count].contiguous()
                places = torch.bucketize(part, (levels[1:] + levels[:-1]) / 2, out_int32=True)
            if bits:
                codes.append(pack(places.to(torch.uint8), bits))
            start += count
        # all bits may have gone to other layers
        return {"codes": torch.cat(codes, dim=-1) if codes else gains[..., :0], "gains": gains}

    def decode(
        self, packed: dict[str, torch.Tensor], dtype: torch.dtype, ordered: bool = False, room: int = 0
    ) -> torch.Tensor:
        """[B, N + room, k], of which the last `room` tokens are there to be written; rounded to the dtype once

        ordered: with the coordinates in the order of their bits, which saves an expensive step
        """
        codes = packed["codes"]
        wide = torch.promote_types(dtype, torch.float32)
        self._on(codes.device)
        levels, mean, deviation, gains = self._in(wide)
        tokens = codes.shape[-2]
        whole = mean.new_empty((*codes.shape[:-2], tokens + room, len(mean)))
        found, start, at = whole[..., :tokens, :], 0, 0
        for bits, count in self.runs:
            part = found[..., start : start + count]
            start += count
            if not bits:
                part.zero_()
                continue
            width = packed_width(count, bits)
            places = unpack(codes[..., at : at + width], bits, count)
            # as fast as it gets: a flat index of 32 bits
            part.copy_(torch.index_select(levels[bits], 0, places.flatten().int()).view(places.shape))
            at += width
        gains_BN2 = gains[packed["gains"].int()]
        found[..., : self._num_wide].mul_(gains_BN2[..., 1:])
        found[..., self._num_wide :].mul_(gains_BN2[..., :1])
        if not ordered:
            whole = whole[..., self.back]
            whole[..., :tokens, :].mul_(deviation).add_(mean)
        else:
            found.mul_(deviation[self.order]).add_(mean[self.order])
        return whole.to(dtype)


def dealt_bits(importance: list[list[float]], distortion: list[float], average: float) -> list[list[int]]:
    """Bits of every coordinate of every layer, so that a token has `average` bits per value with all that is stored.

    importance: of each layer and coordinate, what it adds to the loss if nothing is stored of it
    distortion: share of that which is left with 0, 1, 2 ... bits; falling and convex
    Each bit goes where it helps most; neighbours in importance get the same, so that no byte is filled up.
    """
    groups: list[tuple[int, list[int], float]] = []
    for layer, values in enumerate(importance):
        order = sorted(range(len(values)), key=lambda place: -values[place])
        for start in range(0, len(order), DEALT_TOGETHER):
            members = order[start : start + DEALT_TOGETHER]
            groups.append((layer, members, sum(values[place] for place in members)))
    size = sum(len(values) for values in importance)
    left = int(average * size / 8 + 1e-6) - len(importance) * GAIN_BITS // 8
    dealt = [0] * len(groups)
    gains = [(-weight * (distortion[0] - distortion[1]), number) for number, (_, _, weight) in enumerate(groups)]
    heapq.heapify(gains)
    while left > 0 and gains:
        _, number = heapq.heappop(gains)
        dealt[number] += 1
        left -= 1
        if dealt[number] + 1 < len(distortion):
            gain = groups[number][2] * (distortion[dealt[number]] - distortion[dealt[number] + 1])
            heapq.heappush(gains, (-gain, number))
    bits = [[0] * len(values) for values in importance]
    for (layer, members, _), count in zip(groups, dealt, strict=True):
        for place in members:
            bits[layer][place] = count
    return bits


def transform_codes(prepared: dict[str, Any], average: float, wide: int | None = None) -> list[TransformCode]:
    """A code for each layer with so many bits per value, all that is stored counted.

    prepared: `latent_code` of a config: "layers" and "levels" of `TransformCode`, and "distortion" of `dealt_bits`
    wide:     see `TransformCode`
    """
    layers = prepared["layers"]
    dealt = dealt_bits([layer["importance"] for layer in layers], prepared["distortion"], average)
    return [TransformCode(layer, bits, prepared["levels"], wide) for layer, bits in zip(layers, dealt, strict=True)]


class LatentLayer(CacheLayerMixin):
    """The cache of one layer: packed tokens, behind them the newest ones exact, and the first ones exact as well.

    A prefix of all tokens is packed; how long it is depends on the number of tokens alone, not on how they came.

    code:     packs tokens; None: all are exact
    sink:     first tokens of each text that stay exact;  recent: newest tokens that do, and up to as many more, until
              that many are packed together
    capacity: tokens that there is room for from the start, and no more than that; None: it grows
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, code: Any, sink: int, recent: int, capacity: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.code, self.sink, self.recent, self.capacity = code, sink, recent, capacity
        self.step = max(1, recent)
        self.num_packed = self.num_exact = 0
        # [B, capacity, ...] each
        self.packed: dict[str, torch.Tensor] = {}
        self.exact: torch.Tensor | None = None
        # exact values [B, sink, k] of the first tokens among the packed ones, and the place of the first of them
        self.sinks: torch.Tensor | None = None
        self.first: torch.Tensor | None = None
        # whether it is known that no text has padding, and whether some text has had nothing else yet
        self.unpadded = self.waiting = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """For tokens like these [B, 1, T, k]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, _, _, width = key_states.shape
        self.exact = key_states.new_empty(batch, 0, width)
        if self.first is None:
            self.first, self.unpadded = torch.zeros(batch, dtype=torch.long, device=self.device), True
        self.is_initialized = True

    def begin(self, mask: torch.Tensor | None) -> None:
        """Learn from the masks [B or 1, ., T, S] where each text begins, behind the padding on its left: from the first
        one, and from later ones as long as some text has been padding alone."""
        empty = self.get_seq_length() == 0
        if mask is None and empty and self.first is not None:
            # emptied, and the texts that come have no padding
            self.first, self.unpadded, self.waiting = torch.zeros_like(self.first[:1]), True, False
        if mask is None or mask.dim() != 4 or not (self.waiting or empty):
            return
        seen_BTS = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).flatten(1, 2)
        seen_BS = seen_BTS.any(1)
        first_B = torch.where(seen_BS.any(1), seen_BS.int().argmax(-1), seen_BS.shape[1])
        if self.waiting and self.first is not None:
            # texts that have begun stay where they are: what a window no longer shows is not padding
            first = self.first.to(first_B.device)  # what comes from a file is moved when tokens are added
            first_B = torch.where(first < self.get_seq_length(), first, first_B)
        self.first, self.unpadded = first_B, False
        if self.code is not None and self.sink and not torch.compiler.is_compiling():
            self.waiting = bool((first_B >= seen_BS.shape[1]).any())

    def append(self, key_B1Tk: torch.Tensor) -> None:
        """Add tokens, exact for now."""
        if not self.is_initialized:
            self.lazy_initialization(key_B1Tk, key_B1Tk)
        if self.first is not None and len(self.first) != len(key_B1Tk):  # one mask may be that of all texts
            self.first = self.first.expand(len(key_B1Tk)).clone()
        if self.capacity is not None and self.get_seq_length() + key_B1Tk.shape[2] > self.capacity:
            raise ValueError(f"this cache was made for {self.capacity} tokens")
        assert self.exact is not None
        if self.exact.device != key_B1Tk.device or self.exact.dtype != key_B1Tk.dtype:
            self._move(key_B1Tk)  # what comes from a file is where it was read, as it was kept
        wanted = self.num_exact + key_B1Tk.shape[2]
        # with a code there is little to copy, and all of it is packed soon
        room = self.capacity if self.code is None else wanted
        self.exact = _grown(self.exact, self.num_exact, wanted, room)
        self.exact[:, self.num_exact : wanted] = key_B1Tk[:, 0]
        self.num_exact = wanted

    def settle(self) -> None:
        """Pack what need not be exact any longer."""
        if self.code is None or self.num_exact < self.recent + self.step:
            return
        assert self.exact is not None and self.first is not None
        count = (self.num_exact - self.recent) // self.step * self.step
        x_BNk = self.exact[:, :count]
        self._keep_sinks(x_BNk)
        for name, part in self.code.encode(x_BNk).items():
            buffer = self.packed.get(name, part[:, :0])
            buffer = _grown(buffer, self.num_packed, self.num_packed + count, self.capacity)
            buffer[:, self.num_packed : self.num_packed + count] = part
            self.packed[name] = buffer
        self.exact = self.exact[:, count : self.num_exact].clone()
        self.num_packed, self.num_exact = self.num_packed + count, self.num_exact - count

    def _keep_sinks(self, x_BNk: torch.Tensor) -> None:
        if not self.sink:
            return
        assert self.first is not None
        if self.sinks is None:
            self.sinks = x_BNk.new_zeros(len(x_BNk), self.sink, x_BNk.shape[-1])
        at_BK = self.first[:, None] + torch.arange(self.sink, device=x_BNk.device) - self.num_packed
        inside_BK = (at_BK >= 0) & (at_BK < x_BNk.shape[1])
        taken = x_BNk.gather(1, at_BK.clamp(0, x_BNk.shape[1] - 1)[..., None].expand(-1, -1, x_BNk.shape[-1]))
        self.sinks = torch.where(inside_BK[..., None], taken, self.sinks)

    def blocks(
        self, size: int | None = None, ordered: bool = False, rows: int = 1
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The place of the first token and [B, 1, N, k] of each piece of the cache; one is unpacked at a time.

        ordered: with the coordinates in the order of the code
        rows:    of scores of a text that are made with a piece: queries times heads
        """
        order = self.code.order if ordered and self.code is not None else None
        if size is None:
            size = self._block_size(rows)
        behind = None
        if self.num_exact:
            assert self.exact is not None
            behind = self.exact[:, : self.num_exact]
            behind = behind if order is None else behind[..., order]
        # a few exact tokens go into the last piece, which is faster than one of their own
        last = behind if self.num_exact <= 2 * self.step else None
        if self.num_packed <= size:
            # a compiled step is not compiled anew when something is packed, as long as it fits into one piece
            pieces = [(0, self.num_packed)] if self.num_packed else []
        else:
            places = range(0, self.num_packed, size)
            pieces = [(start, min(start + size, self.num_packed)) for start in places]
        for start, end in pieces:
            yield start, self._unpacked(start, end, order, last if end == self.num_packed else None)[:, None]
        if behind is not None and (last is None or not self.num_packed):
            yield self.num_packed, behind[:, None]

    def _block_size(self, rows: int) -> int:
        if self.exact is None:
            return LEAST_BLOCK
        texts, _, width = self.exact.shape
        values = UNPACKED["cpu" if self.exact.device.type == "cpu" else "other"]
        return max(min(values // (texts * width), SCORES // (texts * rows)), LEAST_BLOCK)

    def _unpacked(
        self, start: int, end: int, order: torch.Tensor | None, behind_BMk: torch.Tensor | None
    ) -> torch.Tensor:
        """The packed tokens between these places and M more, the first ones of each text as they were: [B, N + M, k]"""
        part, size = {name: buffer[:, start:end] for name, buffer in self.packed.items()}, end - start
        more = 0 if behind_BMk is None else behind_BMk.shape[1]
        places_BK, sinks_BKk = None, self.sinks if order is None or self.sinks is None else self.sinks[..., order]
        if sinks_BKk is not None and not self.unpadded:
            assert self.first is not None
            at_BK = self.first[:, None] + torch.arange(self.sink, device=self.first.device) - start
            inside_BK = (at_BK >= 0) & (at_BK < size)
            if start == 0 or bool(inside_BK.any()):
                # what is elsewhere goes into a token behind the block
                places_BK = torch.where(inside_BK, at_BK, size)
        x_BNk = self.code.decode(part, self.dtype, order is not None, more if places_BK is None else max(1, more))
        if sinks_BKk is not None and self.unpadded and start < self.sink:
            x_BNk[:, : min(size, self.sink - start)] = sinks_BKk[:, start : min(end, self.sink)]
        elif sinks_BKk is not None and places_BK is not None:
            rows_B1 = torch.arange(len(places_BK), device=places_BK.device)[:, None]
            # on CPUs scatter_ would copy all of the block first
            x_BNk.index_put_((rows_B1, places_BK), sinks_BKk)
        if behind_BMk is not None:
            x_BNk[:, size : size + more] = behind_BMk
        return x_BNk[:, : size + more]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys unpacked at once, for classes that cannot read blocks; the values are a part of them."""
        if value_states.shape[-1]:
            raise ValueError("this cache holds latents; the class that is running caches something else")
        self.append(key_states)
        keys = [block for _, block in self.blocks()]
        self.settle()
        key = keys[0] if len(keys) == 1 else torch.cat(keys, dim=2)
        return key, key[..., :0]

    def get_seq_length(self) -> int:
        """Tokens of each text."""
        return self.num_packed + self.num_exact

    def get_max_length(self) -> int:
        """-1: it grows."""
        return self.capacity or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a call with so many tokens attends to, and the place of the first."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget all tokens."""
        self.num_packed = self.num_exact = 0
        self.packed, self.exact, self.sinks, self.first = {}, None, None, None
        self.unpadded = self.waiting = self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a negative number. The `recent` ones come back without a trace; of what is
        packed the rest stays packed."""
        if tokens_to_remove > 0:
            raise ValueError("pass the number of tokens to remove as a negative number")
        count = min(-tokens_to_remove, self.get_seq_length())
        exact = min(count, self.num_exact)
        self.num_exact -= exact
        self.num_packed -= count - exact

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Texts in another order, or some of them several times."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these texts."""
        if self.exact is None:
            return
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each text so many times."""
        if self.exact is not None:
            self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        assert self.exact is not None and self.first is not None
        self.exact, self.first = change(self.exact), change(self.first)
        self.packed = {name: change(buffer) for name, buffer in self.packed.items()}
        self.sinks = None if self.sinks is None else change(self.sinks)

    def _move(self, like: torch.Tensor) -> None:
        """To the device of this tensor, and what is exact to its dtype."""
        self._map(lambda tensor: tensor.to(like.device))
        assert self.exact is not None
        self.exact = self.exact.to(like.dtype)
        self.sinks = None if self.sinks is None else self.sinks.to(like.dtype)
        self.dtype, self.device = like.dtype, like.device

    def offload(self) -> None:
        """To the memory of the CPU."""
        if self.exact is not None:
            self._map(lambda tensor: tensor.cpu())

    def prefetch(self) -> None:
        """Back to the device."""
        if self.exact is not None:
            self._map(lambda tensor: tensor.to(self.device))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name, without room for more."""
        if self.exact is None or self.first is None:
            return {}
        found = {"exact": self.exact[:, : self.num_exact], "first": self.first}
        found |= {name: buffer[:, : self.num_packed] for name, buffer in self.packed.items()}
        return found if self.sinks is None else found | {"sinks": self.sinks}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """What `tensors` gave."""
        self.reset()
        packed = {name: value.clone() for name, value in tensors.items() if name not in ("exact", "first", "sinks")}
        if packed and set(packed) != set(getattr(self.code, "stored", ())):
            raise ValueError(f"this cache was packed in another way ({', '.join(packed)}): compute it again")
        exact = tensors["exact"]
        self.lazy_initialization(exact[:, None], exact[:, None])
        self.exact, self.first, self.sinks = exact.clone(), tensors["first"].clone(), tensors.get("sinks")
        self.packed, self.unpadded = packed, not bool(self.first.any())
        self.num_exact = exact.shape[1]
        self.num_packed = next(iter(packed.values())).shape[1] if packed else 0
        self.waiting = bool((self.first >= self.get_seq_length()).any())


def _grown(buffer: torch.Tensor, used: int, wanted: int, capacity: int | None) -> torch.Tensor:
    """[B, tokens, ...] with room for `wanted` tokens: the same, or a copy of the used part with more room than that."""
    if buffer.shape[1] >= wanted:
        return buffer
    room = max(wanted, capacity or wanted + wanted // 16 // PIECE * PIECE)
    larger = buffer.new_empty((buffer.shape[0], room, *buffer.shape[2:]))
    larger[:, :used] = buffer[:, :used]
    return larger


class LatentCache(Cache):
    """A cache for the classes of this file, as `past_key_values` of a forward or of `generate`.

    config: of the model
    kind:   "exact": as computed;  "int8", "int4", "int3" or "int2": `GroupCode`;  "coded4", "coded2.5" or another
            number: `TransformCode` with so many bits per cached value, all included, if the folder is prepared for it
    sink, recent: first and newest tokens that stay exact, see `LatentLayer`
    max_length: tokens to make room for from the start; without it, the cache grows
    """

    def __init__(
        self, config: Any, kind: str = "exact", sink: int = 4, recent: int = 64, max_length: int | None = None
    ) -> None:
        self.kind, self.sink, self.recent = kind, sink, recent
        codes = _codes(config, kind)
        super().__init__(layers=[LatentLayer(code, sink, recent, max_length) for code in codes])

    @property
    def bytes_per_token(self) -> float:
        """Of one text over all layers, once a token is packed."""
        layers: list[Any] = self.layers
        if layers[0].code is None:
            if layers[0].exact is None:
                raise ValueError("an exact cache knows its size when it holds something")
            return float(sum(layer.exact[0, :1].nbytes for layer in layers))
        return float(sum(layer.code.bytes_per_token for layer in layers))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All of it as named tensors, for a file; `from_state` is the inverse."""
        header = {"kind": self.kind, "sink": self.sink, "recent": self.recent}
        found = {"header": torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8)}
        layers: list[Any] = self.layers
        for index, layer in enumerate(layers):
            found |= {f"{index}.{name}": value.contiguous() for name, value in layer.tensors().items()}
        return found

    @classmethod
    def from_state(cls, config: Any, tensors: dict[str, torch.Tensor]) -> "LatentCache":
        """The cache that `state_dict` was called on; config: of the same model."""
        made = cls(config, **json.loads(bytes(tensors["header"].tolist())))
        layers: list[Any] = made.layers
        for index, layer in enumerate(layers):
            own = {name.split(".")[1]: value for name, value in tensors.items() if name.split(".")[0] == str(index)}
            if own:
                layer.load(own)
        return made


def _codes(config: Any, kind: str) -> list[Any]:
    """A code for each layer."""
    count, rank, rope = config.num_hidden_layers, config.kv_lora_rank, config.qk_rope_head_dim
    if kind == "exact":
        return [None] * count
    if kind in ("int8", "int4", "int3", "int2"):
        return [GroupCode(rank, rope, int(kind.removeprefix("int")))] * count
    if not kind.startswith("coded"):
        raise ValueError(
            f"there is no latent cache of kind {kind!r}: exact, int8, int4, int3, int2, coded4, coded2.5 ..."
        )
    prepared = getattr(config, "latent_code", None)
    if prepared is None:
        raise ValueError(f"this folder is not prepared for {kind!r}: transmla quantise FOLDER OUT prepares it")
    average, width = float(kind.removeprefix("coded")), rank + rope
    if not GAIN_BITS / width < average <= 8:
        raise ValueError(f"{kind!r}: a coded cache has more than {GAIN_BITS / width:g} and at most 8 bits per value")
    return transform_codes(prepared, average, WIDE_BITS_OF_FEW if average < FEW_BITS else None)


class CachedLatent:
    """Attention over a cache of latents, for modules that `project` hidden states to queries and what is cached.

    There are two ways to compute the same output, `decompressed` and `absorbed`; `absorbs` picks the faster one.
    """

    config: Any
    training: bool
    layer_idx: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    scaling: float
    attention_dropout: float
    # scores are softcap * tanh(score / softcap)
    softcap: float | None = None
    kv_b_proj: Any
    o_proj: Any
    project: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output of the attention block [B, T, D], and the attention weights [B, H, T, S] where they are computed.

        hidden_states:       [B, T, D]
        position_embeddings: cosine and sine of the rotary angles, [B, T, e] each
        attention_mask:      boolean or additive [B, 1 or H, T, S], or None
        past_key_values:     a cache; its values stay empty, since they are a part of the keys
        """
        if "cache" in kwargs:
            raise ValueError("continuous batching has no cache of latents (generate_batch): use generate, or an engine")
        q_nope_BHTn, q_rot_BHTe, key_B1Tk = self.project(hidden_states, position_embeddings)
        key_B1Sk = key_B1Tk
        # the name that older classes give the cache
        past_key_values = kwargs.pop("layer_past", past_key_values)
        layer = self.latent_layer(past_key_values)
        if layer is not None:
            layer.begin(attention_mask)
            if self.config._attn_implementation == "sdpa" and layer.get_seq_length() and not self.training:
                layer.append(key_B1Tk)
                if layer.num_packed:
                    out_BTHv = self.over_blocks(q_nope_BHTn, q_rot_BHTe, layer, attention_mask)
                    layer.settle()
                    return self.o_proj(out_BTHv.flatten(2)), None
                ((_, key_B1Sk),) = layer.blocks()
                layer.settle()
                past_key_values = None
        if past_key_values is not None:
            # the values are a slice of the keys, so the cache gets a tensor of zero width for them
            # static caches of older releases need to be told where to write, newer ones count themselves
            where = {"cache_position": kwargs["cache_position"]} if "cache_position" in kwargs else None
            key_B1Sk, _ = past_key_values.update(key_B1Tk, key_B1Tk[..., :0], self.layer_idx, where)

        if self.absorbs(q_nope_BHTn, key_B1Sk, attention_mask):
            out_BTHv, weights = self.absorbed(q_nope_BHTn, q_rot_BHTe, key_B1Sk, attention_mask)
        else:
            out_BTHv, weights = self.decompressed(q_nope_BHTn, q_rot_BHTe, key_B1Sk, attention_mask, **kwargs)
        return self.o_proj(out_BTHv.flatten(2)), weights

    def latent_layer(self, cache: Any) -> Any:
        """The layer of a `LatentCache`; None for any other cache. It may come from another copy of this file."""
        if cache is None:  # without a look at layer_idx: compiled layers share a graph in training
            return None
        layers = getattr(cache, "layers", ())
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        return layer if type(layer).__name__ == LatentLayer.__name__ else None

    def over_blocks(
        self, q_nope_BHTn: torch.Tensor, q_rot_BHTe: torch.Tensor, layer: LatentLayer, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Output of the heads [B, T, H, v], with one block of the cache unpacked at a time.

        Maxima and sums of the softmax are corrected from block to block (Milakov and Gimelshein, 1805.02867).
        """
        rank, num_queries, expanded = self.kv_lora_rank, q_nope_BHTn.shape[2], self.expanded_width
        order: torch.Tensor | None = None
        absorbs = self.reads_weights(q_nope_BHTn) and num_queries * (2 * rank - expanded) < rank * expanded
        if absorbs:
            w_uk_Hnr, w_uv_Hvr = self.up_projections()
            # all heads are rows of one text: [B, 1, H * T, k]
            query = torch.cat((torch.einsum("bhtn,hnr->bhtr", q_nope_BHTn, w_uk_Hnr), q_rot_BHTe), dim=-1)
            query = query.flatten(1, 2)[:, None]
            # keys may come in any order that the queries have as well
            order = layer.code.order
            query = query if order is None else query[..., order]
            mask = _mask_of_rows(mask, q_nope_BHTn.shape[1])
        else:
            query = torch.cat((q_nope_BHTn, q_rot_BHTe), dim=-1)
        wide = torch.promote_types(query.dtype, torch.float32)
        top: Any = None
        total = attended = heads = top
        for start, key_B1Nk in layer.blocks(ordered=absorbs, rows=q_nope_BHTn.shape[1] * num_queries):
            key, value = (key_B1Nk, key_B1Nk) if absorbs else self.expand(key_B1Nk)
            scores = _scores(query, key, wide).mul_(self.scaling)
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            bias = None if mask is None else _additive(mask[..., start : start + key.shape[2]], wide)
            if bias is not None:
                scores = scores + bias
            if start == 0 and key.shape[2] == layer.get_seq_length():
                # all there is, as in most steps
                heads = scores.softmax(-1).to(value.dtype) @ value
                break
            # a mask may be infinite, and leave a query nothing in a piece
            peak = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(wide).min)
            new_top = peak if top is None else torch.maximum(top, peak)
            weights = (scores - new_top).exp_()
            part, part_total = (weights.to(value.dtype) @ value).to(wide), weights.sum(-1, keepdim=True)
            if top is None:
                attended, total = part, part_total
            else:
                kept = (top - new_top).exp_()
                attended, total = attended * kept + part, total * kept + part_total
            top = new_top
        heads = (attended / total if heads is None else heads).to(query.dtype)
        if not absorbs:
            return heads.transpose(1, 2)
        latents = heads if order is None else heads[..., layer.code.back]
        heads_BHTr = latents[..., :rank].reshape(len(heads), -1, num_queries, rank)
        return torch.einsum("bhtr,hvr->bthv", heads_BHTr, w_uv_Hvr)

    def up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of kv_b_proj for keys [H, n, r] and values [H, v, r]."""
        w_Hxr = self.kv_b_proj.weight.view(-1, self.expanded_width, self.kv_lora_rank)
        return w_Hxr[:, : self.qk_nope_head_dim], w_Hxr[:, self.qk_nope_head_dim :]

    def expand(self, key_B1Sk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, H, S, n + e] and values [B, H, S, v] of all heads."""
        batch, _, num_keys, _ = key_B1Sk.shape
        latent_BSr = key_B1Sk[:, 0, :, : self.kv_lora_rank]
        expanded_BHSx = self.kv_b_proj(latent_BSr).view(batch, num_keys, -1, self.expanded_width).transpose(1, 2)
        k_rot_BHSe = key_B1Sk[..., self.kv_lora_rank :].expand(-1, expanded_BHSx.shape[1], -1, -1)
        key_BHSq = torch.cat((expanded_BHSx[..., : self.qk_nope_head_dim], k_rot_BHSe), dim=-1)
        return key_BHSq, expanded_BHSx[..., self.qk_nope_head_dim :]

    @property
    def expanded_width(self) -> int:
        """n + v, the number of values that kv_b_proj expands the latent to for each head."""
        return self.qk_nope_head_dim + (self.v_head_dim or 0)

    def absorbs(self, q_nope_BHTn: torch.Tensor, key_B1Sk: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether `absorbed` is possible and costs less than `decompressed`.

        Multiply-adds per head and cached token:

            decompressed   r (n + v)  to expand,  T (n + e) scores,  T v values
            absorbed                              T (r + e) scores,  T r values

        so absorbing costs less when T (2r - n - v) < r (n + v). Absorbing the query and expanding the output
        take r (n + v) per query token, never more than expanding S > T cached tokens.
        """
        num_queries, num_keys = q_nope_BHTn.shape[2], key_B1Sk.shape[2]
        rank, expanded = self.kv_lora_rank, self.expanded_width
        cheaper = num_queries * (2 * rank - expanded) < rank * expanded
        if self.training or not (num_keys > num_queries and cheaper):
            return False
        if self.config._attn_implementation not in ("sdpa", "eager"):
            return False
        # several queries without a mask are the prefill of an empty static cache; the stock interface handles it
        if mask is None and num_queries > 1:
            return False
        return self.reads_weights(key_B1Sk)

    def reads_weights(self, beside: torch.Tensor) -> bool:
        """Whether the weights of kv_b_proj may be read, being on the device of this tensor; adapters, quantised,
        sharded and offloaded layers have to run their own forward."""
        if type(self.kv_b_proj) is not nn.Linear:
            return False
        weight = self.kv_b_proj.weight
        # torchao and DTensor keep the layer and put a tensor that wraps others in the place of its weight, DeepSpeed
        # an empty one
        is_whole = not hasattr(weight, "__tensor_flatten__") and weight.dim() == 2
        return is_whole and weight.device == beside.device

    def absorbed(
        self,
        q_nope_BHTn: torch.Tensor,
        q_rot_BHTe: torch.Tensor,
        key_B1Sk: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output of the heads [B, T, H, v] by multi-query attention in latent space, and the weights if eager.

        The keys' half of kv_b_proj is applied to the queries and the values' half to the output, so that nothing is
        expanded for cached tokens (DeepSeek-V2, 2405.04434, section 2.1.2). All H * T queries attend to one key.
        """
        w_uk_Hnr, w_uv_Hvr = self.up_projections()
        q_latent_BHTr = torch.einsum("bhtn,hnr->bhtr", q_nope_BHTn, w_uk_Hnr)
        q_BHTk = torch.cat((q_latent_BHTr, q_rot_BHTe), dim=-1)
        num_heads, num_queries = q_BHTk.shape[1:3]
        rows_B1Rk = q_BHTk.flatten(1, 2)[:, None]
        rank, scale = self.kv_lora_rank, self.scaling

        weights: torch.Tensor | None = None
        explicit = self.softcap is not None or self.config._attn_implementation == "eager"
        kernel = "products" if explicit else _kernel(q_BHTk, key_B1Sk, mask)
        if kernel == "products":
            attended_B1Rr, weights_B1RS = _products(
                rows_B1Rk, key_B1Sk, rank, _mask_of_rows(mask, num_heads), scale, self.softcap
            )
            if self.config._attn_implementation == "eager":
                weights = weights_B1RS.view(-1, num_heads, num_queries, key_B1Sk.shape[2])
        elif kernel == "heads":
            attended_B1Rr = nn.functional.scaled_dot_product_attention(
                q_BHTk, key_B1Sk, key_B1Sk, scale=scale, enable_gqa=True
            )[..., :rank]
        else:
            # the key serves as the value: fused kernels need equal widths, and they read this tensor anyway
            attended_B1Rr = nn.functional.scaled_dot_product_attention(
                rows_B1Rk, key_B1Sk, key_B1Sk, attn_mask=_mask_of_rows(mask, num_heads), scale=scale
            )[..., :rank]
        attended_BHTr = attended_B1Rr.reshape(-1, num_heads, num_queries, rank)
        return torch.einsum("bhtr,hvr->bthv", attended_BHTr, w_uv_Hvr), weights

    def decompressed(
        self,
        q_nope_BHTn: torch.Tensor,
        q_rot_BHTe: torch.Tensor,
        key_B1Sk: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output of the heads [B, T, H, v] by the attention that the config names, and the weights if it returns them.

        Keys and values of all heads are expanded from the latent first.
        """
        key_BHSq, value_BHSv = self.expand(key_B1Sk)
        query_BHTq = torch.cat((q_nope_BHTn, q_rot_BHTe), dim=-1)
        attend: Attention = stock.eager_attention_forward
        if self.config._attn_implementation == "eager":
            mask = _additive(mask, query_BHTq.dtype)
        else:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        if self.softcap is not None:
            attend = functools.partial(_capped, softcap=self.softcap)
        width, missing = value_BHSv.shape[-1], key_BHSq.shape[-1] - value_BHSv.shape[-1]
        if missing > 0 and self.config._attn_implementation == "sdpa" and value_BHSv.device.type == "cpu":
            # on CPUs the fused kernel needs equal widths; it is three times as fast as the fallback
            value_BHSv = nn.functional.pad(value_BHSv, (0, missing))
        out_BTHv, weights = attend(
            self, query_BHTq, key_BHSq, value_BHSv, mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return out_BTHv[..., :width], weights


class LatentAttention(CachedLatent, stock.DeepseekV3Attention):  # type: ignore[misc]
    """Attention with the parameters of the stock class, and the latent in the cache."""

    # with a q_lora_rank, q_proj is None; without one, the others are
    q_proj: Any
    q_a_proj: Any
    q_a_layernorm: Any
    q_b_proj: Any

    def project(
        self, hidden_BTD: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries without rotation [B, H, T, n], rotated queries [B, H, T, e], and what is cached [B, 1, T, r + e].

        The cache holds the latent (r values), followed by the rotated rotary key (e values).
        """
        if self.q_lora_rank is None:
            q_BTq = self.q_proj(hidden_BTD)
        else:
            q_BTq = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTD)))
        q_BHTq = q_BTq.view(*q_BTq.shape[:2], -1, self.qk_head_dim).transpose(1, 2)
        q_nope_BHTn, q_rot_BHTe = q_BHTq[..., : self.qk_nope_head_dim], q_BHTq[..., self.qk_nope_head_dim :]

        down_BTk = self.kv_a_proj_with_mqa(hidden_BTD)
        latent_BTr = self.kv_a_layernorm(down_BTk[..., : self.kv_lora_rank])
        k_rot_BTe = down_BTk[..., self.kv_lora_rank :]

        interleave = self.config.rope_interleave
        rotate = stock.apply_rotary_pos_emb_interleave if interleave else stock.apply_rotary_pos_emb
        q_rot_BHTe, k_rot_B1Te = rotate(q_rot_BHTe, k_rot_BTe[:, None], *position_embeddings)
        return q_nope_BHTn, q_rot_BHTe, torch.cat((latent_BTr[:, None], k_rot_B1Te), dim=-1)


def _scores(query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """query keyᵀ in a dtype; few queries of a single text from the other side, where CPUs copy no keys."""
    if key.shape[0] > 1 or 8 * query.shape[-2] > key.shape[-2] or key.shape[1] > 1:
        return (query @ key.transpose(-1, -2)).to(dtype)
    return (key @ query.transpose(-1, -2)).transpose(-1, -2).to(dtype, memory_format=torch.contiguous_format)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask (boolean, true: attend) to add to scores; finite, so that fully masked rows do not become NaN."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return mask.clamp_min(torch.finfo(mask.dtype).min)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _mask_of_rows(mask: torch.Tensor | None, num_heads: int) -> torch.Tensor | None:
    """A mask [B, 1 or H, T, S] as [B, 1, H * T, S]; [B, 1, 1, S] broadcasts and stays."""
    if mask is None or mask.shape[1:3] == (1, 1):
        return mask
    return mask.expand(-1, num_heads, -1, -1).flatten(1, 2)[:, None]


def _kernel(q_BHTk: torch.Tensor, key_B1Sk: torch.Tensor, mask: torch.Tensor | None) -> str:
    """How absorbed attention runs: "rows", all heads as queries of one fused call; "heads", one fused call with a
    grouped key; "products", two matrix products and a softmax.

    With one key head, the fused kernels of a GPU give all rows of a text to one of its multiprocessors. Up to a width
    of 256 the flash kernel divides the cache of a single query per head among them; above, two products do. On an H100
    at 512 + 64 and 65,536 tokens of one text: rows 6.2 ms, products 0.28 ms; at 96 + 32: rows 0.85 ms, heads 0.05 ms.
    """
    if key_B1Sk.device.type != "cuda":
        return "rows"
    batch, num_heads, num_queries, width = q_BHTk.shape
    if width <= 256 and num_queries == 1 and mask is None and q_BHTk.dtype in (torch.float16, torch.bfloat16):
        return "heads"
    # scores are in memory
    return "products" if batch * num_heads * num_queries * key_B1Sk.shape[2] <= 2**28 else "rows"


def _capped(
    module: nn.Module,
    query_BHTq: torch.Tensor,
    key_BHSq: torch.Tensor,
    value_BHSv: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float,
    softcap: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with capped scores (Gemma 2, 2408.00118, section 2), for which there is no fused kernel."""
    scores_BHTS = softcap * torch.tanh(query_BHTq @ key_BHSq.transpose(-1, -2) * (scaling / softcap))
    num_queries, num_keys = scores_BHTS.shape[-2:]
    if mask is None and num_queries > 1:
        # the keys behind the queries, if there are any, are the empty places of a static cache
        places = torch.arange(num_keys, device=scores_BHTS.device)
        mask = places <= places[:num_queries, None]
    bias = _additive(mask, scores_BHTS.dtype)
    if bias is not None:
        scores_BHTS = scores_BHTS + bias
    wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = scores_BHTS.softmax(dim=-1, dtype=wide).to(query_BHTq.dtype)
    weights_BHTS = nn.functional.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ value_BHSv).transpose(1, 2).contiguous(), weights_BHTS


def _products(
    rows_B1Rk: torch.Tensor,
    key_B1Sk: torch.Tensor,
    rank: int,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attended latents [B, 1, R, r] and attention weights [B, 1, R, S] of R rows of queries, with a float32 softmax."""
    scores_B1RS = rows_B1Rk @ key_B1Sk.transpose(-1, -2) * scaling
    if softcap is not None:
        scores_B1RS = softcap * torch.tanh(scores_B1RS / softcap)
    bias = _additive(mask, scores_B1RS.dtype)
    if bias is not None:
        scores_B1RS = scores_B1RS + bias
    wide = torch.promote_types(scores_B1RS.dtype, torch.float32)
    weights_B1RS = scores_B1RS.softmax(dim=-1, dtype=wide).to(rows_B1Rk.dtype)
    return weights_B1RS @ key_B1Sk[..., :rank], weights_B1RS


class LatentGeneration:
    """`generate` with `cache_implementation="latent"`, "latent-int4", "latent-coded3" ...: see `LatentCache`."""

    config: Any

    def latent_cache(self, kind: str = "exact", **settings: Any) -> LatentCache:
        """An empty cache for this model. kind: with or without the "latent-" that `generate` wants before it; settings:
        sink, recent, max_length"""
        kind = "exact" if kind == "latent" else kind.removeprefix("latent-")
        return LatentCache(self.config, kind, **settings)

    def generate(self, *args: Any, cache_implementation: str | None = None, **kwargs: Any) -> Any:
        """As in transformers, which would refuse names of caches that it does not know."""
        if cache_implementation == "quantized":
            raise ValueError(
                "the quantised caches of transformers hold keys and values, and a latent is both: "
                'use cache_implementation="latent-int8", "latent-int4" or, once prepared, "latent-coded3"'
            )
        if cache_implementation is not None and cache_implementation.partition("-")[0] == "latent":
            if kwargs.get("past_key_values") is not None:
                raise ValueError(
                    f"past_key_values is a cache already, and cache_implementation={cache_implementation!r} would make "
                    "a new one: leave one of them out"
                )
            kwargs["past_key_values"] = self.latent_cache(cache_implementation)
        elif cache_implementation is not None:
            kwargs["cache_implementation"] = cache_implementation
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _get_static_cache_init_shape(self) -> None:
        """Static caches get their shape from the first tokens: the heads of a config say nothing of a latent."""


def _check_quantisation(config: Any) -> None:
    """`ValueError` for what loses the latent rows of kv_a_proj_with_mqa, which are thousands of times as small as the
    rotary rows below them: double quantisation rounds the scales of all blocks of a tensor together."""
    given = getattr(config, "quantization_config", None) or {}
    settings = given if isinstance(given, dict) else given.to_dict()
    kept = [name for name in settings.get("llm_int8_skip_modules") or () if name]
    double = settings.get("load_in_4bit") and settings.get("bnb_4bit_use_double_quant")
    if double and not any("model.layers.0.self_attn.kv_a_proj_with_mqa".endswith(name) for name in kept):
        raise ValueError(
            "bnb_4bit_use_double_quant loses what this model caches: leave it out, or leave out these layers, "
            'llm_int8_skip_modules=["kv_a_proj_with_mqa", "lm_head"]'
        )


class DeepseekV3ForCausalLM(LatentGeneration, stock.DeepseekV3ForCausalLM):
    """The stock model with `LatentAttention`.

    It has the name of the stock class on purpose: save_pretrained writes the class name to `architectures`, by which
    vLLM, SGLang and llama.cpp's converter choose their implementation.
    """

    # makes save_pretrained copy this file and write auto_map, however the model was loaded
    _auto_class = "AutoModelForCausalLM"
    # `absorbed` needs 4D masks
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        folded = getattr(config, "latent_norm_folded", False)
        if folded:
            _check_quantisation(config)
        for layer in self.model.layers:
            # changing the class keeps the parameters of the stock class, their initialisation and meta tensors
            layer.self_attn.__class__ = LatentAttention
            if folded:
                layer.self_attn.kv_a_layernorm.__class__ = FoldedRMSNorm
            if folded and config.q_lora_rank is not None:
                layer.self_attn.q_a_layernorm.__class__ = FoldedRMSNorm


class UnfoldedConfig(DeepseekV3Config):
    """Config of the unfolded form. Stock classes refuse its model_type; they would apply a norm to the latent."""

    model_type = "deepseek_v3_unfolded"
    _auto_class = "AutoConfig"


class UnfoldedForCausalLM(DeepseekV3ForCausalLM):
    """The form for training: weights of ordinary size, no latent norm, and biases of queries where they belong.

    `transmla fold` writes the stock form of it.
    """

    config_class = UnfoldedConfig

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.kv_a_layernorm.__class__ = LatentGain
            if config.q_lora_rank is not None:
                attention.q_a_layernorm.__class__ = LatentGain
            if getattr(config, "query_bias", False):
                last = attention.q_proj if config.q_lora_rank is None else attention.q_b_proj
                last.bias = nn.Parameter(torch.zeros_like(last.weight[:, 0]))


# An attention function that attends to nothing: queries, keys and values of each token side by side, [B, T, 1, .].
TAP = "transmla_tap"


def _tap(
    module: nn.Module, query_BHTd: torch.Tensor, key_BGTd: torch.Tensor, value_BGTv: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    parts = [x.transpose(1, 2).flatten(2) for x in (query_BHTd, key_BGTd, value_BGTv)]
    return torch.cat(parts, dim=-1)[:, :, None], None


ALL_ATTENTION_FUNCTIONS.register(TAP, _tap)


def as_encoder(attention: Any, output_projection: str) -> Any:
    """A transformers attention module, changed in place to give what it would attend with: see `encode`."""
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = TAP
    delattr(attention, output_projection)
    # no module, which would have the name that adapters are put on
    attention.__dict__[output_projection] = _unchanged
    return attention


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def encode(encoder: Any, hidden_BTD: torch.Tensor, rotary_dim: int, factor: float = 1.0) -> torch.Tensor:
    """Unrotated queries, keys and values of a module's own projections and norms, [B, T, H d + G d + G v].

    encoder:    from `as_encoder`; it runs as it is, but for a rotation by nothing and `TAP` in place of attention
    rotary_dim: values of a head that it wants to rotate
    factor:     that cosine and sine are multiplied with, so these values of queries and keys as well
    """
    cosine = hidden_BTD.new_full((1, 1, rotary_dim), factor)
    angles = (cosine, torch.zeros_like(cosine))
    encoded: torch.Tensor = encoder(hidden_states=hidden_BTD, attention_mask=None, position_embeddings=angles)[0]
    return encoded


class TransmlaConfig(PreTrainedConfig):
    """Config of a converted model in its own form: the source's config, and the sizes of the latent attention.

    text_config:          of the source, unchanged, and of any model type that transformers has
    kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim: as in deepseek_v3
    latent_inv_freq:      frequencies of the rotary key's pairs in radians per position, for each layer
    latent_encoder:       "input": the latent is made of the hidden state; "features": of the keys and values that the
                          source's own projections and norms make of it
    softmax_scale, softcap: of the attention scores
    base_module:          name of the module that holds the layers
    attention_module, output_projection: names of the modules that are exchanged
    source_rotary_dim:    values of a head that the source rotates
    query_bias, rope_bias, output_bias: whether these projections have biases
    """

    model_type = "transmla"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    _auto_class = "AutoConfig"

    def __init__(
        self,
        text_config: Any = None,
        kv_lora_rank: int = 0,
        qk_rope_head_dim: int = 0,
        qk_nope_head_dim: int = 0,
        v_head_dim: int = 0,
        latent_inv_freq: list[list[float]] | None = None,
        latent_encoder: str = "input",
        softmax_scale: float = 1.0,
        softcap: float | None = None,
        base_module: str = "model",
        attention_module: str = "self_attn",
        output_projection: str = "o_proj",
        source_rotary_dim: int = 0,
        query_bias: bool = False,
        rope_bias: bool = False,
        output_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config, given = text_config, set(kwargs)
        if text_config is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.qk_nope_head_dim, self.v_head_dim = qk_nope_head_dim, v_head_dim
        self.latent_inv_freq, self.latent_encoder = latent_inv_freq or [], latent_encoder
        self.softmax_scale, self.softcap = softmax_scale, softcap
        self.base_module = base_module
        self.attention_module, self.output_projection = attention_module, output_projection
        self.source_rotary_dim = source_rotary_dim
        self.query_bias, self.rope_bias, self.output_bias = query_bias, rope_bias, output_bias
        for name in given:
            if self._is_shared(name):
                setattr(self, name, getattr(self, name))

    def __setattr__(self, name: str, value: Any) -> None:
        """What is changed here is changed for the source's modules as well, which read `text_config`."""
        # what the base class sets by default, before there are any sizes, is no change
        shared = "kv_lora_rank" in self.__dict__ and self._is_shared(name)
        if not shared or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)  # type: ignore[no-untyped-call]
        if shared:
            setattr(self.text_config, name, value)

    def _is_shared(self, name: str) -> bool:
        """Whether a setting is one of `text_config`, whatever else has it."""
        return not name.startswith("_") and name not in _OF_ONE_CONFIG and hasattr(self.text_config, name)

    def __getattr__(self, name: str) -> Any:
        """What is not set here is that of the source."""
        if name.startswith("__") or "text_config" not in self.__dict__ or self.__dict__["text_config"] is None:
            raise AttributeError(name)
        return getattr(self.__dict__["text_config"], name)


# settings of `TransmlaConfig` that are its own, or not the model's
_OF_ONE_CONFIG = frozenset(inspect.signature(TransmlaConfig.__init__).parameters) | {
    "architectures", "auto_map", "dtype", "model_type", "name_or_path", "quantization_config", "torch_dtype",
    "transformers_version",
}  # fmt: skip


class LatentRotary(nn.Module):
    """Cosine and sine of the angles of the shared rotary key, in place of the source's; for all layers at once."""

    def __init__(self, config: TransmlaConfig) -> None:
        super().__init__()
        self.inv_freq = config.latent_inv_freq
        # no buffer, which would be cast along with the weights
        self._on_device: dict[torch.device, torch.Tensor] = {}

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """[layers, B, T, e] each, the two halves of a pair e / 2 apart, in the dtype of x."""
        if x.device not in self._on_device:
            self._on_device[x.device] = torch.tensor(self.inv_freq, dtype=torch.float32, device=x.device)
        inv_freq_LM = self._on_device[x.device]
        angles_LBTM = position_ids[..., None].float() * inv_freq_LM[:, None, None]
        # narrow before they are doubled: of all layers and a long text they are large
        cos_LBTM, sin_LBTM = angles_LBTM.cos().to(x.dtype), angles_LBTM.sin().to(x.dtype)
        return torch.cat((cos_LBTM, cos_LBTM), dim=-1), torch.cat((sin_LBTM, sin_LBTM), dim=-1)


class ConvertedAttention(CachedLatent, nn.Module):
    """Latent attention without a norm on the latent, in place of a source's attention module."""

    encoder: Any

    def __init__(self, config: TransmlaConfig, text_config: Any, index: int, attention: Any) -> None:
        super().__init__()
        # the source's config holds the attention implementation that the whole model uses
        self.config, self.layer_idx = text_config, index
        self.kv_lora_rank, self.qk_rope_head_dim = config.kv_lora_rank, config.qk_rope_head_dim
        self.qk_nope_head_dim, self.v_head_dim = config.qk_nope_head_dim, config.v_head_dim
        self.scaling, self.softcap = config.softmax_scale, config.softcap
        self.attention_dropout = float(getattr(text_config, "attention_dropout", 0.0) or 0.0)
        self.is_causal, self.num_key_value_groups = True, 1
        heads, hidden = text_config.num_attention_heads, text_config.hidden_size
        cached = self.kv_lora_rank + self.qk_rope_head_dim
        if config.latent_encoder == "features":
            self.encoder = as_encoder(attention, config.output_projection)
            self.rotary_dim, self.num_queries = config.source_rotary_dim, heads * self.qk_nope_head_dim
            groups = text_config.num_key_value_heads
            seen = groups * (self.qk_nope_head_dim + self.v_head_dim)
            self.q_rope_proj = nn.Parameter(torch.empty(heads, self.qk_rope_head_dim, self.qk_nope_head_dim))
            # here, since the source's class, which initialises what has no weights yet, does not know it
            nn.init.normal_(self.q_rope_proj, std=getattr(text_config, "initializer_range", None) or 0.02)
        else:
            self.encoder, seen = None, hidden
            width = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
            self.q_proj = nn.Linear(hidden, width, bias=config.query_bias)
        self.kv_a_proj_with_mqa = nn.Linear(seen, cached, bias=config.rope_bias)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.output_bias)

    def project(
        self, hidden_BTD: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries without rotation [B, H, T, n], rotated queries [B, H, T, e], and what is cached [B, 1, T, r + e]."""
        nope = self.qk_nope_head_dim
        if self.encoder is None:
            q_BTq, seen_BTF = self.q_proj(hidden_BTD), hidden_BTD
        else:
            encoded = encode(self.encoder, hidden_BTD, self.rotary_dim)
            q_BTq, seen_BTF = encoded[..., : self.num_queries], encoded[..., self.num_queries :]
        q_BHTq = q_BTq.unflatten(-1, (-1, nope if self.encoder is not None else nope + self.qk_rope_head_dim))
        q_BHTq = q_BHTq.transpose(1, 2)
        q_nope_BHTn = q_BHTq[..., :nope]
        if self.encoder is None:
            q_rope_BHTe = q_BHTq[..., nope:]
        else:
            q_rope_BHTe = torch.einsum("bhtd,hed->bhte", q_BHTq, self.q_rope_proj)
        down_BTk = self.kv_a_proj_with_mqa(seen_BTF)
        k_rope_B1Te = down_BTk[:, None, :, self.kv_lora_rank :]
        cos_BTe, sin_BTe = (of_layers[self.layer_idx] for of_layers in position_embeddings)
        q_rope_BHTe, k_rope_B1Te = stock.apply_rotary_pos_emb(q_rope_BHTe, k_rope_B1Te, cos_BTe, sin_BTe)
        return q_nope_BHTn, q_rope_BHTe, torch.cat((down_BTk[:, None, :, : self.kv_lora_rank], k_rope_B1Te), dim=-1)


# of a class of transformers
_OF_THE_CLASS = (
    "_tied_weights_keys", "_no_split_modules", "_skip_keys_device_placement", "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_save",
)  # fmt: skip


class ExchangedModel(PreTrainedModel):
    """The source's own class with its attention exchanged for latent attention; all other code is the library's.

    auto:      the class of transformers that makes the source's class
    attention: the class that takes the place of its attention
    """

    config_class = TransmlaConfig
    base_model_prefix = "model"
    auto: Any
    attention: Any = ConvertedAttention
    _supports_sdpa = True
    # `absorbed` needs 4D masks
    _supports_flash_attn = False
    _supports_flex_attn = False
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True

    def __init__(self, config: TransmlaConfig) -> None:
        super().__init__(config)
        config.text_config.num_labels = config.num_labels
        # whatever attends in the source's class is about to be exchanged, so it need not support what this one does;
        # dtype: of the parameters that take its place
        inner: Any = self.auto.from_config(
            config.text_config, dtype=torch.get_default_dtype(), attn_implementation="eager"
        )
        inner.config._attn_implementation = config._attn_implementation
        # around nn.Module, which would register its parameters a second time
        self.__dict__["_inner"] = inner
        self.base_model_prefix = config.base_module
        # what transformers knows of the source's class, among other things where layers may be cut between devices
        for name in _OF_THE_CLASS:
            setattr(self, name, getattr(inner, name, None))
        base = getattr(inner, config.base_module, inner)
        for index, layer in enumerate(base.layers):
            attention = getattr(layer, config.attention_module)
            setattr(layer, config.attention_module, self.attention(config, inner.config, index, attention))
        base.rotary_emb = LatentRotary(config)
        # nor may the modules within it refuse later what `from_pretrained` was given, as Gemma 2 does for its caps
        for module in inner.modules():
            if isinstance(module, PreTrainedModel):
                module._supports_sdpa = True
        for name, child in inner.named_children():
            setattr(self, name, child)
        table = inner.get_input_embeddings()
        self._embeddings = next(name for name, module in inner.named_modules() if module is table)
        self.post_init()  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        """What a forward of the source's class reads of itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_inner" or "_inner" not in self.__dict__:
                raise
            return getattr(self.__dict__["_inner"], name)

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens, whatever the source's class calls it."""
        return self.get_submodule(self._embeddings)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another table of tokens in its place."""
        holder, _, name = self._embeddings.rpartition(".")
        setattr(self.get_submodule(holder), name, value)

    def _init_weights(self, module: Any) -> None:
        """As the source's class: constants that are no weights are set here as well."""
        self.__dict__["_inner"]._init_weights(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's class."""
        return type(self.__dict__["_inner"]).forward(self, *args, **kwargs)


# by its signature, here that of any class with a head, transformers' Trainer chooses the columns that it hands over
functools.update_wrapper(ExchangedModel.forward, stock.DeepseekV3ForCausalLM.forward, assigned=(), updated=())


class TransmlaModel(ExchangedModel):
    """Without a head.

    transformers knows by its class what a model can record, hidden states for example, and this one stands for many. So
    the source's own runs, on the same modules.
    """

    auto = AutoModel
    _auto_class = "AutoModel"

    def __init__(self, config: TransmlaConfig) -> None:
        super().__init__(config)
        # one dictionary, so that what takes the place of a module here does so there
        self.__dict__["_inner"].__dict__["_modules"] = self._modules

    def train(self, mode: bool = True) -> Any:
        """As any module."""
        self.__dict__["_inner"].training = mode
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the source's class."""
        inner = self.__dict__["_inner"]
        # replicas of DataParallel have modules of their own
        return inner.forward(*args, **kwargs) if inner._modules is self._modules else super().forward(*args, **kwargs)


functools.update_wrapper(TransmlaModel.forward, stock.DeepseekV3Model.forward, assigned=(), updated=())


class TransmlaForCausalLM(LatentGeneration, ExchangedModel, GenerationMixin):
    """With the source's head."""

    auto = AutoModelForCausalLM
    _auto_class = "AutoModelForCausalLM"


class TransmlaForSequenceClassification(ExchangedModel):
    """With a new head, where the source's family has such a class."""

    auto = AutoModelForSequenceClassification
    _auto_class = "AutoModelForSequenceClassification"


__all__ = [
    "DeepseekV3ForCausalLM",
    "LatentCache",
    "TransmlaConfig",
    "TransmlaForCausalLM",
    "TransmlaForSequenceClassification",
    "TransmlaModel",
    "UnfoldedConfig",
    "UnfoldedForCausalLM",
]
