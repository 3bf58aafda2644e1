"""The source's own cache, transform coded as KVTC does (2511.01815): the strongest rival of a coded latent.

Keys of all heads without their rotation, and values of all heads, are one vector per token and layer. Its basis and the
bits of its coordinates are chosen as `transmla quantise` chooses those of a latent: Fisher metric, principal
components, bits by importance over all layers, two gains per token, levels fitted to the values. First and newest
tokens are exact. KVTC itself packs whole prompts for storage, with an entropy coder behind; this is a cache to decode
from.

Legend: N windows or tokens that are packed at once, T tokens, G key/value heads, d values per head, P = d / 2,
k = 2 G d values that are cached of a token and layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from transmla.checkpoint.read import Source
from transmla.evaluation.quantised_cache import RECENT, Packed, PackedLayer
from transmla.families import family_of, rotary_dim
from transmla.geometry import gqa_geometry
from transmla.maths.attention import rotate
from transmla.maths.coding import Seen, code_bases, code_levels
from transmla.model.layer import half_split_order
from transmla.model.modeling_transmla import TransformCode, transform_codes
from transmla.model.skeleton import complete_config, source_config, source_frequencies
from transmla.progress import Progress, silent


@dataclass(frozen=True)
class Rotation:
    """What rotary embeddings do to the keys of one layer.

    inv_freq_P: radians per position, 0 for pairs that stand;  order_d: places of the values of a head, so that the
    halves of rotary pairs are d / 2 apart
    """

    inv_freq_P: Tensor
    order_d: Tensor

    def turned(self, key_GTd: Tensor, start: int, sign: int = 1) -> Tensor:
        """Keys [..., T, d] by the angles of their positions, of which the first is `start`; sign -1: back."""
        positions_T = sign * torch.arange(start, start + key_GTd.shape[-2], device=key_GTd.device)
        turned = rotate(key_GTd[..., self.order_d], self.inv_freq_P, positions_T)
        return turned[..., self.order_d.argsort()]


def rotations(source: Source, device: torch.device) -> list[Rotation]:
    """Of every layer; raises `UnsupportedError` for families without a row."""
    family = family_of(source.config, source.config_where)
    values = complete_config(source.config)
    geometry = gqa_geometry(values, source.config_where)
    order_d = half_split_order(geometry.head_dim, rotary_dim(values, geometry.head_dim), family.rotary).to(device)
    config = source_config(source.config)
    found = []
    for index in range(geometry.num_hidden_layers):
        inv_freq_P, _ = source_frequencies(config, geometry, family, index, source.rope_frequency_factors)
        found.append(Rotation(inv_freq_P.to(device), order_d))
    return found


class CodedSource:
    """What caches of a source with any number of bits have to know, measured on text.

    model: the source as transformers loads it, in evaluation mode;  source: its checkpoint
    ids_NT: calibration windows, of which whole ones are passed forward and back
    seed:  of the predictions whose gradients say what an error costs
    progress: called as progress(stage, done, total, remark)

    Raises `UnsupportedError` for a family that there is no row for.
    """

    def __init__(
        self, model: Any, source: Source, ids_NT: Tensor, *, seed: int = 0, progress: Progress | None = None
    ) -> None:
        self._rotations = rotations(source, model.device)
        seen = _observe(model, self._rotations, ids_NT, seed, progress or silent)
        maps, codes, _ = code_bases(seen, len(seen[0].sum_k), "coded", seed)
        levels, distortion = code_levels(seen, maps, codes)
        self._prepared = {
            "layers": [{name: values.tolist() for name, values in code.items()} for code in codes],
            "levels": [values.tolist() for values in levels],
            "distortion": distortion,
        }
        self._maps = [(there.float().to(model.device), back.float().to(model.device)) for there, back in maps]

    def cache(self, bits: float, recent: int = RECENT) -> Cache:
        """An empty cache of so many bits per value, all that is stored of a token counted.

        recent: newest tokens that stay exact
        """
        codes = transform_codes(self._prepared, bits)
        layers: list[Any] = [
            PackedLayer(_TogetherCode(code, *pair, rotation), recent)
            for code, pair, rotation in zip(codes, self._maps, self._rotations, strict=True)
        ]
        return Cache(layers=layers)


class _TogetherCode:
    """Keys and values of one layer as one coded vector [B, N, k] per token."""

    def __init__(self, code: TransformCode, map_kk: Tensor, inverse_kk: Tensor, rotation: Rotation) -> None:
        self._code, self._map_kk, self._inverse_kk, self._rotation = code, map_kk, inverse_kk, rotation

    def encode(self, key_BGNd: Tensor, value_BGNd: Tensor, start: int) -> Packed:
        return self._code.encode(_together(key_BGNd, value_BGNd, self._rotation, start) @ self._map_kk.T)

    def decode(self, packed: Packed, start: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x_BNk = self._code.decode(packed, torch.float32) @ self._inverse_kk.T
        x_BNHd = x_BNk.unflatten(-1, (-1, len(self._rotation.order_d)))
        key_BGNd, value_BGNd = x_BNHd.transpose(1, 2).chunk(2, dim=1)
        return self._rotation.turned(key_BGNd, start).to(dtype), value_BGNd.to(dtype)


def _together(key_BGNd: Tensor, value_BGNd: Tensor, rotation: Rotation, start: int) -> Tensor:
    """float32 [B, N, k]: keys without their rotation, and values."""
    plain_BGNd = rotation.turned(key_BGNd.float(), start, -1)
    return torch.cat([plain_BGNd, value_BGNd.float()], dim=1).transpose(1, 2).flatten(2)


class _WatchedLayer(DynamicLayer):
    """Keeps the keys and values of one call, and their gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen = (key_states, value_states)
        key_states.retain_grad()
        value_states.retain_grad()
        return key_states, value_states


def _observe(model: Any, rotations: list[Rotation], ids_NT: Tensor, seed: int, progress: Progress) -> list[Seen]:
    """Moments of what each layer caches, and of the gradients of the model's own predictions with respect to it: their
    second moment is the Fisher information, half of which is what a small error costs in divergence."""
    wanted = {name: weight.requires_grad for name, weight in model.named_parameters()}
    model.requires_grad_(False)
    model.enable_input_require_grads()
    generator = torch.Generator().manual_seed(seed)
    seen: list[Seen] = []
    try:
        for number, ids_T in enumerate(ids_NT):
            watched: list[Any] = [_WatchedLayer() for _ in rotations]
            with torch.enable_grad():
                logits_TV = model(ids_T[None].to(model.device), past_key_values=Cache(layers=watched)).logits[0].float()
                drawn_T1 = torch.multinomial(logits_TV.detach().softmax(-1).cpu(), 1, generator=generator)
                torch.nn.functional.cross_entropy(
                    logits_TV, drawn_T1[:, 0].to(model.device), reduction="sum"
                ).backward()
            if not seen:
                widths = (sum(x[0].numel() // x.shape[2] for x in one.seen) for one in watched)
                seen = [Seen.of(width, model.device) for width in widths]
            for layer, one, rotation in zip(seen, watched, rotations, strict=True):
                key, value = one.seen
                layer.add(
                    _together(key.detach(), value.detach(), rotation, 0)[0],
                    _together(key.grad, value.grad, rotation, 0)[0],
                )
            progress("measure the source's cache", number + 1, len(ids_NT), "")
    finally:
        model.disable_input_require_grads()
        for name, weight in model.named_parameters():
            weight.requires_grad_(wanted[name])
    for layer in seen:
        layer.finish()
    return seen
