"""What a conversion needs, in bytes of disk and memory, from file headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transmla.checkpoint.read import Source
from transmla.checkpoint.shards import BUFFER_BYTES
from transmla.conversion.levels import LEVELS, TOKENS_ELSEWHERE, with_batch
from transmla.families import Family
from transmla.geometry import GqaGeometry, MlaGeometry
from transmla.recipe import Recipe
from transmla.train import bytes_of_logits

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Python, torch and transformers themselves
_RUNTIME_BYTES = 400 * 2**20
# activations of a window that are gone and that glibc keeps, as measured in a fit; larger ones are mapped
_KEPT_WINDOWS, _MAPPED_BYTES = 32, 2**25
# at most, of hidden x hidden in float64: six moments, and what a regression on other tokens needs beside them
_MOMENTS = 12
# that compute, where it is not known yet on what
_CORES = 8
# tokenizer, configs, provenance and modeling file, generously
COMPANION_BYTES = 32 * 2**20


def weight_bytes(source: Source, family: Family, gqa: GqaGeometry, mla: MlaGeometry, dtype: str) -> int:
    """What is written: all tensors of the source with other attention weights, and a head of its own."""
    values = 0
    for name, info in source.tensors.items():
        if f".{family.attention}." not in name:
            values += math.prod(info.shape)
    if f"{family.lm_head}.weight" not in source.tensors:
        values += math.prod(source.tensors[f"{family.embed_tokens}.weight"].shape)
    # the own form may keep the source's projections beside the latent's
    kept = gqa.cache_values() * gqa.hidden_size
    return (values + mla.num_hidden_layers * (mla.stock_attention_weights + kept)) * DTYPE_BYTES[dtype]


def layer_values(source: Source, family: Family) -> int:
    """Number of values in the largest layer, experts included."""
    sizes: dict[str, int] = {}
    prefix = f"{family.layers}."
    for name, info in source.tensors.items():
        if name.startswith(prefix):
            index = name.removeprefix(prefix).partition(".")[0]
            sizes[index] = sizes.get(index, 0) + math.prod(info.shape)
    return max(sizes.values())


def journal_bytes(mla: MlaGeometry, recipe: Recipe) -> int:
    """Disk that the journal of an unfinished conversion takes, float32.

    The fitted weights, and behind them either two states of the optimiser of three weights each (one is written before
    the other is deleted) or the refined weights; with `latent="auto"` also those of the best size so far.
    """
    copies, kept = (1, 1) if recipe.refine == "off" else (7, 2)
    if recipe.latent == "auto":
        copies += kept
    return copies * 4 * mla.num_hidden_layers * mla.attention_weights


def refined_bytes(
    config: Mapping[str, Any],
    mla: MlaGeometry,
    layer: int,
    tokens: int,
    window: int,
    compute: int,
    rounded: bool,
    logits: int,
) -> tuple[int, int]:
    """Bytes that the refinement takes for each layer of a block, and those for the head behind the last one.

    Per layer: attention weights as they were and as they are, gradients and two moments of Adam in float32, the weights
    that products keep for backward, the MLP in the dtype of the products, and what backward needs of each token: about
    12 hidden sizes, 4 inner sizes, and queries, keys, values twice; with rounded latents there are keys and values of
    both kinds, and a mask of them. The head: its weights, what goes in, and the logits.

    layer: values in a layer of the source;  tokens: that go through together;  compute: bytes of a value in products
    logits: bytes of them, from `bytes_of_logits`
    """
    hidden, inner = mla.hidden_size, int(config["intermediate_size"])
    width = mla.num_attention_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    kinds, masked = (2, 2 * window) if rounded else (1, 0)
    attended = width + kinds * (width + mla.expanded_values)
    per_token = (12 * hidden + masked) * 4 + (4 * inner + 2 * attended) * compute
    each = (5 * 4 + compute) * mla.attention_weights + layer * compute + tokens * per_token
    vocabulary = int(config["vocab_size"])
    return each, vocabulary * hidden * compute + 6 * tokens * hidden * 4 + logits


def memory_bytes(
    config: Mapping[str, Any],
    gqa: GqaGeometry,
    mla: MlaGeometry,
    recipe: Recipe,
    weight_bytes: int,
    layer: int,
    dtype: str,
) -> int:
    """Estimated peak of the conversion, in bytes.

    While layers are fitted: streams, head outputs, one layer and its attention once more as plain weights, moments and
    the regressions that are made of them, and the attention of one group. While the last one is refined, by itself:
    streams, that layer and the head in float32. While the result is measured and written: two layers, or the head in
    float32 and as it is stored.

    layer: values in the largest layer;  dtype: that is written, as a rule that of the source
    """
    hidden, window = gqa.hidden_size, recipe.window
    width = gqa.num_attention_heads * gqa.head_dim
    streams = (recipe.num_tokens + recipe.sampled) * (2 * hidden + width) * 4
    moments = _MOMENTS * hidden * hidden * 8
    plain = (width + 2 * gqa.num_key_value_heads * gqa.head_dim) * hidden
    attention = 6 * (gqa.num_attention_heads // gqa.num_key_value_heads) * window * window * 4
    head = int(config["vocab_size"]) * hidden * (4 + DTYPE_BYTES[dtype])
    activations = window * hidden * 4
    heap = _KEPT_WINDOWS * activations if activations < _MAPPED_BYTES else 0
    fitting = heap + streams + max(4 * (layer + plain) + moments + attention, head)
    writing = min(BUFFER_BYTES, weight_bytes) + max(8 * layer, head)
    refining = 0
    descent = with_batch(LEVELS[recipe.refine], recipe.batch).distil
    if descent is not None:
        rounded, tokens = recipe.latent_bits is not None, descent.tokens_at_once(window, TOKENS_ELSEWHERE)
        refining = (recipe.num_tokens + recipe.sampled) * 2 * hidden * 4
        logits = bytes_of_logits("cpu", int(config["vocab_size"]), 4, _CORES)
        refining += sum(refined_bytes(config, mla, layer, tokens, window, 4, rounded, logits))
    return _RUNTIME_BYTES + max(fitting, refining, writing)
