"""Perplexity against ten plain lines, its error against the bootstrap, cache bytes against the tensors."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.families import lively_config, lively_model
from transmla.checkpoint.resolve import resolve
from transmla.errors import DataError, VerificationError
from transmla.evaluation.cache import measured_bytes_per_token
from transmla.evaluation.perplexity import Perplexity, perplexity, ratio, text_windows

STORIES = resolve("stories260k").path


@pytest.fixture(scope="module")
def ids_NT() -> torch.Tensor:
    text = (STORIES.parent / "tinystories-valid.txt").read_text("utf-8")[:20000]
    ids = AutoTokenizer.from_pretrained(STORIES)(text, add_special_tokens=False, verbose=False).input_ids
    return text_windows(ids, 128, 12, "tinystories-valid")


def test_equals_ten_plain_lines(ids_NT: torch.Tensor, device: torch.device) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES).double()
    losses = []
    for window in ids_NT:
        log_probabilities = torch.log_softmax(model(window[None]).logits[0].detach(), dim=-1)
        losses.append(-sum(float(log_probabilities[t, window[t + 1]]) for t in range(127)) / 127)
    mean = sum(losses) / len(losses)
    found = perplexity(model.to(device), ids_NT, batch=5)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-6)
    assert found.nats_N == pytest.approx(losses, rel=1e-6)
    assert found.num_tokens == 12 * 128


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "gpt_neox"])
def test_many_logits_are_made_in_rows(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of heads with scales, caps and biases, too."""
    model = lively_model(lively_config(model_type=model_type)).double()
    ids_NT = torch.randint(3, 512, (3, 50), generator=torch.Generator().manual_seed(1))
    wanted = perplexity(model, ids_NT)
    monkeypatch.setattr("transmla.evaluation.perplexity.MANY_LOGITS", 1000)
    monkeypatch.setattr(type(model), "forward", None)
    told: list[int] = []
    found = perplexity(model, ids_NT, progress=lambda done, total: told.append(done))
    assert found.nats_N == pytest.approx(wanted.nats_N, rel=1e-6) and told == [0, 2, 3]


def test_the_first_tokens_are_not_scored(ids_NT: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES).double()
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(ids_NT[:1]).logits[0], dim=-1)
    wanted = -sum(float(log_probabilities[t, ids_NT[0, t + 1]]) for t in range(2, 127)) / 125
    assert perplexity(model, ids_NT[:1], unscored=3).nats == pytest.approx(wanted, rel=1e-6)


def test_batches_shrink_until_they_fit(ids_NT: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    tried: list[int] = []

    def too_small_a_device(module: object, args: tuple[torch.Tensor], kwargs: object) -> None:
        tried.append(len(args[0]))
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    wanted = perplexity(model, ids_NT, batch=1)
    model.register_forward_pre_hook(too_small_a_device, with_kwargs=True)
    found = perplexity(model, ids_NT, batch=5)
    assert tried == [5, 4, 3, 3, 3, 3] and found.nats_N == pytest.approx(wanted.nats_N, rel=1e-5)
    tried.clear()
    with pytest.raises(RuntimeError, match="batch size"):
        model.register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. "))
        )
        perplexity(model, ids_NT, batch=2)


def test_standard_error_agrees_with_the_bootstrap() -> None:
    generator = torch.Generator().manual_seed(0)
    nats = 3 + 0.2 * torch.randn(400, generator=generator, dtype=torch.float64)
    draws = torch.randint(400, (4000, 400), generator=generator)
    bootstrap = float(nats[draws].mean(1).exp().std())
    found = Perplexity(tuple(nats.tolist()), 400)
    assert found.standard_error == pytest.approx(bootstrap, rel=0.1)


def test_the_ratio_has_the_error_of_the_paired_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    source = 3 + torch.randn(200, generator=generator, dtype=torch.float64)
    model = source + 0.1 + 0.01 * torch.randn(200, generator=generator, dtype=torch.float64)
    found = ratio(Perplexity(tuple(model.tolist()), 1), Perplexity(tuple(source.tolist()), 1))
    assert found.value == pytest.approx(math.exp(0.1), rel=5e-3)
    assert found.standard_error == pytest.approx(math.exp(0.1) * 0.01 / 200**0.5, rel=0.2)
    # far below what unpaired errors would give
    assert found.standard_error < Perplexity(tuple(model.tolist()), 1).standard_error / 20


def test_errors_of_few_windows() -> None:
    """Where the divisor matters: of two windows, half of their difference."""
    source, model = Perplexity((1.0, 1.2), 2), Perplexity((1.1, 1.5), 2)
    assert model.standard_error == pytest.approx(math.exp(1.3) * 0.2)
    found = ratio(model, source)
    assert (found.value, found.standard_error) == pytest.approx((math.exp(0.2), math.exp(0.2) * 0.1))


def test_one_window_has_no_error_and_a_short_text_is_refused() -> None:
    assert math.isnan(Perplexity((1.0,), 10).standard_error)
    with pytest.raises(DataError, match="too short: 9 tokens"):
        text_windows(list(range(9)), 10, 4, "a text")


def test_nan_is_an_error(ids_NT: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(VerificationError, match="NaN"):
        perplexity(model, ids_NT[:2])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_measured_cache_bytes_are_those_of_the_geometry(kv_heads: int) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=10, vocab_size=20,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    assert measured_bytes_per_token(model) == 3 * 2 * kv_heads * 10 * 2
