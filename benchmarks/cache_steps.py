"""Processor time of a decoding step over each latent cache, in turns in one run, beside transformers' own cache.

    python benchmarks/cache_steps.py [--texts 1 --tokens 4096 --steps 24 --kinds exact,int8,int4] [--out FILE.json]

SmolLM2-135M's sizes at 96 + 32 with random weights and a small vocabulary, bfloat16, one thread. To compare two states
of the program, run each from its own checkout with PYTHONPATH and read the ratios to `exact`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, DynamicCache

from transmla.model.modeling_transmla import DeepseekV3ForCausalLM

VOCAB, CHUNK = 8192, 512


def random_model() -> Any:
    config = DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=9, q_lora_rank=None, kv_lora_rank=96, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, first_k_dense_replace=30, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
        max_position_embeddings=2**17,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = DeepseekV3ForCausalLM(config)
    return model.eval()


@torch.inference_mode()
def milliseconds(texts: int, tokens: int, steps: int, kinds: list[str]) -> dict[str, list[float]]:
    """Of processor time of each step over each cache."""
    model = random_model()
    ids = torch.randint(0, VOCAB, (texts, tokens))
    caches = {"dynamic": DynamicCache(config=model.config)} | {kind: model.latent_cache(kind) for kind in kinds}
    for cache in caches.values():
        for ids_BT in ids.split(CHUNK, dim=1):
            model.model(ids_BT, past_key_values=cache)
    found: dict[str, list[float]] = {kind: [] for kind in caches}
    for _ in range(steps):
        for kind, cache in caches.items():
            ids_B1 = torch.randint(0, VOCAB, (texts, 1))
            began = time.process_time()
            model(ids_B1, past_key_values=cache)
            found[kind].append(1e3 * (time.process_time() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--kinds", default="exact,int8,int4")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = milliseconds(args.texts, args.tokens, args.steps, args.kinds.split(","))
    medians = {kind: statistics.median(times) for kind, times in found.items()}
    for kind, times in found.items():
        ratio = medians[kind] / medians.get("exact", medians["dynamic"])
        print(f"{kind:10} {medians[kind]:7.1f} ms ({min(times):.1f}-{max(times):.1f}), {ratio:.2f}x")
    if args.out is not None:
        settings = {"texts": args.texts, "tokens": args.tokens, "steps": args.steps}
        args.out.write_text(
            json.dumps({"settings": settings, "milliseconds": found}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
