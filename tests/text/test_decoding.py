"""How a model writes: equal to plain forward passes, for every family and for latents, whatever the batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

import transmla
from tests.families import MakeSource, lively_config, lively_model
from transmla.families import FAMILIES
from transmla.model.loading import load
from transmla.text import decoding
from transmla.text.decoding import BYTES_AT_ONCE, MOST_AT_ONCE, draw, random_numbers, texts_at_once, write

PROMPTS = [[1, 5, 9, 300, 17, 44], [1, 7], [1, 8, 30], [250, 251, 252, 253]]


def plainly(model: Any, prompt: list[int], new_tokens: int, end: int = 2) -> list[int]:
    """Greedy, without a cache and one text at a time."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + new_tokens and (len(ids) == len(prompt) or ids[-1] != end):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_greedy_text_is_that_of_plain_forward_passes(model_type: str) -> None:
    """Prompts of several lengths, more tokens than a sliding window and than a block of the cache hold."""
    model = lively_model(lively_config(layers=2, model_type=model_type)).double()
    model.set_experts_implementation("eager")  # the others have no float64
    before = model.config._attn_implementation
    with torch.no_grad():  # far from a tie
        model.get_output_embeddings().weight.mul_(3)
    found = write(model, PROMPTS, 30, greedy=True, batch=3)
    assert found == [plainly(model, prompt, 30) for prompt in PROMPTS]
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("kind", "model_type"), [("deepseek_v3", "llama"), ("transmla", "llama"), ("transmla", "gemma2")]
)
def test_a_converted_model_writes_what_its_forward_says(
    lively: MakeSource, text_file: Path, tmp_path: Path, kind: str, model_type: str
) -> None:
    """Also where the source's own class has no fused attention, as that of Gemma 2."""
    transmla.convert(
        str(lively(model_type=model_type)), tmp_path / "mla", latent=12, rope=4, refine="off",
        calibration=str(text_file), tokens=1024, window=64, theta=100.0, format=kind,
    )  # fmt: skip
    model = load(tmp_path / "mla").double()
    assert write(model, PROMPTS, 40, greedy=True) == [plainly(model, prompt, 40) for prompt in PROMPTS]
    assert model.config._attn_implementation == "sdpa"


def test_a_text_depends_on_its_number_and_not_on_the_others() -> None:
    model = lively_model(lively_config(layers=1, vocab=20)).double()
    prompts = [[1, 3 + number] for number in range(9)]
    whole = write(model, prompts, 30, seed=3)
    assert write(model, prompts, 30, seed=3, batch=2) == whole
    assert write(model, prompts[4:6], 30, seed=3, first=4) == whole[4:6]
    assert write(model, prompts[4:6], 30, seed=3) != whole[4:6] and write(model, prompts, 30, seed=4) != whole
    assert any(text[-1] == 2 and len(text) < 30 for text in whole) and all(2 not in text[:-1] for text in whole)


def test_texts_that_ended_leave_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a batch is written as if it had been alone."""
    model = lively_model(lively_config(layers=1, vocab=12)).double()
    prompts = [[1, 3 + number % 8] for number in range(32)]
    kept: list[int] = []
    real = decoding.GrowingLayer.keep
    monkeypatch.setattr(decoding.GrowingLayer, "keep", lambda self, rows: (kept.append(len(rows)), real(self, rows))[1])
    whole = write(model, prompts, 60, seed=1)
    assert len(kept) >= 2 and kept[0] <= 16
    assert [write(model, [prompt], 60, seed=1, first=at)[0] for at, prompt in enumerate(prompts)] == whole


@pytest.mark.parametrize("vocabulary", [6, 256, 700])
def test_draws_invert_the_cumulated_probabilities(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(100, vocabulary, generator=generator)
    logits[:, 3] = -torch.inf
    drawn = torch.rand(100, generator=generator, dtype=torch.float64)
    drawn[:2] = torch.tensor([0.0, 1.0 - 1e-16])
    found = draw(logits, drawn)
    sums = logits.double().softmax(-1).cumsum(-1)
    rows = torch.arange(100)
    below = torch.where(found > 0, sums[rows, found - 1], 0.0)
    assert ((below - 1e-5 <= drawn) & (drawn <= sums[rows, found] + 1e-5)).all()
    assert logits[rows, found].isfinite().all() and len(found.unique()) > vocabulary // 20
    assert torch.equal(draw(logits, torch.full((100,), 1.0, dtype=torch.float64)).isfinite(), rows >= 0)


def test_random_numbers_of_a_text() -> None:
    whole = random_numbers(5, 0, 4, 6)
    assert torch.equal(random_numbers(5, 2, 2, 6), whole[2:]) and not torch.equal(random_numbers(6, 2, 2, 6), whole[2:])
    assert len(whole.unique()) == 24 and torch.equal(random_numbers(-1, 0, 1, 3), random_numbers(-1, 0, 1, 3))


def test_a_large_cache_holds_few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(lively_config(layers=1))
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 2**40)
    per_token = 4 * 2 * model.config.num_key_value_heads * model.config.head_dim
    length = 2**16
    wanted = BYTES_AT_ONCE // (per_token * length + 2 * 4 * 512)
    assert texts_at_once(model, length) == wanted < MOST_AT_ONCE == texts_at_once(model, 16)
    # three quarters of the bound are free twice: it is halved once, and not cut to what is free
    monkeypatch.setattr(decoding, "free_bytes", lambda device: BYTES_AT_ONCE * 3 // 2)
    assert texts_at_once(model, length) == BYTES_AT_ONCE // 2 // (per_token * length + 2 * 4 * 512)
    assert texts_at_once(model, BYTES_AT_ONCE) == 1


def test_cache_of_a_class_without_key_value_heads_of_its_own() -> None:
    """GPT-NeoX caches all heads, and its config has no number of them."""
    config = lively_config(model_type="gpt_neox", hidden=72)
    del config.num_key_value_heads
    assert texts_at_once(lively_model(config), 16) == MOST_AT_ONCE
