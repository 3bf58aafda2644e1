"""Texts to windows: mixes, documents, held-out windows that are never trained on, files that are mapped."""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from transmla.checkpoint.resolve import resolve
from transmla.errors import DataError
from transmla.healing.windows import Windows, write_windows
from transmla.text.chats import rendered
from transmla.text.documents import Text, mixed, open_text
from transmla.text.mixes import Part, parse_mix
from transmla.text.packing import IGNORED, Answered, pack
from transmla.text.sources import read_text

END = 2


class Letters:
    """A tokenizer: one token a letter, 1 before and nothing behind."""

    eos_token_id = END
    chat_template: str | None = None

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, verbose: bool = True) -> Any:
        texts = [text] if isinstance(text, str) else text
        each = [[1] * add_special_tokens + [ord(letter) for letter in one] for one in texts]
        ids = each[0] if isinstance(text, str) else each
        return type("Encoding", (), {"input_ids": ids})

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool = False
    ) -> str:
        assert not tokenize
        turns = "".join(f"<{one['role']}>{one['content']}" for one in messages)
        return turns + "<assistant>" * add_generation_prompt


def nothing() -> list[list[int]]:
    raise AssertionError("nothing is sampled here")


def documents(name: str, tokenizer: Any = None, length: int = 10) -> list[list[int]]:
    text = open_text(Part(name), tokenizer or Letters(), length, nothing, evaluation=False)
    return list(text.documents())


@pytest.mark.parametrize(("begin", "wanted"), [("none", "abcdefghi"), ("half", "1bcdef1hi"), ("all", "1bc1ef1hi")])
def test_pieces_that_begin(tmp_path: Path, begin: str, wanted: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghi", encoding="utf-8")
    text = open_text(Part(str(path)), Letters(), 3, nothing, evaluation=False, begin=begin)
    ids = [token for piece in text.documents() for token in piece]
    assert "".join("1" if token == 1 else chr(token) for token in ids) == wanted


def as_text(ids: list[int]) -> str:
    return "".join(chr(token) for token in ids)


@pytest.mark.parametrize(
    ("mix", "parts"),
    [
        ("a", [("a", 1.0)]),
        ("a:3+b", [("a", 3.0), ("b", 1.0)]),
        ("owner/name:config+x.txt:0.5", [("owner/name:config", 1.0), ("x.txt", 0.5)]),
        ("owner/name:config:2", [("owner/name:config", 2.0)]),
    ],
)
def test_mixes(mix: str, parts: list[tuple[str, float]]) -> None:
    assert [(part.name, part.weight) for part in parse_mix(mix, "--data")] == parts


@pytest.mark.parametrize("mix", ["", "a+", "a:0", "a:-1+b", "a:inf"])
def test_what_is_no_mix(mix: str) -> None:
    with pytest.raises(DataError, match="not a mix of texts") as caught:
        parse_mix(mix, "--data")
    assert caught.value.where == "--data"


def test_a_plain_text_comes_in_pieces_of_a_window(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxy", encoding="utf-8")
    found = documents(str(tmp_path / "a.txt"))
    assert [as_text(ids) for ids in found] == ["abcdefghij", "klmnopqrst", "uvwxy"]


def test_blocks_of_a_long_text_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transmla.text.documents.BLOCK", 7)
    given = "one\ntwo three\nfourfivesixseven\n\neight"
    (tmp_path / "a.txt").write_text(given, encoding="utf-8")
    assert "".join(as_text(ids) for ids in documents(str(tmp_path / "a.txt"))) == given


def test_rows_of_a_table_are_documents(tmp_path: Path) -> None:
    rows = [{"text": "hello"}, {"text": ""}, {"id": 3}, {"text": None}, {"text": "you"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert documents(str(tmp_path / "a.jsonl")) == [[1, *map(ord, "hello"), END], [1, *map(ord, "you"), END]]
    assert read_text(str(tmp_path / "a.jsonl"), 100) == "hello\n\n\n\nyou"
    (tmp_path / "a.csv").write_text('text\nNone\n""\nNA\n', encoding="utf-8")
    assert documents(str(tmp_path / "a.csv")) == [[1, *map(ord, "None"), END], [1, *map(ord, "NA"), END]]


def test_chats_go_through_the_template_once(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    tokenizer = Letters()
    with pytest.raises(DataError, match="no chat template"):
        documents(str(tmp_path / "a.jsonl"), tokenizer)
    tokenizer.chat_template = "something"
    (found,) = documents(str(tmp_path / "a.jsonl"), tokenizer)
    # a template brings its own special tokens: none is added in front
    assert found == [*map(ord, "<user>hi<assistant>ho"), END]


def test_a_turn_that_the_template_refuses_to_end_with_is_not_an_answer(tmp_path: Path) -> None:
    class Strict(Letters):
        chat_template = "something"

        def apply_chat_template(self, messages: list[dict[str, str]], *args: Any, **kwargs: Any) -> str:
            if all(one["role"] != "user" for one in messages):
                raise ValueError("No user query found in messages.")
            return super().apply_chat_template(messages, *args, **kwargs)

    turns = [("system", "s"), ("assistant", "hello"), ("user", "hi"), ("assistant", "ho")]
    messages = [{"role": role, "content": content} for role, content in turns]
    found = rendered({"messages": messages}, Strict(), "chats")
    assert found.text == "<system>s<assistant>hello<user>hi<assistant>ho"
    assert found.answers == ((len(found.text) - 2, len(found.text)),)
    with pytest.raises(DataError, match="template of the tokenizer fails"):
        rendered({"messages": messages[:2]}, Strict(), "chats")


@pytest.mark.parametrize("nothing_said", [None, []])
def test_empty_conversations_are_passed_over(nothing_said: Any) -> None:
    tokenizer = Letters()
    tokenizer.chat_template = "something"
    asked, answered = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}]
    for row in (
        {"messages": nothing_said},
        {"prompt": nothing_said, "completion": nothing_said},
        {"prompt": asked, "completion": nothing_said},
        {"prompt": nothing_said, "completion": answered},
    ):
        assert rendered(row, tokenizer, "chats").text == ""
    row = {"messages": nothing_said, "prompt": asked, "completion": answered}
    assert rendered(row, tokenizer, "chats").text == "<user>hi<assistant>ho"


def test_rows_with_turns_and_a_text() -> None:
    """Data for instruction tuning often have both; where only answers are learned, it is the turns that tell."""
    tokenizer = Letters()
    tokenizer.chat_template = "something"
    turns = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    asked = {"prompt": "hi", "completion": "ho"}
    for row, text, answers in ((turns, "<user>hi<assistant>ho", ((19, 21),)), (asked, "hiho", ((2, 4),))):
        found = rendered(row | {"text": "written"}, tokenizer, "chats")
        assert (found.text, found.answers) == (text, answers)
        assert rendered(row | {"text": "written"}, tokenizer, "chats", answers=False).text == "written"
    assert rendered(turns, tokenizer, "chats", answers=False).answers is None, "which take as long as the template"
    assert rendered(turns | {"text": "written"}, Letters(), "chats").text == "written", "there is no template"


def test_rows_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 3}', encoding="utf-8")
    with pytest.raises(DataError, match="a row has no text") as caught:
        documents(str(tmp_path / "a.jsonl"))
    assert "body, id" in caught.value.why


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{no json", encoding="utf-8")
    with pytest.raises(DataError, match="cannot read the data"):
        documents(str(tmp_path / "a.jsonl"))


def test_what_the_source_writes_are_documents() -> None:
    text = open_text(Part("self"), Letters(), 4, lambda: [[5, 6, END], [7], [8, 9, 3]], evaluation=False)
    # a document of one token predicts nothing; what was cut off gets no end that was not written
    assert list(text.documents()) == [[5, 6, END], [8, 9, 3]]


def numbered(name: str, start: int, count: int, length: int = 7, weight: float = 1.0) -> Text:
    def made() -> Iterator[list[int]]:
        return ([start + 100 * number + place for place in range(length)] for number in range(count))

    return Text(Part(name, weight), made)


def test_held_out_windows_are_never_trained_on() -> None:
    text = numbered("a", 1000, 6)
    text.hold_out(2, 8)
    kept = {token for window in text.heldout for token in window.ids}
    assert len(text.heldout) == 2 and text.skipped == 3
    trained = {token for document in islice(text.endless(), 20) for token in document}
    assert trained and not kept & trained


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_little_to_hold_out_and_train(count: int) -> None:
    with pytest.raises(DataError, match="the text is too short"):
        numbered("a", 1000, count).hold_out(2, 8)


def test_what_is_watched_alone_may_end_with_its_windows() -> None:
    with pytest.raises(DataError, match="the text is too short") as caught:
        numbered("a", 1000, 2).hold_out(2, 8, is_trained_on=False)
    assert "train on" not in caught.value.why
    text = numbered("a", 1000, 3)
    text.hold_out(2, 8, is_trained_on=False)
    assert len(text.heldout) == 2 and text.skipped == 3


def test_weights_are_shares_of_tokens_not_of_documents() -> None:
    texts = [numbered("short", 0, 5, length=4, weight=3), numbered("long", 10000, 5, length=90)]
    for text in texts:
        text.hold_out(1, 4)
    counts = [0, 0]
    for document in islice(mixed(texts, seed=0), 2000):
        counts[document[0] >= 10000] += len(document)
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.05)


def test_seeds_are_orders() -> None:
    def order(seed: int) -> list[int]:
        texts = [numbered("a", 0, 5), numbered("b", 10000, 5)]
        return [document[0] for document in islice(mixed(texts, seed), 8)]

    assert order(0) == order(0) and len({tuple(order(seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize("answer", ["hello", "<hello", "<think>no"])
def test_a_thought_that_is_asked_for_need_not_be_there(answer: str) -> None:
    """As with DeepSeek-R1's distilled models: the prompt opens a thought, and what was said before has none."""

    class Thinks(Letters):
        chat_template = "something"

        def apply_chat_template(self, messages: Any, *args: Any, add_generation_prompt: bool = False, **_: Any) -> str:
            text = "".join(f"[{one['role'][0]}]{one['content']}" for one in messages)
            return text + ("[a]<think>\n" if add_generation_prompt else "")

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}] * 2
    found = rendered({"messages": messages}, Thinks(), "chats")
    assert found.answers is not None and len(found.answers) == 2
    for start, end in found.answers:
        # what an answer has in common with the thought that was asked for is not told from it
        missed = len(found.text[:end].rpartition("[a]")[2]) - (end - start)
        assert found.text[:end].endswith(answer) and 0 <= missed <= len("<think>")


def test_templates_that_want_parts_of_a_message() -> None:
    """Of models that see: a string has no parts, and nothing of it would be there, without an error."""

    class Sees(Letters):
        chat_template = "something"

        def apply_chat_template(self, messages: Any, *args: Any, add_generation_prompt: bool = False, **_: Any) -> str:
            text = ""
            for one in messages:
                parts = [part["text"] for part in one["content"] if isinstance(part, dict) and part["type"] == "text"]
                text += f"[{one['role'][0]}]{''.join(parts)}"
            return text + ("[a]" if add_generation_prompt else "")

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    found = rendered({"messages": messages}, Sees(), "chats")
    assert (found.text, found.answers) == ("[u]hi[a]ho", ((8, 10),))


def test_an_answer_has_no_heading_that_was_not_asked_for() -> None:
    class Differs(Letters):
        chat_template = "something"

        def apply_chat_template(self, messages: Any, *args: Any, add_generation_prompt: bool = False, **_: Any) -> str:
            text = "".join(f"[{one['role'][0]}]{one['content']}" for one in messages)
            return text + ("# answer:" if add_generation_prompt else "")

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert rendered({"messages": messages}, Differs(), "chats").answers == ()


def test_chats_in_a_file_of_strings(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], [json.dumps(messages)]])
    tokenizer = Letters()
    tokenizer.chat_template = "something"
    (found,) = documents(str(tmp_path / "a.csv"), tokenizer)
    assert found == [*map(ord, "<user>hi<assistant>ho"), END]


def test_windows_survive_the_disk(tmp_path: Path) -> None:
    rows = list(islice(pack(([1, 2, 3, 40000 + n] for n in range(100)), 6), 5))
    write_windows(tmp_path / "w.npy", iter(rows), 5, 6, lambda *_: None, "pack")
    found = Windows(tmp_path / "w.npy", first=7)
    assert len(found) == 5 and [path.name for path in tmp_path.iterdir()] == ["w.npy"]
    for number, row in enumerate(rows):
        item = found[number]
        assert item["input_ids"].tolist() == row.ids and item["position_ids"].tolist() == row.positions
        assert item["labels"].tolist() == row.labels and IGNORED in row.labels
        assert int(item["index"]) == 7 + number and item["labels"].dtype == torch.int64
    assert np.load(tmp_path / "w.npy").dtype == np.int32


def test_only_answers_are_learned(tmp_path: Path) -> None:
    """Exactly what the assistant says, to the end of its turn; text without turns counts whole."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("stories260k").path)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    turns = [("user", "Hello there"), ("assistant", "Once upon a time"), ("user", "Go on"), ("assistant", "The end.")]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": role, "content": content} for role, content in turns]},
        {"prompt": "Lily was ", "completion": "very happy."},
        {"text": "The dog ran to the park."},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")

    def learned(completion_only: bool) -> list[str]:
        text = open_text(
            Part(str(tmp_path / "a.jsonl")), tokenizer, 64, nothing, evaluation=False, completion_only=completion_only
        )
        found = []
        for document in text.documents():
            (window,) = pack([document], len(document))
            labels = [label for label in window.labels if label != IGNORED]
            assert labels[-1] == tokenizer.eos_token_id
            found.append(tokenizer.decode(labels, skip_special_tokens=True))
        return found

    chat, completion, plain = learned(True)
    # the space before a word is in its token
    assert chat == "Once upon a time\n The end.\n" and completion == "very happy." and "dog ran" in plain
    whole = learned(False)
    assert "Hello there" in whole[0] and "Lily was very happy." in whole[1] and whole[2] == plain


@pytest.mark.parametrize("adds", [False, True])
def test_the_end_of_an_answer_is_learned_whoever_adds_it(tmp_path: Path, adds: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("stories260k").path)
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (begin, end)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}" if adds else f"{begin} $A", special_tokens=special
    )
    (tmp_path / "a.jsonl").write_text('{"prompt": "Lily was ", "completion": "very happy."}', encoding="utf-8")
    text = open_text(
        Part(str(tmp_path / "a.jsonl")), tokenizer, 64, nothing, evaluation=False, completion_only=True
    )  # fmt: skip
    (document,) = text.documents()
    assert isinstance(document, Answered) and [document[0], document[-1]] == [token for _, token in special]
    assert document.count(document[-1]) == 1 and document.learned[-2:] == [True, True] and not document.learned[0]


@pytest.mark.parametrize("answers", [0, 3, 10])
def test_rows_that_teach_nothing_are_not_left_to_train_on(answers: int) -> None:
    """They would be read for ever, and no window come of them."""
    rows = [Answered([3] * 8, [False] * 6 + [number < answers] * 2) for number in range(10)]
    text = Text(Part("chats"), lambda: iter(rows))
    if answers == 10:
        text.hold_out(2, 8)
        assert len(text.heldout) == 2
        return
    with pytest.raises(DataError, match="too short") as caught:
        text.hold_out(3, 8)
    assert "rows without an answer do not count" in caught.value.why


def test_windows_without_an_answer_are_left_out() -> None:
    asked = Answered([3] * 6 + [4] * 2, [False] * 6 + [True] * 2)
    windows = list(pack([asked, [5, 6, 7, 8]], 4))
    assert [window.ids for window in windows] == [[3, 3, 4, 4], [5, 6, 7, 8]]
    assert windows[0].labels == [IGNORED, 4, 4, IGNORED]
