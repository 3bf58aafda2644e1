"""Devices: whether there is one, how much of its memory is free, which narrow dtype it multiplies."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

from transmla.errors import TransmlaError

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def usable(name: str | torch.device, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device of that name; `TransmlaError` unless a tensor of `dtype` can be made on it."""
    try:
        device = torch.device(name)
        torch.empty(1, dtype=dtype, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # what torch raises depends on how it was built
        raise TransmlaError(
            f"the device {name} cannot be used",
            where="--device",
            why=(str(error).splitlines() or [type(error).__name__])[0],
            remedy="use cpu, or cuda or cuda:1 where torch finds such a GPU (torch.cuda.device_count())",
        ) from error
    return device


def narrow_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware multiplies it; None where it would be emulated."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else None


def free_bytes(device: torch.device) -> int:
    """Memory that this process may count on: of a GPU what is free, of the machine its share of what is free.

    The processes that a launcher has started on a machine share it; the limits of its control groups (containers,
    batch systems) count like the size of the machine.
    """
    if device.type == "cuda":
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept_by_torch
    free = min([int(psutil.virtual_memory().available), *_left_in_cgroups()])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _left_in_cgroups() -> list[int]:
    """Bytes to the limit of every control group (version 2) above this process; files in its cache can go."""
    try:
        (own,) = [line[3:] for line in OWN_CGROUP.read_text("utf-8").splitlines() if line.startswith("0::")]
    except (OSError, ValueError):
        return []
    folder = CGROUPS / own.strip("/")
    left = []
    for group in (folder, *folder.parents):
        try:
            limit, used = ((group / f"memory.{name}").read_text("utf-8").strip() for name in ("max", "current"))
            counted = dict(line.split() for line in (group / "memory.stat").read_text("utf-8").splitlines())
        except (OSError, ValueError):  # the root has no limit, and other systems no such files
            continue
        if limit != "max":
            left.append(max(0, int(limit) - int(used) + int(counted.get("inactive_file", 0))))
    return left
