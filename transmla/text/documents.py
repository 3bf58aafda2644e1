"""Text for healing: documents from files, tables and datasets, mixed by weight, tokenised and packed into windows.

FILE.txt               one text, in pieces of a window
FILE.jsonl .parquet .csv, OWNER/NAME[:CONFIG]    one document a row: `text`, or `messages` through the chat template
wikitext, synthetic, continued, code    what ships with the package
self                   what the source model writes itself
A:3+B                  several, three windows' worth of A for one of B; a text that ends begins anew

Windows lie in one file that is mapped into memory, so that their number is bounded by the disk.

Legend: N windows, T tokens per window.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import Dataset

from transmla.checkpoint.destination import disk_errors
from transmla.errors import DataError
from transmla.text.packing import pack
from transmla.text.windows import TABLES, Part, read_text

SELF = "self"
TEXT, MESSAGES = "text", "messages"
# characters that are tokenised at once, and read of one text at most
BLOCK, PLAIN_CHARACTERS = 2**20, 2**31

Progress = Callable[[str, int, int, str], None]


@dataclass
class Text:
    """Documents of one part as token ids: the first windows are held out, the rest is endless.

    skipped: documents that are held out;  drawn: tokens that were drawn so far, in so many begun passes
    """

    part: Part
    documents: Callable[[], Iterator[list[int]]]
    heldout: list[Any] = field(default_factory=list)
    skipped: int = 0
    drawn: int = 0
    begun: int = 0

    def hold_out(self, num_windows: int, length: int) -> None:
        """Pack the first windows' worth of documents and skip these documents from now on."""

        def counted() -> Iterator[list[int]]:
            for document in self.documents():
                self.skipped += 1
                yield document

        self.heldout = list(islice(pack(counted(), length), num_windows))
        left = next(islice(self.documents(), self.skipped, None), None)
        if len(self.heldout) < num_windows or left is None:
            raise DataError(
                "the text is too short",
                where=self.part.name,
                why=f"{num_windows} windows of {length:,} tokens are held out, and something must be left to train on",
                remedy="use a longer text, fewer held-out windows (--heldout) or shorter ones (--window)",
            )

    def endless(self) -> Iterator[list[int]]:
        while True:
            self.begun += 1
            for document in islice(self.documents(), self.skipped, None):
                self.drawn += len(document)
                yield document


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


def open_text(
    part: Part, tokenizer: Any, length: int, sampled: Callable[[], list[list[int]]], *, evaluation: bool
) -> Text:
    """The documents of one part; what a name means is checked when the first one is drawn.

    sampled: for "self", texts that the source has written, as token ids
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def ended(ids: list[int]) -> list[int]:
        return ids + end if ids and ids[-1:] != end else ids

    def documents() -> Iterator[list[int]]:
        if part.name == SELF:
            yield from sampled()
        elif _is_plain(part.name):
            text = read_text(part.name, PLAIN_CHARACTERS, evaluation=evaluation)
            yield from _pieces(_tokens_of(text, tokenizer), length)
        else:
            render = _renderer(tokenizer)
            for row in _rows(part.name):
                text, is_chat = render(row, part.name)  # a template brings its own special tokens
                yield ended(tokenizer(text, add_special_tokens=not is_chat, verbose=False).input_ids)

    return Text(part, lambda: (document for document in documents() if len(document) > 1))


def mixed(texts: list[Text], seed: int) -> Iterator[list[int]]:
    """Endless: documents drawn so that the tokens of each text follow its weight."""
    draw = random.Random(seed)
    streams = [text.endless() for text in texts]
    first = [draw.random() for _ in texts]  # breaks ties by the seed

    def spent(place: int) -> float:
        return first[place] + texts[place].drawn / texts[place].part.weight

    while True:
        yield next(streams[min(range(len(texts)), key=spent)])


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


def _is_plain(name: str) -> bool:
    path = Path(name).expanduser()
    if path.is_file():
        return path.suffix.lower() not in TABLES
    # what is no dataset id either gets the error of read_text
    return "/" not in name


def _tokens_of(text: str, tokenizer: Any) -> Iterator[int]:
    """Block by block, cut at line ends."""
    start = 0
    while start < len(text):
        end = min(start + BLOCK, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield from tokenizer(text[start:end], add_special_tokens=False, verbose=False).input_ids
        start = end


def _pieces(ids: Iterator[int], length: int) -> Iterator[list[int]]:
    """Pieces of `length` tokens: one text has no documents to respect."""
    while piece := list(islice(ids, length)):
        yield piece


def _rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a table or of the train split of a dataset, streamed."""
    import datasets

    path = Path(name).expanduser()
    try:
        if path.is_file():
            kind = TABLES[path.suffix.lower()]
            rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        else:
            dataset, _, config = name.partition(":")
            rows = datasets.load_dataset(dataset, config or None, split="train", streaming=True)
        yield from rows
    except Exception as error:  # datasets raises whatever its readers raise
        raise DataError(
            f"cannot read the data {name}",
            where=name,
            why=f"{type(error).__name__}: {error}",
            remedy="check the name and the connection; files are .txt, .jsonl, .parquet or .csv",
        ) from error


def _renderer(tokenizer: Any) -> Callable[[dict[str, Any], str], tuple[str, bool]]:
    """(row, name of the data) -> its text, and whether that went through the chat template."""

    def render(row: dict[str, Any], name: str) -> tuple[str, bool]:
        if isinstance(row.get(TEXT), str):
            return str(row[TEXT]), False
        if row.get(MESSAGES):
            if not getattr(tokenizer, "chat_template", None):
                raise DataError(
                    "the tokenizer has no chat template",
                    where=name,
                    why=f"rows have {MESSAGES}, which a template turns into text",
                    remedy=f"use data with a `{TEXT}` column, or a model with a chat template",
                )
            return str(tokenizer.apply_chat_template(row[MESSAGES], tokenize=False)), True
        raise DataError(
            "a row has no text",
            where=name,
            why=f"its columns are {', '.join(sorted(row))}",
            remedy=f"use data with a `{TEXT}` or a `{MESSAGES}` column",
        )

    return render
