"""Rows of tables as text: as it is, or turns through the chat template; and which characters are answers.

A row has a `text`; or `messages`, dicts with role and content; or `prompt` and `completion`, both strings or both lists
of messages.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from transmla.errors import DataError
from transmla.text.sources import TEXT_COLUMN

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Rendered:
    """is_chat: text is what the chat template made
    answers: (start, end) of the characters that answer, where the row has turns; None where it has none
    """

    text: str
    is_chat: bool = False
    answers: tuple[tuple[int, int], ...] | None = None

    def is_answer(self, place: int) -> bool:
        """Whether the character at `place` is a part of an answer."""
        return any(start <= place < end for start, end in self.answers or ())


def rendered(row: dict[str, Any], tokenizer: Any, name: str, *, answers: bool = True) -> Rendered:
    """The text of a row; `DataError` if it has none.

    name:    of the data, for messages
    answers: whether it is wanted where they are. Then a row that has its turns and a text as well, in which nobody
             knows where they are, is its turns; otherwise it is the text
    """
    text = row.get(TEXT_COLUMN)
    if isinstance(text, str) and not answers:
        return Rendered(text)
    messages, prompt, completion = _turns(row.get(MESSAGES)), row.get(PROMPT), row.get(COMPLETION)
    if isinstance(prompt, list) and isinstance(completion, list) and prompt and completion and not messages:
        messages = [*prompt, *completion]
    if messages and (not isinstance(text, str) or getattr(tokenizer, "chat_template", None)):
        return _chat(messages, tokenizer, name, answers)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Rendered(prompt + completion, answers=((len(prompt), len(prompt) + len(completion)),))
    if isinstance(text, str):
        return Rendered(text)
    cells = [row[column] for column in (TEXT_COLUMN, MESSAGES, PROMPT, COMPLETION) if column in row]
    turns = [row.get(column) for column in (MESSAGES, PROMPT, COMPLETION)]
    if None in cells or [] in turns:
        return Rendered("")  # an empty cell, or a conversation without turns
    raise DataError(
        "a row has no text",
        where=name,
        why=f"its columns are {', '.join(sorted(row))}",
        remedy=f"use data with a `{TEXT_COLUMN}` or a `{MESSAGES}` column, or with `{PROMPT}` and `{COMPLETION}`",
    )


def _turns(cell: Any) -> Any:
    """The cell of a row; turns that are written as JSON, as in a file that has strings alone, as what they are."""
    if isinstance(cell, str) and cell.lstrip().startswith("[{"):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def _chat(messages: list[dict[str, Any]], tokenizer: Any, name: str, answers: bool) -> Rendered:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template",
            where=name,
            why=f"rows have {MESSAGES}, which a template turns into text",
            remedy=f"use data with a `{TEXT_COLUMN}` column, or a model with a chat template",
        )
    text = templated(tokenizer, messages, name)
    return Rendered(text, True, _answers(messages, text, tokenizer, name) if answers else None)


_REMEDY = f"check the {MESSAGES} of the data, or use data with a `{TEXT_COLUMN}` column"


def templated(
    tokenizer: Any, messages: list[dict[str, Any]], name: str, *, ask: bool = False, remedy: str = _REMEDY
) -> str:
    """Messages through the tokenizer's template, with `ask` up to where the answer begins; `DataError` if that fails.

    It runs in the sandbox of transformers, where a template cannot reach anything but the messages.
    """

    def made(messages: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))

    try:
        text = made(messages)
    except Exception as error:  # whatever a template provokes
        raise DataError(
            "the chat template of the tokenizer fails",
            where=name,
            why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            remedy=remedy,
        ) from error
    if lost := [said for one in messages if (said := _said(one)) and said not in text]:
        # templates of multimodal models look for parts, and find none in a string; others leave out thoughts
        with contextlib.suppress(Exception):
            other = made(
                [
                    one | {"content": [{"type": "text", "text": said}]} if (said := _said(one)) else one
                    for one in messages
                ]
            )
            text = other if all(said in other for said in lost) else text
    return text


def _said(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _common_start(one: str, other: str) -> str:
    differing = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return one[: next(differing, min(len(one), len(other)))]


def _answers(messages: list[dict[str, Any]], text: str, tokenizer: Any, name: str) -> tuple[tuple[int, int], ...]:
    """Where the assistant's turns are: behind what the template writes to ask for one, up to what it writes behind it.

    A turn that the template renders differently when others follow (some leave out thoughts), or not at all, is not
    taken. Where it asks for more than what it writes before an answer, as for a thought that answers do not have, the
    answer begins where both part.
    """
    spans = []
    for number, message in enumerate(messages):
        if message.get("role") == ASSISTANT:
            try:
                before = templated(tokenizer, messages[:number], name, ask=True) if number else ""
                given = templated(tokenizer, messages[:number], name) if number else ""
                after = templated(tokenizer, messages[: number + 1], name)
            except DataError:
                continue
            if not after.startswith(before) and after.startswith(given) and before.startswith(given):
                before = _common_start(before, after)
                if len(before) == len(given):
                    continue
            if text.startswith(before) and text.startswith(after) and len(before) < len(after):
                spans.append((len(before), len(after)))
    return tuple(spans)
