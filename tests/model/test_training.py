"""Training mode: the warning, gradients with and without checkpointing, dropout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.model.folders import lively_model, tiny_config
from transmla.healing.train import recompute_activations
from transmla.model import modeling_transmla
from transmla.model.modeling_transmla import DeepseekV3ForCausalLM, LatentAttention

Load = Callable[..., Any]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(modeling_transmla.logger, "warning_once", said.append, raising=False)
    return said


def test_training_a_folded_norm_warns(ours: Load, ids: torch.Tensor, warnings: list[str]) -> None:
    model = ours()
    model(ids)
    with torch.no_grad():
        model.train()(ids)
    assert not warnings
    model(ids)
    assert set(warnings) == {warnings[0]} and "for inference" in warnings[0]
    warnings.clear()
    DeepseekV3ForCausalLM(tiny_config(latent_norm_folded=False)).train()(ids)
    assert not warnings


def test_gradient_checkpointing_gives_the_same_gradients(ids: torch.Tensor) -> None:
    config = tiny_config(latent_norm_folded=False)
    gradients = []
    for checkpointing in (False, True):
        model = DeepseekV3ForCausalLM(config)
        model.load_state_dict(lively_model(config).state_dict())
        model.train()
        if checkpointing:
            recompute_activations(model)
        model(ids, labels=ids, use_cache=not checkpointing).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None and g.abs().max() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_dropout_takes_the_decompressed_route(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentAttention, "absorbed", None)
    model = DeepseekV3ForCausalLM(tiny_config(latent_norm_folded=False, attention_dropout=0.5)).train()
    cache = model(ids[:, :20]).past_key_values
    first = model(ids[:, 20:], past_key_values=cache).logits
    cache.crop(-4)
    assert not torch.equal(model(ids[:, 20:], past_key_values=cache).logits, first)
