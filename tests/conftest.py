"""Lively models, built once per test session: tests that change a folder copy it first."""

import os
import socket
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

# several test processes share the cores: threads of each would wait for those of the others
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.families import MakeSource, lively_source

# TRANSMLA_TEST_NARROW=0: as on CPUs that do not multiply bfloat16; 1: as on those that do, if need be emulated
if (narrow := os.environ.get("TRANSMLA_TEST_NARROW")) is not None:
    torch.cpu._is_avx512_bf16_supported = lambda: narrow == "1"


@pytest.fixture(
    params=["pretended"]
    if "TRANSMLA_TEST_PRETENDED" in os.environ
    else [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device that there is. What a test compares with is computed in float64 on the CPU."""
    if request.param != "pretended":
        yield torch.device(request.param)
        return
    from tests.pretended import Pretended

    with Pretended():
        yield torch.device(request.param)


@pytest.fixture(scope="session")
def lively(tmp_path_factory: pytest.TempPathFactory) -> MakeSource:
    """lively(**settings) -> model folder; settings are those of `families.lively_source`."""
    made: dict[str, Path] = {}

    def make(**settings: Any) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = lively_source(tmp_path_factory.mktemp("source") / "model", **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 2,500 tokens of calibration text."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    excerpt = resources.files("transmla.data") / "wikitext2-train-excerpt.txt"
    path.write_text(excerpt.read_text("utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture
def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
