"""Documents of texts for healing: files, tables and datasets, tokenised and mixed by weight.

A plain text file is one text, in pieces of a window. Rows of tables and datasets are one document each: their `text`,
or their `messages` through the chat template. A text that ends begins again.

Legend: T tokens per window.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from transmla.errors import DataError
from transmla.text.mixes import SELF, Part
from transmla.text.packing import pack
from transmla.text.sources import TEXT_COLUMN, is_table, read_text, rows
from transmla.text.windows import begin_tokens

MESSAGES = "messages"
# characters that are tokenised at once, and read of one text at most
BLOCK, PLAIN_CHARACTERS = 2**20, 2**31


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


def open_text(
    part: Part,
    tokenizer: Any,
    length: int,
    sampled: Callable[[], list[list[int]]],
    *,
    evaluation: bool,
    begin: str = "none",
) -> Text:
    """The documents of one part; what a name means is checked when the first one is drawn.

    sampled: for "self", texts that the source has written, as token ids
    begin:   windows of a plain text that start with what the tokenizer puts first: "half", "all" or "none"
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def ended(ids: list[int]) -> list[int]:
        return ids + end if ids and ids[-1:] != end else ids

    def documents() -> Iterator[list[int]]:
        if part.name == SELF:
            yield from sampled()
        elif not is_table(part.name):
            text = read_text(part.name, PLAIN_CHARACTERS, evaluation=evaluation)
            yield from _begun(_pieces(_tokens_of(text, tokenizer), length), tokenizer, begin)
        else:
            render = _renderer(tokenizer)
            for row in rows(part.name):
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


def _begun(pieces: Iterator[list[int]], tokenizer: Any, begin: str) -> Iterator[list[int]]:
    """Pieces, of which all or every second one have begin tokens in the place of their first ones."""
    prefix = [] if begin == "none" else list(begin_tokens(tokenizer))
    for number, piece in enumerate(pieces):
        begins = begin == "all" or number % 2 == 0
        yield prefix + piece[len(prefix) :] if begins else piece


def _renderer(tokenizer: Any) -> Callable[[dict[str, Any], str], tuple[str, bool]]:
    """(row, name of the data) -> its text, and whether that went through the chat template."""

    def render(row: dict[str, Any], name: str) -> tuple[str, bool]:
        if isinstance(row.get(TEXT_COLUMN), str):
            return str(row[TEXT_COLUMN]), False
        if row.get(MESSAGES):
            if not getattr(tokenizer, "chat_template", None):
                raise DataError(
                    "the tokenizer has no chat template",
                    where=name,
                    why=f"rows have {MESSAGES}, which a template turns into text",
                    remedy=f"use data with a `{TEXT_COLUMN}` column, or a model with a chat template",
                )
            try:  # in the sandbox of transformers, where a template cannot reach anything but the messages
                return str(tokenizer.apply_chat_template(row[MESSAGES], tokenize=False)), True
            except Exception as error:  # whatever a template provokes
                raise DataError(
                    "the chat template of the tokenizer fails",
                    where=name,
                    why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                    remedy=f"check the {MESSAGES} of the data, or use data with a `{TEXT_COLUMN}` column",
                ) from error
        raise DataError(
            "a row has no text",
            where=name,
            why=f"its columns are {', '.join(sorted(row))}",
            remedy=f"use data with a `{TEXT_COLUMN}` or a `{MESSAGES}` column",
        )

    return render
