"""Worked problems of school mathematics, made by rules: as many as one likes, each with its steps and a right answer.

What converted models lose first is arithmetic with steps, and no text that ships has any. They are made, not kept: the
same seed makes the same problems everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from typing import Any

NAME = "maths"
# problems of the shipped text: about a million tokens
PROBLEMS, SEED = 12_000, 0

_NAMES = ("Ana", "Ben", "Chloe", "David", "Ella", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kemal", "Lena")
_THINGS = ("apples", "pencils", "stickers", "marbles", "books", "tickets", "eggs", "stamps", "cards", "cups")


def problems(seed: int = SEED) -> Iterator[tuple[str, str]]:
    """Endless: (question, answer)."""
    draw = random.Random(seed)
    while True:
        yield draw.choice(_KINDS)(draw)


def rows(count: int = PROBLEMS) -> Iterator[dict[str, Any]]:
    """The first problems as chats: `messages` of a user and an assistant."""
    for question, answer in islice(problems(), count):
        turns = (("user", question), ("assistant", answer))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def text(max_characters: int) -> str:
    """The first problems as plain text."""
    written: list[str] = []
    length = 0
    for question, answer in islice(problems(), PROBLEMS):
        written.append(f"Question: {question}\nAnswer: {answer}")
        length += len(written[-1]) + 2
        if length > max_characters:
            break
    return "\n\n".join(written)[:max_characters]


def _sum(draw: random.Random) -> tuple[str, str]:
    who, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    had, got, gave = draw.randrange(12, 90), draw.randrange(5, 60), draw.randrange(2, 12)
    more = had + got
    return (
        f"{who} has {had} {thing}. {who} gets {got} more and then gives {gave} away. How many {thing} are left?",
        f"At first there are {had} {thing}. With {got} more there are {had} + {got} = {more}. "
        f"After giving {gave} away, {more} - {gave} = {more - gave} are left. The answer is {more - gave}.",
    )


def _product(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(12, 99), draw.randrange(3, 99)
    tens, ones = b // 10 * 10, b % 10
    steps = f"{b} is {tens} + {ones}. {a} × {tens} = {a * tens}, and {a} × {ones} = {a * ones}. "
    steps += f"Together that is {a * tens} + {a * ones} = {a * b}. "
    return f"What is {a} × {b}?", (steps if tens and ones else "") + f"{a} × {b} = {a * b}."


def _share(draw: random.Random) -> tuple[str, str]:
    percent, whole = 5 * draw.randrange(1, 19), 20 * draw.randrange(2, 60)
    part = percent * whole // 100
    return (
        f"What is {percent} % of {whole}? Explain how you get there.",
        f"One percent of {whole} is {whole} / 100 = {whole / 100:g}. {percent} percent are {percent} times as much: "
        f"{percent} × {whole / 100:g} = {part}. So {percent} % of {whole} is {part}.",
    )


def _equation(draw: random.Random) -> tuple[str, str]:
    factor, x, added = draw.randrange(2, 13), draw.randrange(-9, 20), draw.randrange(1, 30)
    total = factor * x + added
    return (
        f"Solve for x: {factor}x + {added} = {total}",
        f"Subtract {added} from both sides: {factor}x = {total} - {added} = {total - added}. "
        f"Divide both sides by {factor}: x = {total - added} / {factor} = {x}.",
    )


def _price(draw: random.Random) -> tuple[str, str]:
    thing, few, each, times = draw.choice(_THINGS), draw.randrange(2, 7), draw.randrange(1, 9), draw.randrange(2, 9)
    return (
        f"A shop sells {few} {thing} for {few * each} euros. How much do {few * times} {thing} cost?",
        f"{few * times} {thing} are {few * times} / {few} = {times} times as many as {few}. "
        f"So they cost {times} × {few * each} = {times * few * each} euros.",
    )


def _duration(draw: random.Random) -> tuple[str, str]:
    start, length = draw.randrange(6 * 60, 15 * 60), draw.randrange(25, 400)
    end, to_hour = start + length, -start % 60
    hours, minutes = divmod(length, 60)
    shown = f"{hours} hours and {minutes} minutes"
    if to_hour and to_hour < length:
        rest_hours, rest = divmod(length - to_hour, 60)
        steps = f"From {_clock(start)} to {_clock(start + to_hour)} it takes {to_hour} minutes. "
        steps += f"From there to {_clock(end)} it takes {rest_hours} hours and {rest} minutes. "
    else:
        steps = ""
    return (
        f"A train leaves at {_clock(start)} and arrives at {_clock(end)}. How long does the journey take?",
        f"{steps}Altogether the journey takes {shown}.",
    )


def _clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def _mean(draw: random.Random) -> tuple[str, str]:
    count, mean = draw.randrange(3, 6), draw.randrange(5, 40)
    values = [mean + draw.randrange(-4, 5) for _ in range(count - 1)]
    values.append(count * mean - sum(values))
    return (
        f"What is the average of {', '.join(map(str, values))}?",
        f"The sum is {' + '.join(map(str, values))} = {count * mean}. There are {count} numbers, so the average is "
        f"{count * mean} / {count} = {mean}.",
    )


def _area(draw: random.Random) -> tuple[str, str]:
    width, length = draw.randrange(3, 25), draw.randrange(5, 40)
    return (
        f"A garden is {length} metres long and {width} metres wide. What are its area and its perimeter?",
        f"The area is {length} × {width} = {length * width} square metres. The perimeter is 2 × ({length} + {width}) = "
        f"2 × {length + width} = {2 * (length + width)} metres.",
    )


def _fractions(draw: random.Random) -> tuple[str, str]:
    one, two = (Fraction(draw.randrange(1, bottom), bottom) for bottom in (draw.randrange(2, 9), draw.randrange(2, 9)))
    below = one.denominator * two.denominator
    tops = [one.numerator * two.denominator, two.numerator * one.denominator]
    total = one + two
    short = "" if Fraction(sum(tops), below).denominator == below else f", which is {total}"
    return (
        f"What is {one} + {two}?",
        f"A common denominator is {one.denominator} × {two.denominator} = {below}. {one} = {tops[0]}/{below} and "
        f"{two} = {tops[1]}/{below}. The sum is {sum(tops)}/{below}{short}.",
    )


_KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _sum, _product, _share, _equation, _price, _duration, _mean, _area, _fractions,
)  # fmt: skip
