"""Text to windows of tokens."""

import hashlib
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.text.letters import Letters
from transmla.errors import DataError
from transmla.text.windows import (
    begin_tokens,
    calibration_tokens,
    skipping_windows,
    spread_positions,
    windows,
    with_begin,
    with_sampled,
)


def test_without_room_there_are_no_gaps() -> None:
    for context in (1, 64):
        assert torch.equal(spread_positions(torch.ones(5).bool(), 64, context, 0), torch.arange(64).expand(5, 64))


def test_half_of_the_windows_have_one_gap() -> None:
    skipping_N = skipping_windows(400, 8, 0)
    positions_NT = spread_positions(skipping_N, 64, 1000, 0)
    steps_NT = positions_NT.diff()
    gaps_N = (steps_NT - 1).sum(1)
    assert torch.equal(positions_NT[:, 0], torch.zeros(400).long()) and positions_NT.max() <= 999
    assert ((steps_NT > 1).sum(1) <= 1).all() and (steps_NT >= 1).all()
    assert torch.equal(gaps_N > 0, skipping_N) and 150 < int(skipping_N.sum()) < 250 and not skipping_N[-8:].any()
    assert int(gaps_N[gaps_N > 0].min()) >= 16 and gaps_N.max() <= 936
    assert 60 < float(gaps_N[gaps_N > 0].double().median()) < 250  # the logarithm is uniform: 122
    starts = steps_NT.argmax(1)[gaps_N > 0] + 1
    assert starts.min() >= 16 and starts.max() < 48
    assert torch.equal(spread_positions(skipping_N, 64, 1000, 0), positions_NT)
    assert not torch.equal(spread_positions(skipping_N, 64, 1000, 1), positions_NT)
    assert not torch.equal(skipping_windows(400, 8, 1), skipping_N)


def test_a_context_hardly_larger_than_the_window() -> None:
    assert spread_positions(torch.ones(50).bool(), 64, 65, 0).max() == 64
    assert torch.equal(spread_positions(torch.ones(50).bool(), 1, 9, 0), torch.zeros(50, 1).long())


def test_windows_are_spread_over_the_text() -> None:
    found = windows(list(range(100)), 30, 10, name="text")
    assert found.ids_NT.tolist() == [list(range(start, start + 10)) for start in (0, 40, 90)]


def test_there_are_never_more_windows_than_text() -> None:
    assert windows(list(range(35)), 1000, 10, name="text").ids_NT.shape == (3, 10)


def test_at_least_two_windows() -> None:
    assert windows(list(range(40)), 5, 10, name="text").ids_NT.shape == (2, 10)
    with pytest.raises(DataError, match=r"too short: 19 tokens(.|\n)*--window") as caught:
        windows(list(range(19)), 5, 10, name="text")
    assert caught.value.where == "text" and "shorter windows" in caught.value.remedy


def test_every_second_window_starts_with_the_begin_token() -> None:
    ids_NT = windows(list(range(100, 150)), 50, 10, name="text", prefix=[1]).ids_NT
    assert ids_NT[:, 0].tolist() == [1, 110, 1, 130, 1]
    assert ids_NT[:, 1].tolist() == [101, 111, 121, 131, 141]


class Marks(Letters):
    """Two tokens before, as GLM-4 has them, and one behind."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        ids = [ord(letter) for letter in text]
        return type("Encoding", (), {"input_ids": [1, 2, *ids, 3] if add_special_tokens else ids})


class Ended(Letters):
    """One token behind and none before."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        ids = [ord(letter) for letter in text]
        return type("Encoding", (), {"input_ids": [*ids, 3] if add_special_tokens else ids})


def test_what_tokenizers_put_first() -> None:
    assert [begin_tokens(one) for one in (Letters(), Marks(), Ended())] == [(1,), (1, 2), ()]
    ids_NT = torch.arange(10, 30).view(2, 10)
    assert with_begin(ids_NT, (1, 2))[1].tolist() == [1, 2, *range(22, 30)]
    assert torch.equal(with_begin(ids_NT, ()), ids_NT) and ids_NT[0, 0] == 10


@pytest.mark.parametrize(("begin", "starts"), [("half", "1b1d"), ("all", "1111"), ("none", "abcd")])
def test_which_windows_begin(tmp_path: Path, begin: str, starts: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(letter * 10 for letter in "abcd"), encoding="utf-8")
    ids_NT = calibration_tokens(str(path), Letters(), 40, 10, begin=begin).ids_NT
    assert "".join("1" if first == 1 else chr(first) for first in ids_NT[:, 0].tolist()) == starts
    assert [chr(one) for one in ids_NT[:, 1].tolist()] == list("abcd")
    sampled = calibration_tokens(
        "self", Letters(), 40, 10, sampler=lambda n, t: torch.full((n, t), 7), begin=begin
    )  # fmt: skip
    assert sampled.ids_NT[:, 0].tolist() == ([1] * 4 if begin == "all" else [7] * 4)


def test_tokens_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 10, encoding="utf-8")
    found = calibration_tokens(str(path), Letters(), 40, 10)
    assert found.ids_NT.shape == (4, 10) and found.name == str(path)
    assert bytes(found.ids_NT[1].tolist()) == b"abcdefghij" and found.ids_NT[0, 0] == 1


def test_few_tokens_of_a_long_text(tmp_path: Path) -> None:
    """Two windows are the least, however few tokens were asked for: enough of the text is read for them."""
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 100, encoding="utf-8")
    assert calibration_tokens(str(path), Letters(), 1, 100).ids_NT.shape == (2, 100)
    assert calibration_tokens(f"{path}+{path}:9", Letters(), 1, 100).ids_NT.shape == (4, 100)


def test_digest_tells_texts_apart(tmp_path: Path) -> None:
    digests = []
    for text in ("abcdefghij" * 10, "abcdefghij" * 10, "abcdefghik" * 10):
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        digests.append(calibration_tokens(str(tmp_path / "text.txt"), Letters(), 40, 10).digest)
    assert digests[0] == digests[1] != digests[2]
    ids = b"\x01bcdefghij" + b"abcdefghij" + b"\x01bcdefghij" + b"abcdefghij"
    assert digests[0] == hashlib.sha256(struct.pack("<40q", *ids)).hexdigest()


def test_tokens_of_the_model_itself() -> None:
    found = calibration_tokens("self", Letters(), 40, 10, sampler=lambda n, t: torch.arange(n * t).view(n, t))
    assert found.ids_NT.shape == (4, 10) and found.name == "self"


def test_sampled_windows_are_never_held_out() -> None:
    text = windows(list(range(1000)), 100, 10, name="text")
    sampled = torch.arange(5000, 5060).view(6, 10)
    text = replace(text, num_heldout=3)
    found = with_sampled(text, sampled)
    assert found.num_heldout == 3
    assert torch.equal(found.ids_NT[-3:], text.ids_NT[-3:]) and len(found.ids_NT) == 16
    kinds = (found.ids_NT[:-3, 0] >= 5000).tolist()
    assert sum(kinds) == 6 and True in kinds[:4] and True in kinds[-4:]
    assert found.name == "text+60 sampled tokens" and found.digest != text.digest
