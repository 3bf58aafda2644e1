"""Whether what was written computes what it was made from: logits against logits, before a folder gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.destination import disk_errors
from transmla.errors import VerificationError

# Relative error of logits that the dtype of the stored weights explains, with a wide margin: measured 1e-4 (float32),
# 2e-3 (float16) and 1e-2 (bfloat16), above 0.5 for any wrong layout.
TOLERANCES = {"float32": 5e-3, "float16": 5e-2, "bfloat16": 1e-1}
WITNESS_TOKENS = 128


def compare_logits(folder: Path, written_TV: Tensor, expected_TV: Tensor, stored: str) -> float:
    """Relative error of the logits of a written folder, root mean square over tokens.

    written_TV, expected_TV: of the same tokens, from `folder` and from what it was made from
    stored: dtype of the written weights, "float32", "bfloat16" or "float16"
    Raises `VerificationError` if it exceeds the tolerance of that dtype, or if either side predicts nothing: logits
    that are not finite, or the same for every token of the vocabulary.
    """
    written_TV, expected_TV = written_TV.double(), expected_TV.double()
    for logits_TV, whose in ((expected_TV, "what it was made from"), (written_TV, "the written folder")):
        if fault := fault_of(logits_TV):
            raise VerificationError(
                "the model predicts nothing",
                where=str(folder),
                why=f"the logits of {whose} are {fault}",
                remedy="nothing was kept; check the source with `transmla eval SRC`, or train with a lower --rate",
            )
    energy_T = expected_TV.square().sum(-1)
    error_T = (written_TV - expected_TV).square().sum(-1)
    # a token without any logits, at the start of a text and without an embedding, must have none on the other side
    error = float((error_T / energy_T.clamp_min(float(energy_T.max()) * 1e-12)).mean().sqrt())
    if not error <= TOLERANCES[stored]:
        raise VerificationError(
            "the written checkpoint does not compute what it was made from",
            where=str(folder),
            why=f"relative error of logits {error:.2e}, allowed {TOLERANCES[stored]:.0e} in {stored}",
            remedy="nothing was kept; try --dtype float32, and please report this with the source's config.json",
        )
    return error


def fault_of(logits_TV: Tensor) -> str:
    """What is wrong with logits that cannot be a prediction, in words; "" if nothing is."""
    if not bool(logits_TV.isfinite().all()):
        return "not finite"
    if not bool(logits_TV.any()):
        return "all zero"
    if logits_TV.shape[-1] > 1 and bool((logits_TV.amax(-1) == logits_TV.amin(-1)).all()):
        return "the same for every token of the vocabulary"
    return ""


def load_stock(folder: Path, device: str) -> Any:
    """The stock class of transformers with the weights of a folder that was just written, float32, in evaluation mode;
    `DestinationError` if it cannot be read back."""
    from transformers import DeepseekV3ForCausalLM

    with disk_errors(folder):
        loaded: Any = DeepseekV3ForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    return loaded.to(device).eval()
