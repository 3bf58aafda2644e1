"""A decoding step over a latent cache as one Triton kernel that reads every latent once, and a second one that joins
what its programs found: a candidate beside the ways that `modeling_transmla` knows, for the stage `kernels` to time.

The cache is dealt to programs, each of which goes over its tokens with all heads of a block at once, scores and values
from the same tile, by an online softmax (Flash-Decoding; FlashMLA does the same by hand).

TRITON_INTERPRET=1 runs it on a CPU, where it agrees with the products to the rounding of float32; it has not been on a
GPU yet.

Legend: B texts, H heads, S cached tokens, k = r + e latent and rotary values, P parts of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# programs that keep a GPU busy, for each of its multiprocessors
PER_PROCESSOR = 2


@triton.jit
def _attend(
    query, key, partial, weight,
    scale, num_heads, num_tokens, per_part, num_parts,
    query_b, query_h, key_b, key_s,
    RANK: tl.constexpr, ROPE: tl.constexpr, RANK_2: tl.constexpr, ROPE_2: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One block of heads of one text over one part of its cache: latents weighted by the softmax, and the logarithm of
    the sum of the exponentials."""
    text, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads_H, tokens_N = block * HEADS + tl.arange(0, HEADS), tl.arange(0, TOKENS)
    ranks_r, ropes_e = tl.arange(0, RANK_2), tl.arange(0, ROPE_2)
    is_head, is_rank, is_rope = heads_H < num_heads, ranks_r < RANK, ropes_e < ROPE
    rows = query + text.to(tl.int64) * query_b + heads_H[:, None] * query_h
    latent_Hr = tl.load(rows + ranks_r[None, :], mask=is_head[:, None] & is_rank[None, :], other=0.0)
    rotary_He = tl.load(rows + RANK + ropes_e[None, :], mask=is_head[:, None] & is_rope[None, :], other=0.0)
    top_H = tl.full([HEADS], -float("inf"), tl.float32)
    total_H = tl.zeros([HEADS], tl.float32)
    sum_Hr = tl.zeros([HEADS, RANK_2], tl.float32)
    first = part * per_part
    last = tl.minimum(first + per_part, num_tokens)
    for start in range(first, last, TOKENS):
        places_N = start + tokens_N
        is_token = places_N < last
        cells = key + text.to(tl.int64) * key_b + places_N[:, None].to(tl.int64) * key_s
        key_Nr = tl.load(cells + ranks_r[None, :], mask=is_token[:, None] & is_rank[None, :], other=0.0)
        key_Ne = tl.load(cells + RANK + ropes_e[None, :], mask=is_token[:, None] & is_rope[None, :], other=0.0)
        score_HN = tl.dot(latent_Hr, tl.trans(key_Nr)) + tl.dot(rotary_He, tl.trans(key_Ne))
        score_HN = tl.where(is_token[None, :], score_HN * scale, -float("inf"))
        new_H = tl.maximum(top_H, tl.max(score_HN, 1))
        share_HN = tl.exp(score_HN - new_H[:, None])
        before_H = tl.exp(top_H - new_H)
        total_H = total_H * before_H + tl.sum(share_HN, 1)
        sum_Hr = sum_Hr * before_H[:, None] + tl.dot(share_HN.to(key_Nr.dtype), key_Nr)
        top_H = new_H
    cell_H = (text.to(tl.int64) * num_parts + part) * num_heads + heads_H
    tl.store(weight + cell_H, top_H + tl.log(total_H), mask=is_head)
    out = partial + cell_H[:, None] * RANK + ranks_r[None, :]
    tl.store(out, sum_Hr / total_H[:, None], mask=is_head[:, None] & is_rank[None, :])


@triton.jit
def _join(
    partial, weight, joined, num_heads, num_parts,
    RANK: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of one head of one text, weighted by their sums of exponentials: some values of the latent."""
    text, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts_P, ranks_r = tl.arange(0, PARTS), tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    is_rank = ranks_r < RANK
    top = -float("inf")
    for first in range(0, num_parts, PARTS):
        cells_P = (text * num_parts + first + parts_P) * num_heads + head
        weight_P = tl.load(weight + cells_P, mask=first + parts_P < num_parts, other=-float("inf"))
        top = tl.maximum(top, tl.max(weight_P, 0))
    total_P = tl.zeros([PARTS], tl.float32)
    sum_r = tl.zeros([RANKS], tl.float32)
    for first in range(0, num_parts, PARTS):
        cells_P = (text * num_parts + first + parts_P) * num_heads + head
        is_part = first + parts_P < num_parts
        share_P = tl.exp(tl.load(weight + cells_P, mask=is_part, other=-float("inf")) - top)
        part_Pr = tl.load(
            partial + cells_P[:, None] * RANK + ranks_r[None, :], mask=is_part[:, None] & is_rank[None, :], other=0.0
        )
        total_P += share_P
        sum_r += tl.sum(part_Pr * share_P[:, None], 0)
    found_r = sum_r / tl.sum(total_P, 0)
    tl.store(joined + (text * num_heads + head) * RANK + ranks_r, found_r.to(joined.dtype.element_ty), mask=is_rank)


def split_decode(query_BHk: torch.Tensor, key_BSk: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """Attended latents [B, H, r] of one query per head, in the dtype of the cache; float32 inside."""
    batch, heads, width = query_BHk.shape
    tokens, device = key_BSk.shape[1], key_BSk.device
    block = 32 if heads > 16 else 16
    tile = 32 if rank > 256 else 64
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    programs = batch * triton.cdiv(heads, block)
    parts = max(1, min(triton.cdiv(PER_PROCESSOR * processors, programs), triton.cdiv(tokens, 4 * tile)))
    per_part = triton.cdiv(triton.cdiv(tokens, parts), tile) * tile
    parts = triton.cdiv(tokens, per_part)
    partial = torch.empty(batch, parts, heads, rank, dtype=torch.float32, device=device)
    weight = torch.empty(batch, parts, heads, dtype=torch.float32, device=device)
    joined = torch.empty(batch, heads, rank, dtype=key_BSk.dtype, device=device)
    rope, rank_2 = width - rank, triton.next_power_of_2(rank)
    _attend[(batch, parts, triton.cdiv(heads, block))](
        query_BHk, key_BSk, partial, weight, scale, heads, tokens, per_part, parts,
        query_BHk.stride(0), query_BHk.stride(1), key_BSk.stride(0), key_BSk.stride(1),
        RANK=rank, ROPE=rope, RANK_2=rank_2, ROPE_2=max(16, triton.next_power_of_2(rope)), HEADS=block, TOKENS=tile,
        num_warps=8 if block * rank_2 >= 16384 else 4, num_stages=2,
    )  # fmt: skip
    # few values and parts at once stay in registers, whatever the number of parts
    ranks = min(128, rank_2)
    _join[(batch, heads, triton.cdiv(rank, ranks))](
        partial, weight, joined, heads, parts, RANK=rank, RANKS=ranks, PARTS=16
    )
    return joined
