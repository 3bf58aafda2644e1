"""What a conversion holds in memory, and what it puts on disk instead."""

import errno
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conversion.made import QUICK, Convert, digest, weights
from tests.families import THETA, MakeSource
from transmla.checkpoint.read import Source
from transmla.conversion import flow
from transmla.conversion import run as run_module
from transmla.errors import DestinationError
from transmla.model import source as source_module
from transmla.processes import Processes


class LiveBytes:
    """Bytes of the tensors that `Source.read` has delivered and that are still in memory, and their peaks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = {"layer": 0, "other": 0}
        self.peak = dict(self.now)
        read = Source.read

        def counted(source: Source, name: str, **kwargs: Any) -> torch.Tensor:
            # a tensor's memory dies with the array that lends it, whoever made views of it
            tensor = read(source, name, **kwargs)
            array = tensor.view(torch.uint8).numpy().copy()
            kind = "layer" if ".layers." in name else "other"
            self._add(kind, array.nbytes)
            weakref.finalize(array, self._add, kind, -array.nbytes)
            return torch.from_numpy(array).view(tensor.dtype)

        monkeypatch.setattr(Source, "read", counted)

    def _add(self, kind: str, num_bytes: int) -> None:
        self.now[kind] += num_bytes
        self.peak[kind] = max(self.peak[kind], self.now[kind])


def layer_bytes(folder: Path) -> int:
    return sum(value.nbytes for name, value in weights(folder).items() if name.startswith("model.layers.0."))


def test_one_layer_in_memory(lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight layers never two at once, and of the other tensors never two: peaks by reference counts."""
    source = lively(layers=8)
    live = LiveBytes(monkeypatch)
    report = run(source)
    largest = max(layer_bytes(source), layer_bytes(report.destination))
    embedding = weights(source)["model.embed_tokens.weight"].nbytes
    assert 0 < live.peak["layer"] <= largest
    assert 0 < live.peak["other"] <= embedding + 48 * 4
    assert live.now == {"layer": 0, "other": 0}


def test_holding_on_to_layers_would_show(lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lively(layers=8)
    live, kept, build = LiveBytes(monkeypatch), [], source_module.build_layer

    def keep(*args: Any) -> Any:
        kept.append(build(*args))
        return kept[-1]

    monkeypatch.setattr(source_module, "build_layer", keep)
    run(source, theta=THETA)
    assert live.peak["layer"] >= 8 * layer_bytes(source)


def test_blocks_bound_the_memory(lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight layers never more than a block of two."""
    alive, peaks, made = [0], [0], source_module.SourceLayer.narrowed

    def counted(layer: Any, dtype: Any) -> Any:
        layer = made(layer, dtype)
        alive[0] += 1
        peaks[-1] = max(peaks[-1], alive[0])
        weakref.finalize(layer, lambda: alive.__setitem__(0, alive[0] - 1))
        return layer

    monkeypatch.setattr(source_module.SourceLayer, "narrowed", counted)
    run(lively(layers=8), refine="fast", refinement=QUICK, block_layers=2)
    peaks.append(0)
    run(lively(layers=8), "whole", refine="fast", refinement=QUICK)
    assert peaks == [2, 8] and alive == [0]


def test_activations_in_a_file_or_in_memory_give_the_same_bytes(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    inside = run(lively(), "inside", **settings).destination
    places, allocate = [], run_module.allocate

    def seen(shape: tuple[int, ...], kept_in: Any) -> torch.Tensor:
        places.append(kept_in)
        return allocate(shape, kept_in)

    monkeypatch.setattr(run_module, "allocate", seen)
    outside = run(lively(), "outside", offload=0, **settings).destination
    assert digest(inside) == digest(outside)
    assert places and all(isinstance(place, Path) and place.name == "outside.partial" for place in places)


@pytest.mark.parametrize(
    ("device", "offload", "processes", "free", "kept_in"),
    # a gibibyte of activations; free: GiB on the GPU and in memory
    [
        ("cpu", None, 1, (0, 2.0), "cpu"),
        ("cpu", None, 1, (0, 1.9), "out.partial"),
        ("cpu", None, 2, (0, 1.9), "cpu"),
        ("cpu", 1.0, 1, (0, 0.1), "cpu"),
        ("cpu", 0.9, 1, (0, 9.0), "out.partial"),
        ("cuda", None, 1, (4.1, 0.1), "cuda"),
        ("cuda", None, 1, (4.0, 2.0), "cpu"),
        ("cuda", 1.0, 1, (9.0, 9.0), "cpu"),
    ],
)
def test_where_activations_are_kept(
    device: str, offload: float | None, processes: int, free: tuple[float, float], kept_in: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On a GPU of which they take less than a quarter, else in half of the free memory, else in a file."""
    monkeypatch.setattr(flow, "free_bytes", lambda device: int(2**30 * free[device.type == "cpu"]))
    sizes = SimpleNamespace(hidden_size=100, num_attention_heads=2, v_head_dim=28)
    planned: Any = SimpleNamespace(mla=sizes)
    text: Any = SimpleNamespace(ids_NT=torch.empty(1024, 1024, device="meta"))
    found = flow._activations(planned, text, Processes(0, processes), Path("out"), torch.device(device), offload)
    assert (found.name if isinstance(found, Path) else found.type) == kept_in


def test_a_disk_too_small_for_the_activations(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DestinationError, match="the disk is full"):
        run(lively(), offload=0, theta=THETA)
    assert not list(tmp_path.rglob("activations-*")) and not (tmp_path / "out").exists()
    assert run(lively(), theta=THETA).destination.is_dir(), "memory is enough"
