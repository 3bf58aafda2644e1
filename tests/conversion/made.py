"""Conversions of lively models, and what they are compared by."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.families import THETA
from transmla.conversion.flow import ConversionReport
from transmla.conversion.levels import Descent, Refinement
from transmla.errors import TransmlaError
from transmla.maths.closed_form import ClosedForm

# no repair: ridges that hold everything where it is
PLAIN = ClosedForm(stream_ridge=1e12, output_ridge=1e12)
# a few steps of everything
QUICK = Refinement(Descent(2.0, 2, 1e-2))
# of a source with one key/value head of 12: nothing is lost at these
EXACT: dict[str, Any] = {"latent": 12, "rope": 12, "theta": THETA, "method": PLAIN}
IDS = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))
Convert = Callable[..., ConversionReport]


def logits(folder: Path) -> torch.Tensor:
    """Of the stock class, float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    assert type(model).__module__.startswith("transformers.models.")
    with torch.no_grad():
        output: torch.Tensor = model(IDS).logits
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def check(error: TransmlaError, where: str, words: tuple[str, ...]) -> None:
    assert all((error.what, error.where, error.why, error.remedy))
    assert where in error.where, error.where
    assert all(word in str(error) for word in words), str(error)
