"""The windows that healing trains on and measures, as a dataset over a file that is mapped into memory.

Their number is therefore limited by the disk and not by memory.

Legend: N windows, T tokens per window.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import Dataset

from transmla.checkpoint.destination import disk_errors
from transmla.progress import Progress


class Windows(Dataset[dict[str, Tensor]]):
    """A dataset of windows, read from a file that `write_windows` has written; `DestinationError` if it cannot be.

    path:  the file
    first: number of its first window, where the windows of several files are numbered in sequence
    """

    def __init__(self, path: Path, first: int = 0) -> None:
        with disk_errors(path):
            self._rows_N3T = np.load(path, mmap_mode="r")
        self._first = first

    def __len__(self) -> int:
        return int(self._rows_N3T.shape[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window as keyword arguments of `Student.forward`.

        input_ids, position_ids (within the document) and labels are int64 [T]; `labels` holds the next token of each
        token, so the model must not shift it. `index` is the number of the window, an int64 scalar.
        """
        row_3T = torch.from_numpy(self._rows_N3T[index].astype(np.int64))
        input_ids, position_ids, labels = row_3T
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": labels,
            "index": torch.tensor(self._first + index),
        }


def write_windows(
    path: Path, rows: Iterable[Any], num_windows: int, length: int, progress: Progress, stage: str
) -> None:
    """Write the first `num_windows` packed windows of `rows` to `path`, as an int32 array [N, 3, T] in npy format.

    The file gets its name only when it is complete. Raises `DestinationError` if the disk is full.
    """
    partial = path.with_suffix(".partial")
    with disk_errors(path):
        rows_N3T = open_memmap(partial, mode="w+", dtype=np.int32, shape=(num_windows, 3, length))
        for number, window in enumerate(islice(rows, num_windows)):
            rows_N3T[number] = (window.ids, window.positions, window.labels)
            if number % 64 == 63 or number + 1 == num_windows:
                progress(stage, number + 1, num_windows, "")
        rows_N3T.flush()
        del rows_N3T
        partial.rename(path)
