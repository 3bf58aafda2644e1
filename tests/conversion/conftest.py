"""The conversion of a lively model, as short as it gets, and arithmetic in which nothing rounds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion.made import Convert
from transmla.conversion.flow import ConversionReport, convert


@pytest.fixture
def run(tmp_path: Path, text_file: Path) -> Convert:
    """Convert to tmp_path/out, or another name, on eight windows of 64 tokens."""

    def converted(source: Path, name: str = "out", **settings: Any) -> ConversionReport:
        settings = {"calibration": str(text_file), "tokens": 512, "window": 64, "refine": "off"} | settings
        return convert(str(source), tmp_path / name, **settings)

    return converted


@pytest.fixture
def nothing_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and angles of transformers, which are float32 whatever the model is, in float64."""
    to = torch.Tensor.to

    def wide(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return to(tensor, *(torch.float64 if arg is torch.float32 else arg for arg in args), **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", wide)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
