"""What is known of a class without it: the same as the class says, or nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import transmla
from tests.families import LINEAR, LLAMA3, YARN, sparse_source
from transmla.checkpoint.read import open_source
from transmla.errors import SourceError
from transmla.families import FAMILIES, rope_parameters, rotary_dim
from transmla.layouts import LAYOUTS
from transmla.model.outline import Outline, outline_of_headers, outline_of_layout
from transmla.model.skeleton import outline_of_class

# as it stands in config.json; a head is not hidden_size / num_attention_heads wide where the class allows that
SIZES = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 512,
    "pad_token_id": 0,
}  # fmt: skip
FEW_EXPERTS = {"num_local_experts": 3, "moe_intermediate_size": 40}
WITHOUT_HEAD_DIM = ("phi", "stablelm", "starcoder2", "gpt_neox")
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "biases": {"attention_bias": True, "mlp_bias": True, "use_qkv_bias": True, "use_bias": True},
    "no biases": {"attention_bias": False, "use_bias": False},
    "tied": {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    "untied": {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "use_qk_norm": True},
    "window": {"sliding_window": 16, "max_position_embeddings": 64},
    "kinds": {"sliding_window": 16, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 4},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    "llama3": {"rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}},
    "linear, newer": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {"rope_parameters": YARN},
    "other names": {"num_experts": 3},
    "plain": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    values = {"model_type": model_type} | SIZES
    if LAYOUTS[model_type].experts:
        values |= FEW_EXPERTS
    if "num_key_value_heads" in LAYOUTS[model_type].defaults:
        values["num_key_value_heads"] = 2
    if model_type not in WITHOUT_HEAD_DIM:
        values["head_dim"] = 12
    # the class writes into the rotary settings that it is given
    return values | copy.deepcopy(changes)


def by_class(config: dict[str, Any]) -> Outline:
    return outline_of_class(config, FAMILIES[config["model_type"]], "config.json")


def by_layout(config: dict[str, Any]) -> Outline | None:
    return outline_of_layout(config, FAMILIES[config["model_type"]])


def assert_same(found: Outline, wanted: Outline) -> None:
    for key in ("tensors", "head", "biased", "output_bias", "encoded"):
        assert getattr(found, key) == getattr(wanted, key), key
    rotary = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct"}
    for key in found.config.keys() & wanted.config.keys() - rotary:
        assert found.config[key] == wanted.config[key], key
    kinds = found.config.get("layer_types") or [None]
    types = [
        {rope_parameters(one.config, kind)["rope_type"] for kind in kinds} - {"default"} for one in (found, wanted)
    ]
    assert types[0] == types[1]
    assert rotary_dim(found.config, 100) == rotary_dim(wanted.config, 100)


def test_layouts_are_those_of_families() -> None:
    assert set(LAYOUTS) <= set(FAMILIES)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_a_layout_says_what_the_class_says(model_type: str) -> None:
    known = 0
    for changes in CHANGES.values():
        config = config_of(model_type, **changes)
        found = by_layout(config)
        if found is not None:
            known += 1
            assert_same(found, by_class(config))
    # the others are left to the class: scaling that it refuses, kinds of layers that it does not know
    assert known >= 8


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_defaults_are_those_of_the_class(model_type: str) -> None:
    complete = AutoConfig.for_model(model_type).to_dict()
    for key, value in LAYOUTS[model_type].defaults.items():
        if key == "rope_theta":
            kind = "full_attention" if LAYOUTS[model_type].rotary_kinds else None
            assert rope_parameters(complete, kind)["rope_theta"] == value
        elif key in ("partial_rotary_factor", "rotary_pct"):
            assert rope_parameters(complete)["partial_rotary_factor"] == value
        elif value is not None:
            assert complete[key] == value, key
        elif key == "num_key_value_heads":
            assert complete[key] == complete["num_attention_heads"]
        elif key == "head_dim":
            assert complete.get(key) in (None, complete["hidden_size"] // complete["num_attention_heads"])
        else:
            assert complete[key] is None, key


@pytest.mark.parametrize(
    "doubt",
    [
        {"a_setting_of_tomorrow": 1},
        {"per_layer_config": {"0": {"intermediate_size": 32}}},
        {"hidden_act": "a_new_one"},
        {"attention_bias": "yes"},
        {"num_experts": 3, "num_local_experts": 4},
        {"num_attention_heads": 6.0},
        {"num_attention_heads": 5},
        {"pad_token_id": 512},
        {"layer_types": ["full_attention"]},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": "2"}},
        {"rope_parameters": LINEAR, "rope_scaling": LINEAR},
        {"partial_rotary_factor": 0.5},
        {"use_sliding_window": True, "sliding_window": 16},
    ],
    ids=str,
)
def test_doubts_are_left_to_the_class(doubt: dict[str, Any]) -> None:
    assert by_layout(config_of("llama")) is not None
    assert by_layout(config_of("llama", **doubt)) is None


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_half_a_rotary_pair_is_left_to_the_class(share: float) -> None:
    """Of 12 values none turn, or three."""
    assert by_layout(config_of("glm4")) is not None
    assert by_layout(config_of("glm4", partial_rotary_factor=share)) is None


def test_files_that_are_not_as_the_layout_says_are_left_to_the_class(tmp_path: Path) -> None:
    config = config_of("llama")
    source = open_source(sparse_source(tmp_path / "source", config))
    found = outline_of_headers(source, FAMILIES["llama"])
    assert found is not None and found.facts is None
    wider = open_source(sparse_source(tmp_path / "wider", config | {"intermediate_size": 80}))
    wider.config = config
    assert outline_of_headers(wider, FAMILIES["llama"]) is None


def test_what_is_wrong_is_said_in_the_same_words(tmp_path: Path) -> None:
    """With or without the class, whose word is the last."""
    folder = sparse_source(tmp_path / "source", config_of("qwen2"))
    text = (folder / "config.json").read_text("utf-8").replace('"num_hidden_layers": 6', '"num_hidden_layers": 7')
    (folder / "config.json").write_text(text, encoding="utf-8")
    messages = []
    for asked in (False, True):
        with pytest.raises(SourceError, match=r"model\.layers\.6") as caught:
            transmla.plan(str(folder), latent=16, rope=8, download=asked)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_what_the_class_does_not_understand_is_said_before_anything_is_done(tmp_path: Path) -> None:
    folder = sparse_source(tmp_path / "source", config_of("gemma2", sliding_window=16))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    given = {"rope_parameters": {"rope_type": "default"}, "partial_rotary_factor": {"rope_type": "llama3"}}
    (folder / "config.json").write_text(json.dumps(config | given), encoding="utf-8")
    with pytest.raises(SourceError, match="description cannot be used"):
        transmla.plan(str(folder))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "mixtral"])
def test_a_plan_is_the_same_with_and_without_the_class(tmp_path: Path, model_type: str) -> None:
    folder = str(sparse_source(tmp_path / "source", config_of(model_type)))
    quick, asked = (transmla.plan(folder, rope="auto", total=24, download=asked) for asked in (False, True))
    assert quick.outline.facts is None and asked.outline.facts is not None
    assert quick.summary() == asked.summary() and str(quick) == str(asked)
    # what the plan itself does not need is there for whoever asks
    assert quick.config == asked.config and quick.attention == asked.attention
