"""Documents into windows of equal length. No token sees another document: positions start anew with each, by which
transformers masks the attention, and the last token of a document predicts nothing.

Legend: T tokens per window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# what transformers' losses ignore
IGNORED = -100


class Answered(list[int]):
    """Token ids of a document of which only some are learned. learned: for each token, whether it is one of these"""

    def __init__(self, ids: Iterable[int], learned: Iterable[bool]) -> None:
        super().__init__(ids)
        self.learned = list(learned)


@dataclass(frozen=True)
class Window:
    """ids, positions in their document, the next token of each (IGNORED where that is of another document, or not to be
    learned); T each."""

    ids: list[int]
    positions: list[int]
    labels: list[int]


def pack(documents: Iterable[list[int]], length: int) -> Iterator[Window]:
    """Windows of `length` tokens, one document behind the other; what does not fit continues in the next window.

    A piece that continues starts at position 0 again, since its beginning is not there to be seen. What is left at the
    end does not fill a window and is dropped, as are documents of a single token, which predict nothing, and windows of
    `Answered` documents in which there is nothing to learn.
    """
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for document in documents:
        start = 0
        successors = _successors(document)
        while len(document) - start > 1:
            piece = document[start : start + length - len(ids)]
            ids += piece
            positions += range(len(piece))
            # the next token is known even where the window ends before it
            labels += successors[start : start + len(piece)]
            start += len(piece)
            if len(ids) == length:
                if any(label != IGNORED for label in labels):
                    yield Window(ids, positions, labels)
                ids, positions, labels = [], [], []


def _successors(document: list[int]) -> list[int]:
    """The next token of each token, or IGNORED."""
    following = document[1:]
    if isinstance(document, Answered):
        following = [
            token if learned else IGNORED for token, learned in zip(following, document.learned[1:], strict=True)
        ]
    return [*following, IGNORED]
