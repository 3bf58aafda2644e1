"""Text that a model writes."""

import torch

from tests.families import lively_config, lively_model
from transmla.text.decoding import write
from transmla.text.sampling import continue_from, sample_from, sample_texts


def test_sampling_is_repeatable_and_leaves_the_generator_alone() -> None:
    """Texts that end early are followed by the next one, so that every window is full."""
    model = lively_model(lively_config(layers=1, vocab=20))
    state = torch.random.get_rng_state()
    first, again, other = (sample_from(model, 24, 16, seed=seed, batch=2) for seed in (1, 1, 2))
    assert first.shape == (24, 16) and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (first == 2).any(), "no text ended"


def test_texts_end_at_their_end_token_and_nowhere_else() -> None:
    model = lively_model(lively_config(layers=1, vocab=20))
    texts = sample_texts(model, 400, 16, seed=0, batch=8)
    assert sum(map(len, texts)) >= 400 > sum(map(len, texts[:-8]))
    assert all(2 not in text[1:-1] for text in texts)
    assert {text[-1] == 2 for text in texts if len(text) < 16} == {True}
    assert any(len(text) == 16 for text in texts) and all(text[0] == 1 for text in texts[::2])


def test_no_text_is_written_twice() -> None:
    """Batches that begin alike draw other numbers."""
    model = lively_model(lively_config(layers=1, vocab=20))
    begun = [tuple(text) for text in sample_texts(model, 800, 16, seed=0, batch=4)[::2] if len(text) > 8]
    assert len(set(begun)) == len(begun) > 15


def test_samples_follow_the_models_distribution() -> None:
    """One step from one prompt, many times: frequencies are the probabilities."""
    model = lively_model(lively_config(layers=1, vocab=6))
    found = torch.tensor(write(model, [[1, 3, 4]] * 6000, 1, seed=0))
    with torch.no_grad():
        wanted = model(torch.tensor([[1, 3, 4]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(found[:, 0], minlength=6) / 6000
    assert (seen - wanted).abs().max() < 0.02 and wanted.max() < 0.9


def test_continuations_start_with_pieces_of_the_text() -> None:
    model = lively_model(lively_config(layers=1, vocab=20))
    text = torch.randint(3, 20, (4, 300), generator=torch.Generator().manual_seed(2))
    found = continue_from(model, text, 3, seed=0, batch=2)
    assert found.shape == (3, 300) and torch.equal(found, continue_from(model, text, 3, seed=0, batch=2))
    pieces = {tuple(row[start : start + 32].tolist()) for row in text for start in range(268)}
    assert tuple(found[0, :32].tolist()) in pieces
