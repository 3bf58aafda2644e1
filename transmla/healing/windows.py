"""The windows that healing trains on and measures: rows of a file that is mapped into memory, so that their number is
bounded by the disk.

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
    """Rows of a file that `write_windows` made, as a model takes them.

    first: index of the first row among the windows of all files
    """

    def __init__(self, path: Path, first: int = 0) -> None:
        self._rows_N3T = np.load(path, mmap_mode="r")
        self._first = first

    def __len__(self) -> int:
        return int(self._rows_N3T.shape[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """ids, positions in their document and labels (the next token, not shifted any more), int64 [T]; index."""
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
    """`num_windows` packed windows as int32 [N, 3, T]; the file has its name only when it is whole."""
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
