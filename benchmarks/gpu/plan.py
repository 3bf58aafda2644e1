"""The stages of the campaign, in order of what a second of them is worth, and how the time is dealt out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# seconds that the campaign keeps for writing its last results
RESERVE = 5.0


@dataclass(frozen=True)
class Stage:
    """What is run in a process of its own.

    title:    for tables
    estimate: seconds on an H100;  limit: seconds after which it is ended
    least:    seconds below which starting it is of no use
    source:   whether it needs SmolLM2 (with --tiny the model that ships takes its place)
    after:    stage whose result it uses
    """

    name: str
    title: str
    estimate: float
    limit: float
    least: float
    source: bool = False
    after: str | None = None


STAGES = (
    Stage("environment", "versions, rates of the machine", 12, 60, 5),
    Stage("tests", "tests with a `cuda` variant", 60, 150, 30),
    Stage("own-form", "own form: logits and generation against the CPU", 30, 60, 20),
    Stage("heal-rate", "steps of healing, SmolLM2's shape: ways to run them, and where the time goes", 70, 130, 30),
    Stage("convert-8b", "converting 2 layers of the 8B shape", 60, 130, 40),
    Stage("speed-8b", "decoding and prefill, 4 layers of the 8B shape", 60, 90, 30),
    Stage("kernels", "attention alone: decoding and prefill", 35, 70, 20),
    Stage("convert-96-32", "SmolLM2 at 96 + 32", 65, 300, 50, source=True),
    Stage("speed", "decoding and prefill, SmolLM2", 50, 90, 25, source=True, after="convert-96-32"),
    Stage("heal", "healing as long as there is time", 300, 360, 120, source=True, after="convert-96-32"),
    Stage("graphs", "static cache, CUDA graph, torch.compile", 90, 150, 40),
    Stage("convert-160-32", "SmolLM2 at 160 + 32", 65, 300, 50, source=True),
)
BY_NAME = {stage.name: stage for stage in STAGES}


def refusal(stage: Stage, left: float, source: bool, done: set[str]) -> str | None:
    """Why a stage is not started now, or None."""
    if stage.source and not source:
        return "the source model is not there (--source)"
    if stage.after is not None and stage.after not in done:
        return f"it needs the result of {stage.after}"
    if left - RESERVE < stage.least:
        return f"{max(0.0, left):.0f} s are left, and it needs {stage.least:.0f}"
    return None


def allowed(stage: Stage, left: float) -> float:
    """Seconds that a stage may take."""
    return min(stage.limit, left - RESERVE)


def healing_tokens(seconds: float, rate: float, packing: float = 3.2e-6, fixed: float = 45.0) -> int:
    """Tokens that healing can pack and train on in so many seconds.

    rate: tokens trained on per second;  packing: seconds to tokenise and pack one;  fixed: seconds for loading,
    evaluations and writing, with a margin
    """
    return max(2**17, int((seconds - fixed) / (1.1 / rate + packing)))


def cache_bytes(config: Any, batch: int, context: int, itemsize: int = 2) -> int:
    """Bytes of a model's cache: of latents where its config has them."""
    if getattr(config, "kv_lora_rank", None):
        values = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values = 2 * config.num_key_value_heads * head_dim
    return int(config.num_hidden_layers * values * batch * context * itemsize)


def expanded_bytes(config: Any, batch: int, context: int, itemsize: int = 2) -> int:
    """Bytes that the stock class takes for one layer: the latent expanded to all heads, keys and values beside it."""
    width = 2 * (config.qk_nope_head_dim + config.v_head_dim) + config.qk_rope_head_dim
    return int(batch * context * config.num_attention_heads * width * itemsize)


def extrapolated(spent: dict[str, float], layers: int, wanted: int) -> dict[str, float]:
    """Seconds of a conversion of `wanted` layers, of what `layers` of them took: what is done once stays, what is done
    for each layer grows. The refinement's share of the head is counted as if it grew, too."""
    grows = ("convert layers", "distil", "measure", "write", "hash source", "verify")
    factor = wanted / layers
    return {name: seconds * (factor if name in grows else 1.0) for name, seconds in spent.items()}


def texts(data: Path | None) -> dict[str, str]:
    """Texts that are measured on, by name: those in `data`, else what ships with the program."""
    names = ("wikitext2-valid.raw", "c4-sample.txt", "tinystories-valid.txt", "stdlib-code.txt")
    found = {name: str(data / name) for name in names if data is not None and (data / name).is_file()}
    return found or {"wikitext-valid": "wikitext-valid", "tinystories-valid": "tinystories-valid"}
