"""Caches of packed integers, to measure what they cost in quality and hold in memory.

A converted model has caches of its own (`LatentCache`). For sources, the two ways that are best known stand here, under
the same rules: the first and the newest tokens stay exact, scales are counted, and what is stored is really packed.

Legend: B batch, G key/value heads, T tokens, N tokens that are packed at once, d values per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from transmla.maths.coding import SINK, lloyd_max, spread_basis
from transmla.model.modeling_transmla import GAIN_BITS, GroupCode, pack, unpack

# newest tokens of a text that stay exact, as the first ones (`SINK`) do, in every cache that is measured
RECENT = 64
# whole numbers of bits that there are integers of
GRID_BITS = (2, 3, 4, 8)
Packed = dict[str, Tensor]


class Code(Protocol):
    """Packs keys or values [B, G, N, d] of N neighbouring tokens."""

    def encode(self, x_BGNd: Tensor) -> Packed: ...

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor: ...


class PairCode(Protocol):
    """Packs keys and values [B, G, N, d] of N neighbouring tokens, of which the first has the position `start`."""

    def encode(self, key_BGNd: Tensor, value_BGNd: Tensor, start: int) -> Packed: ...

    def decode(self, packed: Packed, start: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...


class Apart:
    """Keys by one code, values by another."""

    def __init__(self, key: Code, value: Code) -> None:
        self._codes = {"key": key, "value": value}

    def encode(self, key_BGNd: Tensor, value_BGNd: Tensor, start: int) -> Packed:
        halves = zip(self._codes.items(), (key_BGNd, value_BGNd), strict=True)
        return {f"{half}.{name}": part for (half, code), x in halves for name, part in code.encode(x).items()}

    def decode(self, packed: Packed, start: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key, value = (
            code.decode(
                {name.removeprefix(f"{half}."): x for name, x in packed.items() if name.startswith(f"{half}.")}, dtype
            )
            for half, code in self._codes.items()
        )
        return key, value


class GridCode:
    """An asymmetric grid of 2^bits levels per group of 32: with `by_channel`, neighbours in time share one, since
    channels of keys differ in size (KIVI, 2402.02750); else neighbouring channels of a token do."""

    def __init__(self, size: int, bits: int, *, by_channel: bool) -> None:
        self._code, self._by_channel = GroupCode(size, 0, bits), by_channel

    def encode(self, x_BGNd: Tensor) -> Packed:
        return self._code.encode(x_BGNd.transpose(2, 3) if self._by_channel else x_BGNd)

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        x_BGNd = self._code.decode(packed, dtype)
        return x_BGNd.transpose(2, 3) if self._by_channel else x_BGNd


class RotatedCode:
    """A random rotation of each head, its norm for every token, and the levels that are best for a normal distribution
    (TurboQuant, 2504.19874)."""

    def __init__(self, size: int, bits: int) -> None:
        normal = torch.special.ndtri((torch.arange(20000, dtype=torch.float64) + 0.5) / 20000)
        levels, _ = lloyd_max(normal, torch.ones_like(normal), 2**bits)
        self._levels, self._bits, self._size = levels.float(), bits, size
        self._rotation_dd = spread_basis(size).float()

    def encode(self, x_BGNd: Tensor) -> Packed:
        device = x_BGNd.device
        z_BGNd = x_BGNd.float() @ self._rotation_dd.to(device)
        norm_BGN1 = z_BGNd.square().mean(-1, keepdim=True).sqrt().clamp(1e-4, 6e4).half()
        bounds = ((self._levels[1:] + self._levels[:-1]) / 2).to(device)
        codes = torch.bucketize(z_BGNd / norm_BGN1.float(), bounds)
        return {"codes": pack(codes.to(torch.uint8), self._bits), "norms": norm_BGN1}

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        codes = unpack(packed["codes"], self._bits, self._size)
        z_BGNd = self._levels.to(codes.device)[codes.int()] * packed["norms"].float()
        return (z_BGNd @ self._rotation_dd.T.to(codes.device)).to(dtype)


class PackedLayer(DynamicLayer):
    """Keys and values of one layer: the first tokens exact, then packed ones, then the newest exact."""

    def __init__(self, code: PairCode, recent: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._code, self._recent = code, recent
        self.packed: list[Packed] = []
        self.num_packed = self.batch = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values [B, G, T, d], those that were packed as they come back."""
        keys, values = super().update(key_states, value_states)
        step = self._recent
        pairs = [self._code.decode(block, SINK + number * step, keys.dtype) for number, block in enumerate(self.packed)]
        found = [
            torch.cat([exact[:, :, :SINK], *(pair[which] for pair in pairs), exact[:, :, SINK:]], dim=2)
            for which, exact in enumerate((keys, values))
        ]
        oldest = slice(SINK, SINK + step)
        while keys.shape[2] >= SINK + 2 * step:
            self.packed.append(self._code.encode(keys[:, :, oldest], values[:, :, oldest], SINK + self.num_packed))
            keys, values = (torch.cat([x[:, :, :SINK], x[:, :, SINK + step :]], dim=2) for x in (keys, values))
            self.num_packed += step
        self.keys, self.values = keys, values
        self.batch = len(keys)
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Tokens of each text."""
        return int(super().get_seq_length()) + self.num_packed

    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, by name."""
        exact = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return exact | {f"packed.{number}": tensor for number, tensor in enumerate(self.packed_tensors())}

    def packed_tensors(self) -> list[Tensor]:
        """What is stored of the packed tokens."""
        return [tensor for block in self.packed for tensor in block.values()]


def packed_caches(model: Any, bits: float, recent: int = RECENT) -> dict[str, Callable[[], Cache]]:
    """Makers of the caches of a model that have about so many bits per value, by name.

    bits: whole numbers are those of the integers alone, scales come on top; in a coded cache, all bits are counted
    recent: newest tokens that stay exact
    """
    config = model.config
    whole = int(bits) if bits == int(bits) else None
    if hasattr(model, "latent_cache"):
        kinds = [f"int{whole}"] if whole in GRID_BITS else []
        width = config.kv_lora_rank + config.qk_rope_head_dim
        if getattr(config, "latent_code", None) is not None and bits * width > GAIN_BITS:
            kinds.append(f"coded{bits:g}")
        return {kind: lambda kind=kind: model.latent_cache(kind, sink=SINK, recent=recent) for kind in kinds}  # type: ignore[misc]
    if whole not in GRID_BITS:
        return {}
    text_config = config.get_text_config(decoder=True)
    heads = text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads

    def by_channel() -> Cache:
        key, value = GridCode(recent, whole, by_channel=True), GridCode(size, whole, by_channel=False)
        return _of(lambda: PackedLayer(Apart(key, value), recent))

    def rotated() -> Cache:
        code = RotatedCode(size, whole)
        return _of(lambda: PackedLayer(Apart(code, code), recent))

    def _of(layer: Callable[[], PackedLayer]) -> Cache:
        return Cache(layers=[layer() for _ in range(text_config.num_hidden_layers)])

    return {f"KIVI {whole} bits": by_channel, f"rotated {whole} bits": rotated}


def why_no_cache(model: Any) -> str:
    """Why `packed_caches` has none of some number of bits."""
    integers = f"integers have {', '.join(map(str, GRID_BITS))} bits"
    if not hasattr(model, "latent_cache"):
        return f"{integers}; --coded-source measures numbers between"
    if getattr(model.config, "latent_code", None) is None:
        return f"{integers}; `transmla quantise` prepares a folder for numbers between"
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    return f"of {width} values, a coded cache has more than {GAIN_BITS / width:g} and at most 8 bits per value"


def packed_bytes_per_token(cache: Any) -> float:
    """Bytes of the packed tensors of a cache over the tokens in them, all layers together; NaN if none is packed."""
    found = 0.0
    for layer in cache.layers:
        if not layer.num_packed:
            return math.nan
        if isinstance(layer, PackedLayer):
            tensors, batch = layer.packed_tensors(), layer.batch
        else:
            stored = layer.tensors()
            tensors, batch = [stored[name] for name in layer.packed], len(layer.exact)
        found += sum(tensor.nbytes for tensor in tensors) / (batch * layer.num_packed)
    return found
