"""The table: every row has a lively model, and what has no row is refused in words."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.families import ODDITIES, lively_config, lively_model
from transmla.errors import UnsupportedError
from transmla.families import FAMILIES, MLA_MODEL_TYPES, NON_ROTARY_MODEL_TYPES, family_of, rope_parameters
from transmla.model.skeleton import checkpoint_tensors, skeleton


def config(**changes: Any) -> dict[str, Any]:
    return dict(lively_config().to_dict()) | changes


def refusal(**changes: Any) -> UnsupportedError:
    with pytest.raises(UnsupportedError) as caught:
        family_of(config(**changes), "here/config.json")
    assert caught.value.where == "here/config.json" and caught.value.exit_code == 4 and caught.value.remedy
    return caught.value


def test_oddities_are_those_of_rows() -> None:
    assert set(ODDITIES) <= set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_of_a_row_are_those_of_its_files(model_type: str, tmp_path: Path) -> None:
    settings = lively_config(model_type=model_type, head_dim=8)
    family = family_of(settings.to_dict(), "config.json")
    lively_model(settings).save_pretrained(tmp_path)
    shapes = {name: tuple(value.shape) for name, value in load_file(tmp_path / "model.safetensors").items()}
    assert checkpoint_tensors(family, skeleton(settings), tied=False) == shapes


@pytest.mark.parametrize("model_type", ["qwen9", "None", "gpt_oss"])
def test_an_unknown_family_names_the_known_ones(model_type: str) -> None:
    error = refusal(model_type=model_type)
    assert model_type in error.what and "qwen2, qwen3, qwen3_moe" in error.remedy


@pytest.mark.parametrize("model_type", sorted(MLA_MODEL_TYPES))
def test_latent_already(model_type: str) -> None:
    assert "already" in refusal(model_type=model_type, kv_lora_rank=512).what


def test_latent_by_its_config() -> None:
    assert "already" in refusal(model_type="something_new", kv_lora_rank=512).what


@pytest.mark.parametrize("model_type", sorted(NON_ROTARY_MODEL_TYPES))
def test_without_rotary_positions(model_type: str) -> None:
    assert "no rotary" in refusal(model_type=model_type).what


def test_encoder_decoder() -> None:
    assert "encoder-decoder" in refusal(model_type="t5", is_encoder_decoder=True).what


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "'proportional'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is incomplete"),
        ({"rope_parameters": {}, "rope_scaling": {"type": "ntk", "factor": 2.0}}, "'ntk'"),
    ],
    ids=str,
)
def test_rotary_embeddings_that_are_not_known(change: dict[str, Any], fact: str) -> None:
    assert fact in refusal(**change).what


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"is_causal": False}, "is_causal"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
    ids=str,
)
def test_attention_to_later_tokens(change: dict[str, Any], fact: str) -> None:
    assert fact in refusal(**change).why
    # the class of the first Gemma passes over it
    for causal in ({"is_causal": True}, {"model_type": "gemma", "use_bidirectional_attention": True}):
        assert family_of({"model_type": "llama", "vocab_size": 8} | causal, "config.json")


def test_rope_parameters_of_older_configs() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert rope_parameters(old) == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    assert rope_parameters({"rope_theta": 5e5, "rope_scaling": None}) == {"rope_theta": 5e5, "rope_type": "default"}
    assert rope_parameters({}) == {"rope_theta": 10000.0, "rope_type": "default"}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}, "rope_theta": 1.0}
    assert rope_parameters(new) == new["rope_parameters"]


def test_rope_parameters_leave_the_config_alone() -> None:
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    rope_parameters(old)
    assert old == {"rope_scaling": {"type": "linear", "factor": 2.0}}
