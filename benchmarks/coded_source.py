"""The source's own cache, transform coded as KVTC does (2511.01815): what is left of a conversion's lead.

    python benchmarks/coded_source.py smollm2 --into source.json --bits 3,2,1.5,1

Keys of all heads without their rotation and values of all heads are one vector per token and layer. Its basis and the
bits of its coordinates are chosen as `transmla quantise` chooses those of a latent: Fisher metric, principal
components, bits by importance over all layers, one norm per token, levels fitted to the values. First and newest tokens
are exact. Rows are added to the source of a result file, measured on its windows. KVTC itself packs whole prompts for
storage, with an entropy coder behind; this is a cache to decode from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import rotate_half

from transmla.devices import narrow_dtype
from transmla.evaluation.measure import windows_of
from transmla.evaluation.perplexity import perplexity
from transmla.evaluation.quantised_cache import RECENT, SINK
from transmla.model.loading import load_any, load_tokenizer
from transmla.model.modeling_transmla import TransformCode, dealt_bits
from transmla.targets.quantise import MIX, Seen, code_bases, code_levels
from transmla.text.windows import calibration_tokens

WINDOW = 512


class Rotation:
    """Turns keys [B, G, T, d] by the angles of their positions, and back."""

    def __init__(self, model: Any, length: int) -> None:
        positions = torch.arange(length)[None]
        self._cos, self._sin = (x[0] for x in model.model.rotary_emb(torch.zeros(1), positions))

    def __call__(self, key: Tensor, start: int, sign: int = 1) -> Tensor:
        at = slice(start, start + key.shape[2])
        return key * self._cos[at] + sign * rotate_half(key) * self._sin[at]


def together(key: Tensor, value: Tensor, rotation: Rotation, start: int) -> Tensor:
    """[B, T, 2 G d]: keys without rotation, and values."""
    plain = rotation(key.float(), start, -1)
    return torch.cat([plain, value.float()], dim=1).transpose(1, 2).flatten(2)


class CodedLayer(DynamicLayer):
    """The first tokens exact, then coded ones, then the newest exact."""

    def __init__(self, code: TransformCode, map_rr: Tensor, inverse_rr: Tensor, rotation: Rotation) -> None:
        super().__init__()
        self._code, self._map, self._inverse, self._rotation = code, map_rr.float(), inverse_rr.float(), rotation
        self.blocks: list[dict[str, Tensor]] = []
        self.num_packed = 0

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key, value)
        coded = [self._unpacked(block, SINK + number * RECENT, keys) for number, block in enumerate(self.blocks)]
        found = [
            torch.cat([exact[:, :, :SINK], *(block[which] for block in coded), exact[:, :, SINK:]], dim=2)
            for which, exact in enumerate((keys, values))
        ]
        while keys.shape[2] >= SINK + 2 * RECENT:
            oldest = slice(SINK, SINK + RECENT)
            x = together(keys[:, :, oldest], values[:, :, oldest], self._rotation, SINK + self.num_packed)
            self.blocks.append(self._code.encode(x @ self._map.T))
            keys, values = (torch.cat([x[:, :, :SINK], x[:, :, SINK + RECENT :]], dim=2) for x in (keys, values))
            self.num_packed += RECENT
        self.keys, self.values = keys, values
        return found[0], found[1]

    def _unpacked(self, block: dict[str, Tensor], start: int, like: Tensor) -> tuple[Tensor, Tensor]:
        x = self._code.decode(block, torch.float32) @ self._inverse.T
        key, value = x.unflatten(-1, (2 * like.shape[1], -1)).transpose(1, 2).chunk(2, dim=1)
        return self._rotation(key, start).to(like.dtype), value.to(like.dtype)

    def get_seq_length(self) -> int:
        return int(super().get_seq_length()) + self.num_packed


class WatchedLayer(DynamicLayer):
    """Keeps the keys and values of one call, and their gradients."""

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen = (key, value)
        key.retain_grad()
        value.retain_grad()
        return key, value


def observed(model: Any, ids_NT: Tensor, rotation: Rotation) -> list[Seen]:
    """As `transmla.targets.quantise` does for a latent."""
    count = model.config.num_hidden_layers
    width = 2 * model.config.num_key_value_heads * model.config.head_dim
    seen = [Seen.of(width, torch.device("cpu")) for _ in range(count)]
    for weight in model.parameters():
        weight.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    for number, ids_T in enumerate(ids_NT):
        cache = Cache(layers=[WatchedLayer() for _ in range(count)])
        logits = model(ids_T[None], past_key_values=cache).logits[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        model.get_input_embeddings().weight.grad = None
        for layer, watched in zip(seen, cache.layers, strict=True):
            key, value = watched.seen
            layer.add(
                together(key.detach(), value.detach(), rotation, 0)[0], together(key.grad, value.grad, rotation, 0)[0]
            )
        print(f"measured {number + 1} of {len(ids_NT)} windows", flush=True)
    for layer in seen:
        layer.finish()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--into", type=Path, required=True, help="result file of `transmla eval --json`")
    parser.add_argument("--bits", default="3,2,1.5,1")
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    result = json.loads(arguments.into.read_text())
    (text, measured), *_ = result["source"]["texts"].items()
    tokenizer = load_tokenizer(arguments.source)
    model = load_any(arguments.source, dtype=narrow_dtype(torch.device("cpu")) or torch.float32)
    rotation = Rotation(model, measured["length"])
    seen = observed(model, calibration_tokens(MIX, tokenizer, arguments.tokens, WINDOW).ids_NT, rotation)
    maps, codes, _ = code_bases(seen, len(seen[0].sum_k), "coded", 0)
    levels, distortion = code_levels(seen, maps, codes)
    by_bits = {bits: values.tolist() for bits, values in enumerate(levels) if bits}
    importance = [code["importance"].tolist() for code in codes]
    model = load_any(arguments.source, dtype=torch.bfloat16)
    ids_NT = windows_of(text, tokenizer, measured["length"], len(measured["nats"]), result["made"].get("begin", []))
    for average in map(float, arguments.bits.split(",")):
        dealt = dealt_bits(importance, distortion, average)
        made: list[Cache] = []

        def cache(dealt: list[list[int]] = dealt, made: list[Cache] = made) -> Cache:
            layers = [
                CodedLayer(
                    TransformCode(code["mean"].tolist(), code["deviation"].tolist(), bits, by_bits), *pair, rotation
                )
                for code, bits, pair in zip(codes, dealt, maps, strict=True)
            ]
            made[:] = [Cache(layers=layers)]
            return made[0]

        found = perplexity(model, ids_NT, cache=cache, chunk=RECENT)
        stored = sum(
            tensor.nbytes / (len(layer.keys) * layer.num_packed)
            for layer in made[0].layers
            for block in layer.blocks
            for tensor in block.values()
        )
        row = {"bits": average, "cache": f"KVTC-like {average:g} bits", "bytes_per_token": stored, "nats": found.nats_N}
        kept = [old for old in result["source"]["quantised"] if old is None or old.get("cache") != row["cache"]]
        result["source"]["quantised"] = [*kept, row]
        arguments.into.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{row['cache']}: {stored:,.0f} bytes per token, perplexity {found.value:.3f}", flush=True)


if __name__ == "__main__":
    main()
