"""Devices: whether one can be used, how much of its memory is free, and whether it multiplies bfloat16."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import psutil
import torch

from transmla.errors import TransmlaError

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")  # names the control group of this process


def usable(name: str | torch.device, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device called `name`; raises `TransmlaError` unless a tensor of `dtype` can be created on it."""
    try:
        device = torch.device(name)
        torch.empty(1, dtype=dtype, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # which of these depends on how torch was built
        raise TransmlaError(
            f"the device {name} cannot be used",
            where="--device",
            why=(str(error).splitlines() or [type(error).__name__])[0],
            remedy="use cpu, or a GPU that torch finds (cuda, cuda:1 ...; see torch.cuda.device_count())",
        ) from error
    return device


def named(name: str) -> str:
    """The name of a device; for "auto", "cuda" where torch finds a GPU, else "cpu"."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def narrow_dtype(device: torch.device) -> torch.dtype | None:
    """torch.bfloat16 if the hardware of `device` multiplies it, None if it would be emulated."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else None


def release(device: str | torch.device) -> None:
    """Give back the memory of models that nobody holds any longer: they hold themselves, in circles."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that this process can use on `device`.

    On a GPU this is what is free. On the CPU it is what is free on the machine, or in the control groups of this
    process (containers, batch systems) if they limit it further, divided by the number of processes that the launcher
    has started on this machine.
    """
    if device.type == "cuda":
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept_by_torch
    free = min([int(psutil.virtual_memory().available), *_left_in_cgroups()])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_in_cgroups() -> list[int]:
    """Free bytes in each control group (version 2) of this process that has a limit.

    Cached files that are not in active use count as free.
    """
    try:
        (name,) = [line[3:] for line in OWN_CGROUP.read_text("utf-8").splitlines() if line.startswith("0::")]
    except (OSError, ValueError):
        return []
    folder = CGROUPS / name.strip("/")
    left = []
    for group in (folder, *folder.parents):
        try:
            limit, used = ((group / f"memory.{file}").read_text("utf-8").strip() for file in ("max", "current"))
            statistics = dict(line.split() for line in (group / "memory.stat").read_text("utf-8").splitlines())
        except (OSError, ValueError):  # the root group has no limit, and other systems do not have these files
            continue
        if limit != "max":
            left.append(max(0, int(limit) - int(used) + int(statistics.get("inactive_file", 0))))
    return left
