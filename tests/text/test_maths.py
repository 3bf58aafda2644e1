"""Every problem's answer is right, and the text is the same everywhere."""

import hashlib
import re
from fractions import Fraction
from itertools import islice
from typing import Any

from transformers import AutoTokenizer

from transmla.checkpoint.resolve import resolve
from transmla.text import maths
from transmla.text.documents import open_text
from transmla.text.mixes import Part
from transmla.text.sources import read_text


def value(side: str) -> Fraction:
    """Of an expression with + - × / and brackets."""
    assert re.fullmatch(r"[-0-9.+×/() ]+", side), side
    return Fraction(eval(re.sub(r"\d+(\.\d+)?", lambda number: f"Fraction('{number[0]}')", side.replace("×", "*"))))


def test_every_equation_in_every_answer_holds() -> None:
    checked = 0
    for question, answer in islice(maths.problems(3), 2000):
        for phrase in re.split(r"\.(?!\d)|[,:;a-z]", answer):
            sides = [side.strip() for side in phrase.split("=")]
            known = [value(side) for side in sides if re.fullmatch(r"[-0-9.+×/() ]*\d[)]?", side)]
            assert len(set(known)) <= 1, (question, phrase)
            checked += max(0, len(known) - 1)
    assert checked > 3000


def test_answers_answer_the_question() -> None:
    for question, answer in islice(maths.problems(1), 2000):
        numbers = [int(number) for number in re.findall(r"-?\d+", question)]
        if question.startswith("Solve"):
            factor, added, total = numbers[0], numbers[1], numbers[2]
            assert factor * int(answer.rstrip(".").rpartition("= ")[2]) + added == total
        elif question.startswith("A train"):
            (h1, m1), (h2, m2) = numbers[:2], numbers[2:4]
            minutes = 60 * (h2 - h1) + m2 - m1
            assert answer.endswith(f"takes {minutes // 60} hours and {minutes % 60} minutes.")
        elif "cost" in question:
            few, price, many = numbers
            assert answer.endswith(f"= {many * price // few} euros.")


def test_the_same_text_everywhere() -> None:
    text = read_text("maths", 10**9)
    assert text.startswith("Question: ") and len(text) > 2_000_000 and read_text("maths", 1000) == text[:1000]
    assert hashlib.sha256(text[:100_000].encode()).hexdigest() == DIGEST


def test_a_model_with_a_template_gets_chats() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("stories260k").path)
    question, answer = next(maths.problems())

    def first() -> str:
        text: Any = open_text(Part("maths"), tokenizer, 512, list, evaluation=False)
        return str(tokenizer.decode(next(iter(text.documents())), skip_special_tokens=True))

    assert first().startswith(f"Question: {question}"[:40])
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    assert first().replace("\n", "") == f"<user>{question}<assistant>{answer}".replace("\n", "")


DIGEST = "a4751d838462360e92ccb1b75e8a023efd4c33d36240594d4912a74ed009c96b"
