"""The contract with the engines: config values, tensor names and shapes of the stock class."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3ForCausalLM,
    DeepseekV3MLP,
    DeepseekV3RotaryEmbedding,
)

from transmla.geometry import MlaGeometry
from transmla.maths.attention import inverse_frequencies
from transmla.targets.stock import deepseek_v3_config, expected_tensors

TARGET = MlaGeometry(
    num_hidden_layers=3,
    hidden_size=48,
    num_attention_heads=6,
    kv_lora_rank=20,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=14,
)
SOURCE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0},
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": None,
    "sliding_window": 32,
}


@pytest.fixture
def config() -> dict[str, Any]:
    return deepseek_v3_config(SOURCE, TARGET, 5000.0, 256, "bfloat16")


def test_values_that_engines_insist_on(config: dict[str, Any]) -> None:
    required = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        # dense blocks only: llama.cpp aborts on fewer than two experts, vLLM adds to the number
        "first_k_dense_replace": 3,
        "n_routed_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "num_key_value_heads": 6,
        "q_lora_rank": None,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 14,
        # transformers and MLX fix this on the latent norm
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        "rope_theta": 5000.0,
        "max_position_embeddings": 256,
        "attention_bias": False,
        # vLLM and MLX want lm_head written
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "eos_token_id": [2, 3],
        "latent_norm_folded": True,
    }
    assert {key: config[key] for key in required} == required
    assert type(config["n_routed_experts"]) is int


def test_nothing_of_the_source_s_attention_is_left(config: dict[str, Any]) -> None:
    assert not {"head_dim", "sliding_window", "rope_parameters", "mlp_bias"} & config.keys()
    assert "pad_token_id" not in config
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_transmla.DeepseekV3ForCausalLM"}


def test_no_tokens_are_those_that_the_class_has_by_default(config: dict[str, Any]) -> None:
    none = {"bos_token_id": None, "eos_token_id": None}
    for source in (SOURCE | none, {key: value for key, value in SOURCE.items() if key not in none}):
        made = DeepseekV3Config.from_dict(deepseek_v3_config(source, TARGET, 5000.0, 256, "bfloat16"))
        assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (None, None, None)


def test_identity_yarn_changes_nothing(config: dict[str, Any]) -> None:
    scaling = config["rope_scaling"]
    assert scaling["rope_type"] == scaling["type"] == "yarn" and scaling["factor"] == 1.0
    assert scaling["mscale"] == scaling["mscale_all_dim"] == 1.0
    rotary = DeepseekV3RotaryEmbedding(DeepseekV3Config(**config))
    assert torch.allclose(rotary.inv_freq.double(), inverse_frequencies(5000.0, 8), rtol=1e-6)
    assert rotary.attention_scaling == 1.0
    assert DeepseekV3Attention(DeepseekV3Config(**config), 0).scaling == pytest.approx(20**-0.5)


def test_identity_yarn_is_seen_by_transformers(config: dict[str, Any]) -> None:
    """With another factor, the same fields would change the frequencies."""
    config["rope_scaling"] |= {"factor": 4.0, "original_max_position_embeddings": 64}
    rotary = DeepseekV3RotaryEmbedding(DeepseekV3Config(**config))
    assert not torch.allclose(rotary.inv_freq.double(), inverse_frequencies(5000.0, 8), rtol=1e-2)


@pytest.mark.parametrize("q_rank", [None, 20])
@pytest.mark.parametrize(("biases", "constant"), [((False, False), 0), ((True, False), 0), ((True, True), 1)])
def test_tensors_are_those_of_the_stock_class(q_rank: int | None, biases: tuple[bool, bool], constant: int) -> None:
    target = replace(TARGET, q_lora_rank=q_rank, attention_bias=biases[0], query_bias=biases[1])
    config = deepseek_v3_config(SOURCE, target, 5000.0, 256, "bfloat16")
    assert config["q_lora_rank"] == (None if q_rank is None and not constant else (q_rank or 48) + constant)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    stock = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert expected_tensors(config) == stock
    values = [math.prod(shape) for name, shape in stock.items() if "layers.0.self_attn." in name and "norm" not in name]
    assert sum(values) == target.stock_attention_weights
    if q_rank is None:
        assert target.stock_attention_weights - target.attention_weights == constant * 49 * 49
    assert all(type(layer.mlp) is DeepseekV3MLP for layer in model.model.layers)


def test_ids_of_no_token_are_left_out() -> None:
    """The first LLaMA models have a padding of -1; llama.cpp's own tools refuse it."""
    source = SOURCE | {"pad_token_id": -1, "bos_token_id": SOURCE["vocab_size"]}
    written = deepseek_v3_config(source, TARGET, 5000.0, 256, "bfloat16")
    assert written["eos_token_id"] == [2, 3] and written["bos_token_id"] is None and "pad_token_id" not in written
