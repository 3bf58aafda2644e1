"""The floor of a decoding step: its bytes and multiply-adds over what the machine moves and multiplies.

Both rates are measured, in the run that they are compared with (Williams et al., "Roofline", CACM 52/4).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

# sides of a square product, elements of a copied block
PRODUCT, BLOCK = 2048, 2**26
# seconds of a product after which no larger one is tried
ENOUGH = 0.02
# a GPU is done with those before it has well begun
GPU_PRODUCT, GPU_BLOCK = 8192, 2**29


@dataclass(frozen=True)
class Rates:
    """Of the machine, in the dtype that is computed in: multiply-adds and bytes per second."""

    multiply_adds: float
    bytes: float


def machine_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Best of a few square products, and of a few copies of a block that no cache holds."""
    rate = product_rate(device, dtype)
    values = BLOCK if device.type == "cpu" else GPU_BLOCK
    # both written before: the first touch of new memory costs more than the copy
    block, copied = (torch.zeros(values, dtype=dtype, device=device) for _ in range(2))
    copy = min(seconds(lambda: copied.copy_(block), device) for _ in range(5))
    return Rates(rate, 2 * values * block.element_size() / copy)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second of square products, best of five; of small ones where a CPU has to emulate the dtype and
    would take minutes for those that keep others busy."""
    most = PRODUCT if device.type == "cpu" else GPU_PRODUCT
    side = min(most, 256) if device.type == "cpu" else most
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        taken = min(seconds(partial(torch.matmul, a, b), device) for _ in range(5))
        if side >= most or taken > ENOUGH:
            return float(side**3 / taken)
        side *= 2


def step_cost(model: Any, batch: int, context: int, cached_bytes: float) -> tuple[float, float]:
    """(multiply-adds, bytes) of one decoding step: every weight but the embedding once, the whole cache once.

    Of experts, a text multiplies with those that its token is sent to, and all texts together read no more than theirs.
    Attention per head and cached token: GQA 2 d; MLA in latent space 2 r + e.
    """
    config = model.config
    embedding = model.get_input_embeddings().weight
    weights = [weight for weight in model.parameters() if weight is not embedding]
    if model.get_output_embeddings().weight is embedding:
        weights = [*weights, embedding]
    # matrices of several experts are one tensor
    chosen = getattr(config.get_text_config(decoder=True), "num_experts_per_tok", None)
    shares = [chosen / len(weight) if chosen and weight.dim() == 3 else 1.0 for weight in weights]
    count = sum(share * weight.numel() for share, weight in zip(shares, weights, strict=True))
    if getattr(config, "kv_lora_rank", None):
        per_head = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    else:
        per_head = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    attention = config.num_attention_heads * per_head * _attended(config, context)
    moved = sum(min(1.0, batch * share) * weight.nbytes for share, weight in zip(shares, weights, strict=True))
    return float(batch * (count + attention)), moved + cached_bytes


def _attended(config: Any, context: int) -> int:
    """Cached tokens that a new one attends to, in all layers together: those in the window of each."""
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    if not window:
        return int(config.num_hidden_layers) * context
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return sum(min(context, window) if kind == "sliding_attention" else context for kind in kinds)


def wait(device: torch.device) -> None:
    """Return when all work that was given to the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, until the device has finished."""
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started
