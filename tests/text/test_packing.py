"""Packing: every token once, no label across documents, and through a model no token sees another document."""

import random

import pytest
import torch

from tests.families import lively_config, lively_model
from transmla.text.packing import IGNORED, pack


def documents(seed: int, count: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 500) for _ in range(draw.choice([1, 2, 3, 9, 30, 70]))] for _ in range(count)]


@pytest.mark.parametrize("length", [8, 32])
def test_every_token_once_and_in_order(length: int) -> None:
    given = documents(1)
    windows = list(pack(given, length))
    assert all(len(w.ids) == len(w.positions) == len(w.labels) == length for w in windows)
    flat = [token for window in windows for token in window.ids]
    # single tokens are left out, and so is a token that would start a window alone, behind a cut
    wanted: list[int] = []
    for document in given:
        start = 0
        while len(document) - start > 1:
            room = length - len(wanted) % length
            wanted += document[start : start + room]
            start += room
    assert flat == wanted[: len(flat)] and len(wanted) - len(flat) < length


def test_labels_are_the_next_token_of_the_same_document() -> None:
    for window in pack([list(range(100, 110)), list(range(200, 203)), list(range(300, 330))], 12):
        for place, (token, label) in enumerate(zip(window.ids, window.labels, strict=True)):
            assert label == (IGNORED if token in (109, 202, 329) else token + 1)
            following = window.positions[place + 1] if place < 11 else 0
            assert following in (0, window.positions[place] + 1)
            assert window.positions[place] == 0 or window.ids[place - 1] == token - 1


def test_no_token_sees_another_document() -> None:
    model = lively_model(lively_config())
    texts = [text for text in documents(2) if len(text) > 1]
    window = max(pack(texts, 64), key=lambda window: window.positions.count(0))
    starts = [place for place, position in enumerate(window.positions) if position == 0]
    assert len(starts) > 3
    with torch.no_grad():
        packed = model(
            torch.tensor([window.ids]), position_ids=torch.tensor([window.positions]), use_cache=False
        ).logits[0]
        for start, end in zip(starts, [*starts[1:], 64], strict=True):
            alone = model(torch.tensor([window.ids[start:end]])).logits[0]
            assert torch.allclose(packed[start:end], alone, atol=1e-4)
        flat = model(torch.tensor([window.ids])).logits[0]
    assert not torch.allclose(packed, flat, atol=0.1), "without positions, documents see each other"
