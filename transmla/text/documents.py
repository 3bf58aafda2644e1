"""Documents of texts for healing: files, tables and datasets, tokenised and mixed by weight.

A plain text file is one text, in pieces of a window. Rows of tables and datasets are one document each: their `text`,
or their turns through the chat template (chats.py). A text that ends begins again.

Legend: T tokens per window.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transmla.errors import DataError
from transmla.text import maths
from transmla.text.chats import Rendered, rendered
from transmla.text.mixes import SELF, Part
from transmla.text.packing import Answered, pack
from transmla.text.sources import is_table, read_text, rows
from transmla.text.windows import begin_tokens

# characters that are tokenised at once, by one thread, and read of one text at most
BLOCK, PLAIN_CHARACTERS = 2**20, 2**31
# blocks that the tokenizer's threads share, at most, each with one: a block takes tens of megabytes as tokens
BLOCKS_TOGETHER = 16


@dataclass
class Text:
    """Documents of one part as token ids: the first windows are held out, the rest is endless.

    skipped: documents that are held out;  drawn: tokens that were drawn so far, in so many begun passes
    is_cut:  it is one text, and its documents are pieces of a window; else they are rows, of any length
    """

    part: Part
    documents: Callable[[], Iterator[list[int]]]
    is_cut: bool = False
    heldout: list[Any] = field(default_factory=list)
    skipped: int = 0
    drawn: int = 0
    begun: int = 0

    def hold_out(self, num_windows: int, length: int, *, is_trained_on: bool = True) -> None:
        """Pack the first windows' worth of documents and skip these documents from now on.

        is_trained_on: so something must be left; `DataError` if it is not, and if there are fewer windows
        """

        def counted() -> Iterator[list[int]]:
            for document in self.documents():
                self.skipped += 1
                yield document

        self.heldout = list(islice(pack(counted(), length), num_windows))
        # what has nothing to learn makes no windows, however often it is read
        left = not is_trained_on or any(map(_teaches, islice(self.documents(), self.skipped, None)))
        if len(self.heldout) < num_windows or not left:
            answered = any(isinstance(document, Answered) for document in self.documents())
            needed = f"{num_windows} windows of {length:,} tokens are held out"
            needed += ", and something must be left to train on" if is_trained_on else ""
            raise DataError(
                "the text is too short",
                where=self.part.name,
                why=f"{needed}; rows without an answer do not count" if answered else needed,
                remedy="use a longer text, fewer held-out windows (--heldout) or shorter ones (--window)",
            )

    def endless(self) -> Iterator[list[int]]:
        while True:
            self.begun += 1
            for document in islice(self.documents(), self.skipped, None):
                self.drawn += len(document)
                yield document


def _teaches(document: list[int]) -> bool:
    return not isinstance(document, Answered) or any(document.learned[1:])


def open_text(
    part: Part,
    tokenizer: Any,
    length: int,
    sampled: Callable[[], list[list[int]]],
    *,
    evaluation: bool,
    begin: str = "none",
    completion_only: bool = False,
) -> Text:
    """The documents of one part; what a name means is checked when the first one is drawn.

    sampled: for "self", texts that the source has written, as token ids
    begin:   windows of a plain text that start with what the tokenizer puts first: "half", "all" or "none"
    completion_only: of rows with turns, only answers are learned
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    is_chat = part.name == maths.NAME and bool(getattr(tokenizer, "chat_template", None))
    is_cut = not (is_chat or part.name == SELF or is_table(part.name))

    def tokenised(row: Rendered) -> list[int]:
        # a template brings its own special tokens
        options = {"add_special_tokens": not row.is_chat, "verbose": False}
        if not completion_only or row.answers is None:
            ids: list[int] = tokenizer(row.text, **options).input_ids
            return ids + end if ids and ids[-1:] != end else ids
        # a token that begins before an answer, with the space in front of it, is a part of the answer
        encoded = tokenizer(row.text, return_offsets_mapping=True, **options)
        ids, stops = encoded.input_ids, [stop for _, stop in encoded.offset_mapping]
        if ids and ids[-1:] != end:
            ids, stops = ids + end, stops + [0] * len(end)
        learned: list[bool] = []
        for stop in stops:
            # the end has no characters, here or from the tokenizer, and is learned as the token before it
            learned.append(row.is_answer(stop - 1) if stop else learned[-1:] == [True])
        return Answered(ids, learned)

    def documents() -> Iterator[list[int]]:
        if part.name == SELF:
            yield from sampled()
        elif is_cut:
            text = read_text(part.name, PLAIN_CHARACTERS, evaluation=evaluation)
            yield from _begun(_pieces(_tokens_of(text, tokenizer), length), tokenizer, begin)
        else:
            for row in maths.rows() if is_chat else rows(part.name):
                if (found := rendered(row, tokenizer, part.name, answers=completion_only)).text:
                    yield tokenised(found)

    return Text(part, lambda: (document for document in documents() if len(document) > 1), is_cut)


def mixed(texts: list[Text], seed: int) -> Iterator[list[int]]:
    """Endless: documents drawn so that the tokens of each text follow its weight."""
    draw = random.Random(seed)
    streams = [text.endless() for text in texts]
    first = [draw.random() for _ in texts]  # breaks ties by the seed

    def spent(place: int) -> float:
        return first[place] + texts[place].drawn / texts[place].part.weight

    while True:
        yield next(streams[min(range(len(texts)), key=spent)])


def _tokens_of(text: str, tokenizer: Any) -> Iterator[int]:
    """Block by block, cut at line ends. More and more blocks at once: often only the beginning is wanted."""
    blocks, together, most = _blocks(text), 1, min(BLOCKS_TOGETHER, os.cpu_count() or 1)
    while some := list(islice(blocks, together)):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False).input_ids:
            yield from ids
        together = min(2 * together, most)


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = min(start + BLOCK, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _pieces(ids: Iterator[int], length: int) -> Iterator[list[int]]:
    """Pieces of `length` tokens: one text has no documents to respect."""
    while piece := list(islice(ids, length)):
        yield piece


def _begun(pieces: Iterator[list[int]], tokenizer: Any, begin: str) -> Iterator[list[int]]:
    """Pieces, of which all or every second one have begin tokens in the place of their first ones."""
    prefix = [] if begin == "none" else list(begin_tokens(tokenizer))
    for number, piece in enumerate(pieces):
        begins = begin == "all" or number % 2 == 0
        yield prefix + piece[len(prefix) :] if begins else piece
