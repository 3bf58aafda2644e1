"""Fixtures: the folder is written once, models are loaded per test because tests change them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.folders import VOCAB, write_folder
from transmla.model.loading import load


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("converted") / "tiny")


@pytest.fixture
def ours(folder: Path) -> Callable[..., Any]:
    return lambda dtype=torch.float32, **kwargs: load(folder, dtype=dtype, **kwargs)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
