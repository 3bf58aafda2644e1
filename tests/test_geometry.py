"""Sizes: what is cached, which sizes are chosen, which are refused, who runs them."""

from typing import Any

import pytest

from transmla.errors import GeometryError, UnsupportedError
from transmla.geometry import (
    GqaGeometry,
    default_sizes,
    gqa_geometry,
    mla_geometry,
)

# layers, hidden_size, query heads, key/value heads, head_dim
LLAMA_3_8B = GqaGeometry(32, 4096, 32, 8, 128)
LLAMA_2_7B = GqaGeometry(32, 4096, 32, 32, 128)
LLAMA_3_70B = GqaGeometry(80, 8192, 64, 8, 128)
LLAMA_32_1B = GqaGeometry(16, 2048, 32, 8, 64)
SMOLLM2_135M = GqaGeometry(30, 576, 9, 3, 64)
STORIES_260K = GqaGeometry(5, 64, 8, 4, 8)
TINYLLAMA = GqaGeometry(22, 2048, 32, 4, 64)
MQA = GqaGeometry(2, 64, 8, 1, 16)
ALL = (LLAMA_3_8B, LLAMA_2_7B, LLAMA_3_70B, LLAMA_32_1B, SMOLLM2_135M, STORIES_260K, TINYLLAMA, MQA)
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 97,
    "intermediate_size": 64,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        (LLAMA_3_8B, (512, 64)),
        (LLAMA_3_70B, (512, 64)),
        (LLAMA_2_7B, (512, 64)),
        (LLAMA_32_1B, (256, 64)),
        (SMOLLM2_135M, (160, 32)),
        (STORIES_260K, (28, 4)),
    ],
)
def test_default_sizes(source: GqaGeometry, sizes: tuple[int, int]) -> None:
    assert default_sizes(source) == sizes


@pytest.mark.parametrize("source", ALL)
def test_defaults_are_possible_and_save_half(source: GqaGeometry) -> None:
    target = mla_geometry(source, None, None)
    assert target.cache_values() <= source.cache_values() / 2
    assert target.qk_nope_head_dim == target.v_head_dim == source.head_dim


@pytest.mark.parametrize(("source", "saved"), [(LLAMA_3_8B, 0.719), (LLAMA_2_7B, 0.930), (LLAMA_32_1B, 0.687)])
def test_savings(source: GqaGeometry, saved: float) -> None:
    target = mla_geometry(source, None, None)
    assert 1 - target.cache_values() / source.cache_values() == pytest.approx(saved, abs=1e-3)


def test_cache_values_and_kinds() -> None:
    assert (LLAMA_3_8B.cache_values(), LLAMA_3_8B.cache_values(1), LLAMA_3_8B.cache_values(32)) == (2048, 256, 8192)
    assert [source.kind for source in (LLAMA_3_8B, LLAMA_2_7B, MQA)] == ["GQA", "MHA", "MQA"]


def test_one_size_given_and_the_other_chosen() -> None:
    assert mla_geometry(LLAMA_3_8B, 256, None).qk_rope_head_dim == 64
    # what the rotary key does not take returns to the latent
    assert mla_geometry(LLAMA_3_8B, None, 32).kv_lora_rank == 544
    assert mla_geometry(LLAMA_3_8B, None, 128).kv_lora_rank == 448


@pytest.mark.parametrize(
    ("latent", "rope", "nearest"),
    [
        (0, 4, "--latent 1"),
        (-3, 4, "--latent 1"),
        (49, 4, "--latent 48"),
        (16, 7, "--rope 6"),
        (16, 13, "--rope 12"),
        (16, 1, "--rope 2"),
        (16, 0, "--rope 2"),
        (16, 64, "--rope 12"),
    ],
)
def test_impossible_sizes_name_the_nearest(latent: int, rope: int, nearest: str) -> None:
    source = gqa_geometry(CONFIG, "config.json")
    with pytest.raises(GeometryError) as caught:
        mla_geometry(source, latent, rope)
    assert nearest in caught.value.remedy and caught.value.exit_code == 6
    option, value = nearest.split()
    sizes = {"--latent": latent, "--rope": rope} | {option: int(value)}
    assert mla_geometry(source, sizes["--latent"], sizes["--rope"])


def test_latent_is_bounded_by_keys_and_values_and_by_hidden_size() -> None:
    assert mla_geometry(MQA, 32, 8).kv_lora_rank == 32
    with pytest.raises(GeometryError, match="= 32 dimensions"):
        mla_geometry(MQA, 33, 8)
    with pytest.raises(GeometryError, match="= 64 dimensions"):
        mla_geometry(STORIES_260K, 65, 8)


def test_geometry_of_a_config() -> None:
    assert gqa_geometry(CONFIG, "config.json") == GqaGeometry(2, 48, 6, 2, 12)
    # older configs: no head_dim; MHA: no num_key_value_heads
    del_keys = {key: value for key, value in CONFIG.items() if key not in ("head_dim", "num_key_value_heads")}
    assert gqa_geometry(del_keys, "config.json") == GqaGeometry(2, 48, 6, 6, 8)
    nulls = CONFIG | {"head_dim": None, "num_key_value_heads": None}
    assert gqa_geometry(nulls, "config.json") == GqaGeometry(2, 48, 6, 6, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 4},
        {"head_dim": 11},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"hidden_size": "many"},
        {"hidden_size": None},
        {"vocab_size": 0},
        {"rms_norm_eps": 0.0},
    ],
    ids=str,
)
def test_configs_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        gqa_geometry(CONFIG | change, "here/config.json")
    assert caught.value.where == "here/config.json" and caught.value.exit_code == 4


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
def test_config_without_a_size(key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        gqa_geometry({name: value for name, value in CONFIG.items() if name != key}, "config.json")
