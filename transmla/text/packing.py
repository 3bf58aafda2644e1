"""Documents into windows of equal length. No token sees another document: positions start anew with each, by which
transformers masks the attention, and the last token of a document predicts nothing.

Legend: T tokens per window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# what transformers' losses ignore
IGNORED = -100


@dataclass(frozen=True)
class Window:
    """ids, positions in their document, the next token of each (IGNORED where that is of another document); T each."""

    ids: list[int]
    positions: list[int]
    labels: list[int]


def pack(documents: Iterable[list[int]], length: int) -> Iterator[Window]:
    """Windows of `length` tokens, one document behind the other; what does not fit continues in the next window.

    A piece that continues starts at position 0 again, since its beginning is not there to be seen. What is left at the
    end does not fill a window and is dropped, as are documents of a single token, which predict nothing.
    """
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for document in documents:
        start = 0
        while len(document) - start > 1:
            piece = document[start : start + length - len(ids)]
            ends_here = start + len(piece) == len(document)
            ids += piece
            positions += range(len(piece))
            # the next token is known even where the window ends before it
            labels += document[start + 1 : start + 1 + len(piece)] + [IGNORED] * ends_here
            start += len(piece)
            if len(ids) == length:
                yield Window(ids, positions, labels)
                ids, positions, labels = [], [], []
