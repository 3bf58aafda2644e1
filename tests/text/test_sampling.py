"""Text that a model writes."""

import torch

from tests.families import lively_config, lively_model
from transmla.text.sampling import (
    BYTES_AT_ONCE,
    MOST_AT_ONCE,
    continue_from,
    sample,
    sample_from,
    sample_texts,
    texts_at_once,
)


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
