"""A layer in pieces computes what the Hugging Face layer computes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conversion.pieces import model_and_layer
from tests.families import LINEAR, LLAMA3, YARN, lively_config
from tests.maths.weights import relative
from transmla.families import FAMILIES
from transmla.geometry import gqa_geometry
from transmla.maths.attention import gqa_attention
from transmla.model.source import SourceLayer, layer_tensor_names, source_config, source_frequencies

ROPES = {"default": None, "linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}


def run(layer: SourceLayer, x_TD: torch.Tensor) -> torch.Tensor:
    x_TD = x_TD + gqa_attention(layer.input_layernorm(x_TD), layer.gqa) @ layer.gqa.o_DHd.T
    return x_TD + layer.mlp(layer.post_attention_layernorm(x_TD))


def stock(model: Any, x_TD: torch.Tensor) -> torch.Tensor:
    angles = model.model.rotary_emb(x_TD[None], torch.arange(len(x_TD))[None])
    with torch.no_grad():
        output: torch.Tensor = model.model.layers[1](x_TD[None], position_embeddings=angles, attention_mask=None)
    return output.view_as(x_TD)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_layer_is_that_of_transformers(model_type: str, rope: str) -> None:
    model, layer = model_and_layer(model_type=model_type, rope=ROPES[rope])
    x_TD = 0.5 * torch.randn(40, 48, generator=torch.Generator().manual_seed(3))
    expected = stock(model, x_TD)
    assert relative(run(layer, x_TD), expected) < 1e-5
    plain = replace(layer, gqa=replace(layer.gqa, inv_freq_P=torch.zeros(6)))
    assert relative(run(plain, x_TD), expected) > 1e-2


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_heads_are_read_in_order(kv_heads: int) -> None:
    model, layer = model_and_layer(kv_heads=kv_heads)
    x_TD = torch.randn(12, 48, generator=torch.Generator().manual_seed(3))
    assert layer.gqa.k_GdD.shape == (kv_heads, 12, 48)
    assert relative(run(layer, x_TD), stock(model, x_TD)) < 1e-5


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_scaled_frequencies_are_those_of_transformers(rope: str) -> None:
    config = lively_config(rope=ROPES[rope])
    geometry = gqa_geometry(config.to_dict(), "config.json")
    found_P, factor = source_frequencies(config, geometry)
    model, layer = model_and_layer(rope=ROPES[rope])
    rotary = model.model.rotary_emb
    assert relative(found_P, rotary.inv_freq) < 1e-6
    assert factor == rotary.attention_scaling and (factor != 1.0) == (rope == "yarn")
    assert layer.gqa.scaling == pytest.approx(12**-0.5 * factor**2)
    plain_P, _ = source_frequencies(lively_config(), geometry)
    assert relative(found_P, plain_P) > 0.01


def test_frequencies_of_a_gguf_file_are_divided_by_its_factors() -> None:
    """There, llama3 scaling is a list of divisors and the rope type says nothing."""
    config = lively_config()
    geometry = gqa_geometry(config.to_dict(), "config.json")
    plain_P, _ = source_frequencies(config, geometry)
    divided_P, factor = source_frequencies(config, geometry, [1.0, 1.0, 2.0, 4.0, 8.0, 8.0])
    assert factor == 1.0
    assert (plain_P / divided_P).tolist() == pytest.approx([1.0, 1.0, 2.0, 4.0, 8.0, 8.0])


def test_everything_but_attention_is_kept_as_it_is() -> None:
    model, layer = model_and_layer()
    state = model.model.layers[1].state_dict()
    assert set(layer.other_tensors) == {name for name in state if "self_attn" not in name}
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.other_tensors.items())


def test_names_and_shapes_of_a_layer() -> None:
    names = layer_tensor_names(FAMILIES["llama"], lively_config(), 2)
    assert names["model.layers.2.self_attn.k_proj.weight"] == (24, 48)
    assert names["model.layers.2.self_attn.o_proj.weight"] == (48, 72)
    assert len(names) == 9


def test_source_config_ignores_code_of_the_checkpoint() -> None:
    values = lively_config().to_dict() | {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "llama"}
    config = source_config(values)
    assert config.model_type == "llama" and not hasattr(config, "auto_map")
