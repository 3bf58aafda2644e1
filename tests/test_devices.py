"""Devices that are not there, and what memory this process may count on."""

import os
import platform
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from transmla import devices
from transmla.devices import free_bytes, narrow_dtype, usable
from transmla.errors import TransmlaError

CPU = torch.device("cpu")
MEBI = 2**20


def test_the_cpu_is_there() -> None:
    assert usable("cpu", torch.float64) == usable(CPU) == CPU


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_bfloat16_is_for_cpus_that_multiply_it(
    monkeypatch: pytest.MonkeyPatch, multiplies: bool, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    assert narrow_dtype(CPU) is dtype and narrow_dtype(torch.device("meta")) is None


@pytest.mark.skipif("TRANSMLA_TEST_NARROW" in os.environ, reason="TRANSMLA_TEST_NARROW says what the CPU can do")
def test_what_this_cpu_multiplies() -> None:
    """As the kernel describes it."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        pytest.skip("the kernel does not describe this CPU in /proc/cpuinfo")
    flags = next(line for line in info.read_text("utf-8").splitlines() if line.startswith("flags")).split()
    assert narrow_dtype(CPU) is (torch.bfloat16 if "avx512_bf16" in flags else None)


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_emulated_bfloat16_is_none(
    monkeypatch: pytest.MonkeyPatch, multiplies: bool, dtype: torch.dtype | None
) -> None:
    """On a GPU: torch calls it supported, too, where it is emulated; and every GPU is asked for itself."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or multiplies
    )
    assert narrow_dtype(torch.device("cuda", 1)) is dtype and asked == [torch.device("cuda", 1)]


@pytest.mark.parametrize("name", ["gpu", "cuda:-3", f"cuda:{torch.cuda.device_count()}", "xpu:99", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(TransmlaError, match="cannot be used") as caught:
        usable(name)
    assert caught.value.where == "--device" and "\n" not in caught.value.why and "use cpu" in caught.value.remedy


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group two levels below the root."""
    own = tmp_path / "cgroup"
    own.write_text("0::/batch/job\n", encoding="utf-8")
    folder = tmp_path / "groups" / "batch" / "job"
    folder.mkdir(parents=True)
    monkeypatch.setattr(devices, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(devices, "OWN_CGROUP", own)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return folder


def limit(folder: Path, most: str, used: int, cached: int) -> None:
    (folder / "memory.max").write_text(f"{most}\n", encoding="utf-8")
    (folder / "memory.current").write_text(f"{used}\n", encoding="utf-8")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n", encoding="utf-8")


def test_limits_of_control_groups_count(group: Path) -> None:
    machine = free_bytes(CPU)
    assert machine > 64 * MEBI
    limit(group, "max", 5 * MEBI, 0)
    assert free_bytes(CPU) == pytest.approx(machine, rel=0.5), "no limit"
    limit(group, str(40 * MEBI), 30 * MEBI, 6 * MEBI)
    assert free_bytes(CPU) == 16 * MEBI, "cached files can go"
    limit(group.parent, str(50 * MEBI), 45 * MEBI, 0)
    assert free_bytes(CPU) == 5 * MEBI, "the group above has less left"
    limit(group.parent, str(50 * MEBI), 55 * MEBI, 0)
    assert free_bytes(CPU) == 0


def test_processes_share_the_machine(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(group, str(40 * MEBI), 0, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == 10 * MEBI


def test_old_and_other_systems_have_no_such_groups(group: Path) -> None:
    limit(group, str(MEBI), 0, 0)
    devices.OWN_CGROUP.write_text("4:memory:/job\n", encoding="utf-8")
    assert free_bytes(CPU) > MEBI
    devices.OWN_CGROUP.unlink()
    assert free_bytes(CPU) > MEBI
