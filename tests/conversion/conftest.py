"""The conversion of a lively model, as short as it gets."""

from pathlib import Path
from typing import Any

import pytest

from tests.conversion.made import Convert
from transmla.conversion.flow import ConversionReport, convert


@pytest.fixture
def run(tmp_path: Path, text_file: Path) -> Convert:
    """Convert to tmp_path/out, or another name, on eight windows of 64 tokens."""

    def converted(source: Path, name: str = "out", **settings: Any) -> ConversionReport:
        settings = {"calibration": str(text_file), "tokens": 512, "window": 64, "refine": "off"} | settings
        return convert(str(source), tmp_path / name, **settings)

    return converted
