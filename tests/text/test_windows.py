"""Text to windows of tokens."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import lively_config, lively_model
from transmla.errors import DataError
from transmla.model.loading import load_tokenizer
from transmla.recipe import find_recipe, load_recipe
from transmla.text.mixes import needs_source, parse_mix
from transmla.text.sampling import (
    BYTES_AT_ONCE,
    MOST_AT_ONCE,
    continue_from,
    sample,
    sample_from,
    sample_texts,
    texts_at_once,
)
from transmla.text.sources import read_text
from transmla.text.windows import calibration_tokens, skipping_windows, spread_positions, windows, with_sampled


def test_shares_of_a_mix(tmp_path: Path) -> None:
    for letter, name in (("a", "one.txt"), ("b", "two.txt")):
        (tmp_path / name).write_text(letter * 1000, encoding="utf-8")
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    for mix, share in ((f"{one}+{two}", 10), (f"{one}:3+{two}", 15), (f"{one}:3+{two}:1", 15)):
        found = calibration_tokens(mix, Letters(), 200, 10)
        windows_of_one = int((found.ids_NT[:, 1] == ord("a")).sum())
        assert (len(found.ids_NT), windows_of_one, found.name) == (20, share, mix)
    assert calibration_tokens(f"{one}:7", Letters(), 200, 10).ids_NT.shape == (20, 10)
    with pytest.raises(DataError, match="not a mix"):
        calibration_tokens(f"{one}:0+{two}", Letters(), 200, 10)


def test_a_file_with_a_plus_in_its_path(tmp_path: Path) -> None:
    path = tmp_path / "c++" / "x.txt"
    path.parent.mkdir()
    path.write_text("a" * 1000, encoding="utf-8")
    assert calibration_tokens(str(path), Letters(), 200, 10).name == str(path)
    assert len(parse_mix("+".join(["wikitext"] * 100), "here")) == 100, "too long for the name of a file"


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


class Letters:
    """A tokenizer: one token a letter, token 1 at the beginning."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        ids = [1] * add_special_tokens + [ord(letter) for letter in text]
        return type("Encoding", (), {"input_ids": ids})


def test_windows_are_spread_over_the_text() -> None:
    found = windows(list(range(100)), 30, 10, name="text")
    assert found.ids_NT.tolist() == [list(range(start, start + 10)) for start in (0, 40, 90)]


def test_there_are_never_more_windows_than_text() -> None:
    assert windows(list(range(35)), 1000, 10, name="text").ids_NT.shape == (3, 10)


def test_at_least_two_windows() -> None:
    assert windows(list(range(40)), 5, 10, name="text").ids_NT.shape == (2, 10)
    with pytest.raises(DataError, match="too short: 19 tokens") as caught:
        windows(list(range(19)), 5, 10, name="text")
    assert caught.value.where == "text" and "shorter windows" in caught.value.remedy


def test_every_second_window_starts_with_the_begin_token() -> None:
    ids_NT = windows(list(range(100, 150)), 50, 10, name="text", prefix=[1]).ids_NT
    assert ids_NT[:, 0].tolist() == [1, 110, 1, 130, 1]
    assert ids_NT[:, 1].tolist() == [101, 111, 121, 131, 141]


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


def test_sampling_is_repeatable_and_leaves_the_generator_alone() -> None:
    """Texts that end early are followed by the next one, so that every window is full."""
    model = lively_model(lively_config(layers=1, vocab=20))
    state = torch.random.get_rng_state()
    first, again, other = (sample_from(model, 3, 16, seed=seed, batch=2) for seed in (1, 1, 2))
    assert first.shape == (3, 16) and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (first == 2).any(), "no text ended"


def test_texts_end_at_their_end_token_and_nowhere_else() -> None:
    model = lively_model(lively_config(layers=1, vocab=20))
    texts = sample_texts(model, 400, 16, seed=0, batch=8)
    assert sum(map(len, texts)) >= 400 > sum(map(len, texts[:-8]))
    assert all(2 not in text[1:-1] for text in texts)
    assert {text[-1] == 2 for text in texts if len(text) < 16} == {True}
    assert any(len(text) == 16 for text in texts) and all(text[0] == 1 for text in texts[::2])


def test_a_large_cache_holds_few_texts() -> None:
    model = lively_model(lively_config(layers=1))
    per_text = 4 * 2 * model.config.num_key_value_heads * model.config.head_dim * 2**16 + 12 * 512
    assert texts_at_once(model, 2**16) == BYTES_AT_ONCE // per_text < MOST_AT_ONCE == texts_at_once(model, 16)
    assert texts_at_once(model, BYTES_AT_ONCE) == 1


def test_samples_follow_the_models_distribution() -> None:
    """One step from one prompt, many times: frequencies are the probabilities."""
    model = lively_model(lively_config(layers=1, vocab=6))
    prompt = torch.tensor([[1, 3, 4]]).expand(6000, -1)
    found = sample(model, prompt, 4, torch.Generator().manual_seed(0))
    assert torch.equal(found[:, :3], prompt)
    with torch.no_grad():
        wanted = model(prompt[:1]).logits[0, -1].softmax(-1)
    seen = torch.bincount(found[:, 3], minlength=6) / 6000
    assert (seen - wanted).abs().max() < 0.02 and wanted.max() < 0.9


def test_every_sampled_token_was_conditioned_on_all_before() -> None:
    """With a model that is all but certain, sampling is greedy decoding."""
    model = lively_model(lively_config(layers=2, vocab=50))
    with torch.no_grad():
        model.lm_head.weight *= 300
    prompt = torch.randint(3, 50, (2, 5), generator=torch.Generator().manual_seed(4))
    found = sample(model, prompt, 12, torch.Generator().manual_seed(0))
    ids = prompt
    with torch.no_grad():
        for _ in range(7):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


def test_continuations_start_with_pieces_of_the_text() -> None:
    model = lively_model(lively_config(layers=1, vocab=20))
    text = torch.randint(3, 20, (4, 300), generator=torch.Generator().manual_seed(2))
    found = continue_from(model, text, 3, seed=0, batch=2)
    assert found.shape == (3, 300) and torch.equal(found, continue_from(model, text, 3, seed=0, batch=2))
    pieces = {tuple(row[start : start + 32].tolist()) for row in text for start in range(268)}
    assert tuple(found[0, :32].tolist()) in pieces


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


def test_shipped_text() -> None:
    text = read_text("wikitext", 500)
    assert len(text) == 500 and " the " in text


def test_the_stories_of_the_model_that_ships() -> None:
    """What the README's first command calibrates on: read from a file, so the same tokens on every machine; enough of
    them for its recipe; and none of the text that it is measured on."""
    recipe = load_recipe(find_recipe("stories260k"))
    assert recipe.calibration == "stories" and not needs_source(recipe.calibration, recipe.sampled)
    assert recipe.evaluation == "tinystories-valid"
    tokenizer = load_tokenizer("stories260k")
    found = calibration_tokens(recipe.calibration, tokenizer, recipe.num_tokens, recipe.window)
    assert found.ids_NT.shape == (64, 512) and found.name == "stories"
    assert found.digest == "efef7fc577f1e7a29ce44ab0bb0b502a8814482d431e1dbec0c69d0bd74cd4de"
    unknown = tokenizer.unk_token_id
    assert unknown is not None and not (found.ids_NT == unknown).any()
    text, valid = read_text("stories", 10**9), read_text("tinystories-valid", 10**9, evaluation=True)
    assert len(text.encode()) < 2**18
    # the beginnings of such stories are alike, but no sentence and the next one are
    length = 32
    theirs, ours = valid.split(), text.split()
    pieces = {tuple(theirs[place : place + length]) for place in range(len(theirs) - length + 1)}
    assert not any(tuple(ours[place : place + length]) in pieces for place in range(len(ours) - length + 1))


def test_plain_file(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("größer\n" * 10, encoding="utf-8")
    assert read_text(str(tmp_path / "a.md"), 14) == "größer\n" * 2


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_table_by_its_text_column(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    if suffix == ".csv":
        path.write_text("other,text\n1,one\n2,two\n3,three\n", encoding="utf-8")
    else:
        rows = [{"other": number, "text": text} for number, text in enumerate(("one", "two", "three"))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_text(str(path), 100) == "one\n\ntwo\n\nthree"
    if suffix == ".jsonl":  # datasets leaves a CSV file open that is not read to its end
        assert read_text(str(path), 8) == "one\n\ntwo"


def test_texts_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"gr\xf6sser")
    (tmp_path / "no_column.jsonl").write_text('{"words": "one"}\n', encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text("{", encoding="utf-8")
    cases = {
        "nothing": "no text 'nothing'",
        str(tmp_path): "no text",
        str(tmp_path / "latin.txt"): "cannot read the text file",
        str(tmp_path / "no_column.jsonl"): "cannot read the dataset",
        str(tmp_path / "broken.jsonl"): "cannot read the dataset",
        str(tmp_path / "absent.txt"): "cannot read the dataset",
    }
    for name, what in cases.items():
        with pytest.raises(DataError, match=what) as caught:
            read_text(name, 100)
        assert caught.value.where == name and caught.value.exit_code == 7
