"""GGUF files of families other than llama: rows not interleaved, biases, norms of heads, norms stored plus one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from transformers import AutoModelForCausalLM

import transmla
from tests.families import lively_config, lively_model
from transmla.checkpoint.read import open_source

ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


def write(path: Path, model_type: str) -> dict[str, torch.Tensor]:
    """A lively model as llama.cpp's converter writes it; returns its tensors."""
    config = lively_config(model_type=model_type, heads=4, head_dim=12, layers=2, hidden=48, tied=True)
    tensors = {name: value for name, value in lively_model(config).state_dict().items() if name != "lm_head.weight"}
    architecture = ARCHITECTURES[model_type]
    names = get_tensor_name_map(next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), 2)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(48)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(12)
    writer.add_value_length(12)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])
    if architecture == "gemma3":
        writer.add_sliding_window(8)
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        stored = value + 1 if architecture == "gemma3" and name.endswith("norm.weight") else value
        writer.add_tensor(f"{names.get_name(module)}.{kind}", stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_gives_the_tensors_that_were_written(tmp_path: Path, model_type: str) -> None:
    tensors = write(tmp_path / "m.gguf", model_type)
    source = open_source(tmp_path / "m.gguf")
    assert source.config["model_type"] == model_type and set(source.tensors) == set(tensors)
    # of Qwen3, transformers does not read the width of heads, which is 128 in all that were published
    width = {"head_dim": 12} if model_type == "qwen3" else {}
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, **width)
    state = theirs.state_dict()
    for name, value in tensors.items():
        found = source.read(name)
        assert torch.allclose(found, value, atol=1e-6), name
        assert torch.allclose(found, state[name], atol=1e-6), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_is_planned(tmp_path: Path, model_type: str) -> None:
    write(tmp_path / "m.gguf", model_type)
    planned = transmla.plan(str(tmp_path / "m.gguf"), latent=12, rope=8)
    assert planned.form == ("deepseek_v3" if model_type == "qwen2" else "transmla")
    assert planned.family.model_type == model_type
    assert (planned.outline.facts is None) == (model_type != "gemma3_text"), "it has too few layers for its pattern"
    asked = transmla.plan(str(tmp_path / "m.gguf"), latent=12, rope=8, download=True)
    assert asked.outline.facts is not None and planned.summary() == asked.summary()
    assert (planned.gqa.num_key_value_heads, planned.gqa.head_dim) == (2, 12)
