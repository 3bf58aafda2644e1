"""GGUF files: names, row order and values as transformers gives them, and as they were before."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from transformers.convert_slow_tokenizer import bytes_to_unicode

import transmla
from tests.conversion.pieces import in_pieces
from tests.maths.weights import relative
from transmla.checkpoint.companions import copy_companions, tokenizer
from transmla.checkpoint.gguf.config import config_of_gguf
from transmla.checkpoint.read import open_source
from transmla.errors import SourceError, UnsupportedError
from transmla.families import FAMILIES, rope_parameters
from transmla.geometry import gqa_geometry
from transmla.layouts import LAYOUTS
from transmla.maths.attention import inverse_frequencies
from transmla.model.loading import load_source
from transmla.model.skeleton import source_config, source_frequencies

LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    **{f"blk.{i}.{gguf}": f"model.layers.{i}.{module}" for i in range(2) for gguf, module in LAYER.items()},
}
HEADS = {"attn_q": 4, "attn_k": 2}
KEYS = "model.layers.0.self_attn.k_proj.weight"


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter stores them: the two halves of each head side by side."""
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    tensors: dict[str, torch.Tensor],
    encoding: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    extra_tensors: dict[str, np.ndarray] | None = None,
    **fields: Any,
) -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(fields.pop("num_key_value_heads", 2))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(7)  # wrong on purpose: the embedding knows better
    if "scale_linear" in fields:
        writer.add_float32("llama.rope.scale_linear", fields.pop("scale_linear"))
    for method, value in fields.items():
        getattr(writer, method)(value)
    for gguf_name, name in NAMES.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" not in tensors:
                continue
            data = tensors[f"{name}.{kind}"].numpy()
            part = gguf_name.rpartition(".")[2]
            data = interleaved(data, HEADS[part]) if part in HEADS else data
            if data.ndim == 2 and encoding != GGMLQuantizationType.F32:
                writer.add_tensor(f"{gguf_name}.{kind}", quantize(data, encoding), raw_dtype=encoding)
            else:
                writer.add_tensor(f"{gguf_name}.{kind}", data)
    for name, data in (extra_tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ENCODINGS = [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_1")]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
def test_gives_the_tensors_that_were_written(tmp_path, tensors, encoding):
    source = open_source(write_gguf(tmp_path / "m.gguf", tensors, encoding))
    assert source.format == "gguf" and set(source.tensors) == set(tensors)
    expected_dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(encoding.name, torch.float32)
    for name, tensor in tensors.items():
        expected = tensor
        if tensor.ndim == 2 and encoding.name != "F32":
            expected = torch.from_numpy(dequantize(quantize(tensor.numpy(), encoding), encoding))
            assert source.read(name).dtype == expected_dtype
        assert source.tensors[name].shape == tensor.shape
        assert torch.equal(source.read(name, dtype=torch.float32), expected)
        assert source.read(name).is_contiguous()
    for name in (KEYS, "model.embed_tokens.weight", "model.norm.weight"):
        index = torch.tensor([3, 31, 3])
        assert torch.equal(source.rows(name, index), source.read(name)[index])


@pytest.mark.parametrize("encoding", ENCODINGS[::3], ids=lambda encoding: encoding.name)
def test_agrees_with_transformers(tmp_path, tensors, encoding):
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "m.gguf", tensors, encoding, add_token_list=[f"t{i}" for i in range(40)])
    # transformers believes vocab_size, which write_gguf gets wrong on purpose
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32, vocab_size=40)
    source = open_source(path)
    state = model.state_dict()
    assert set(state) == set(source.tensors)
    for name, tensor in state.items():
        assert torch.equal(source.read(name), tensor), name


def test_row_order_matters_here(tensors):
    weight = tensors[KEYS].numpy()
    assert not np.array_equal(interleaved(weight, 2), weight)


@pytest.mark.parametrize("variant", ["plain", "linear", "biased", "untied"])
def test_a_plan_is_the_same_with_and_without_transformers(tmp_path, tensors, variant):
    from gguf import RopeScalingType

    fields = {"add_name": "A name"}
    if variant == "linear":
        fields |= {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": 2.0}
    elif variant == "biased":
        rows = {name: len(value) for name, value in tensors.items() if name.endswith("_proj.weight")}
        biases = {
            name.replace("weight", "bias"): torch.ones(size) for name, size in rows.items() if "self_attn" in name
        }
        tensors = tensors | biases
    elif variant == "untied":
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    path = write_gguf(tmp_path / "m.gguf", tensors, **fields)
    planned, asked = (transmla.plan(str(path), latent=16, rope=4, download=asked) for asked in (False, True))
    assert planned.outline.facts is None and asked.outline.facts is not None
    assert planned.summary() == asked.summary()
    assert planned.outline.biased == (variant == "biased") and ("linear" in str(planned.notes)) == (variant == "linear")


def test_a_family_without_a_layout_is_planned_by_its_class(tmp_path, tensors, monkeypatch):
    monkeypatch.delitem(LAYOUTS, "llama")
    planned = transmla.plan(str(write_gguf(tmp_path / "m.gguf", tensors, add_name="A name")), latent=16, rope=4)
    assert planned.outline.facts is not None


def test_config_is_that_of_the_model_alone(tmp_path, tensors):
    source = open_source(write_gguf(tmp_path / "m.gguf", tensors, add_name="A name"))
    assert source.config_where == f"{tmp_path / 'm.gguf'} (metadata)"
    wanted = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 40,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    }
    assert {key: source.config[key] for key in wanted} == wanted
    assert str(tmp_path) not in str(source.config) and "A name" not in str(source.config)
    assert "quantization_config" not in source.config


def test_tied_without_an_output_matrix(tmp_path, tensors):
    del tensors["lm_head.weight"]
    source = open_source(write_gguf(tmp_path / "m.gguf", tensors))
    assert source.config["tie_word_embeddings"] is True and "lm_head.weight" not in source.tensors


def test_biases_are_announced_and_in_order(tmp_path, tensors):
    bias = torch.randn(64)
    tensors["model.layers.0.self_attn.q_proj.bias"] = bias
    source = open_source(write_gguf(tmp_path / "m.gguf", tensors))
    assert source.config["attention_bias"] is True and source.config["mlp_bias"] is False
    assert torch.equal(source.read("model.layers.0.self_attn.q_proj.bias"), bias)


def test_llama3_frequency_factors(tmp_path, tensors):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", tensors, extra_tensors={"rope_freqs.weight": factors})
    source = open_source(path)
    assert source.rope_frequency_factors == factors.tolist()
    assert set(source.tensors) == set(tensors)
    assert open_source(write_gguf(tmp_path / "n.gguf", tensors)).rope_frequency_factors is None


def test_linear_rope_scaling_is_kept_and_others_refused(tmp_path, tensors):
    from gguf import RopeScalingType

    scaling = {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": 4.0}
    source = open_source(write_gguf(tmp_path / "m.gguf", tensors, **scaling))
    assert source.config["rope_parameters"] == {"rope_theta": 5000.0, "rope_type": "linear", "factor": 4.0}
    path = write_gguf(tmp_path / "n.gguf", tensors, add_rope_scaling_type=RopeScalingType.YARN)
    with pytest.raises(UnsupportedError, match="rope scaling is 'yarn'"):
        open_source(path)


@pytest.mark.parametrize("old", [False, True])
def test_scaling_is_linear_where_no_type_is_named(tmp_path, tensors, old):
    """As for llama.cpp; files of 2023 have another key as well."""

    def written(name, factor):
        fields = {"scale_linear": factor} if old else {"add_rope_scaling_factor": factor}
        return open_source(write_gguf(tmp_path / name, tensors, **fields))

    linear = {"rope_theta": 5000.0, "rope_type": "linear", "factor": 4.0}
    assert written("a.gguf", 4.0).config["rope_parameters"] == linear
    for factor in (0.0, 1.0):
        assert rope_parameters(written(f"{factor}.gguf", factor).config)["rope_type"] == "default"


@pytest.mark.parametrize("kind", ["plain", "linear", "factors"])
def test_the_source_that_teaches_is_the_one_that_is_converted(tmp_path, tensors, kind):
    """transformers leaves out what GGUF says of scaling."""
    from gguf import RopeScalingType

    fields = {
        "plain": {},
        "linear": {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": 4.0},
        "factors": {"extra_tensors": {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}},
    }[kind]
    source = open_source(write_gguf(tmp_path / "m.gguf", tensors, **fields))
    ids_1T = torch.arange(40)[None]
    with torch.no_grad():
        wanted = load_source(source)(ids_1T).logits[0]
    assert relative(in_pieces(source, ids_1T), wanted) < 1e-5


def test_gemma_3_says_less_in_a_file_than_it_is(tmp_path):
    """Only layers that attend to everything are stretched, and the largest model scales its scores in its own way."""
    from gguf import RopeScalingType

    def written(layers, heads, width):
        writer = GGUFWriter(path := tmp_path / f"{layers}.gguf", "gemma3")
        for method, value in {
            "block_count": layers, "context_length": 64, "embedding_length": 336, "feed_forward_length": 64,
            "head_count": heads, "head_count_kv": 2, "layer_norm_rms_eps": 1e-6, "rope_freq_base": 1e6,
            "key_length": width, "value_length": width, "vocab_size": 32, "sliding_window": 16,
            "rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": 8.0,
        }.items():  # fmt: skip
            getattr(writer, f"add_{method}")(value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return config_of_gguf(GGUFReader(path), path, FAMILIES["gemma3_text"])

    small, large = written(6, 4, 256), written(62, 2, 128)
    assert small["query_pre_attn_scalar"] == 256 and large["query_pre_attn_scalar"] == 168
    geometry = gqa_geometry(small, "config.json")
    plain_P = inverse_frequencies(1e6, 256)
    for index, wanted_P in ((0, inverse_frequencies(1e4, 256)), (5, plain_P / 8)):
        found_P, _ = source_frequencies(source_config(small), geometry, FAMILIES["gemma3_text"], index)
        assert torch.allclose(found_P, wanted_P, rtol=1e-5)


def test_unsupported_architectures_and_tensors(tmp_path, tensors):
    with pytest.raises(UnsupportedError, match=r"architecture is 'gemma'[^$]*known GGUF architectures: gemma3, llama"):
        open_source(write_gguf(tmp_path / "a.gguf", tensors, architecture="gemma"))
    experts = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4, 32), dtype=np.float32)}
    with pytest.raises(UnsupportedError, match=r"blk\.0\.ffn_gate_exps\.weight"):
        open_source(write_gguf(tmp_path / "b.gguf", tensors, extra_tensors=experts))


def test_metadata_that_describes_no_model(tmp_path, tensors):
    with pytest.raises(SourceError, match="does not describe a model"):
        open_source(write_gguf(tmp_path / "a.gguf", tensors, num_key_value_heads=[2, 1]))


def test_one_part_of_several(tmp_path, tensors):
    path = write_gguf(tmp_path / "a.gguf", tensors)
    writer = GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="llama-gguf-split --merge"):
        open_source(path)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.05, 0.5, 0.99])
def test_truncated_file(tmp_path, tensors, keep):
    path = write_gguf(tmp_path / "m.gguf", tensors)
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(SourceError) as error:
        open_source(path)
    assert str(path) in str(error.value)


def test_value_that_is_not_finite(tmp_path, tensors):
    tensors[KEYS][1, 2] = float("nan")
    source = open_source(write_gguf(tmp_path / "m.gguf", tensors))
    with pytest.raises(SourceError, match="NaN") as error:
        source.read(KEYS)
    assert KEYS in str(error.value) and "m.gguf" in str(error.value)


def test_an_encoding_without_a_decoder(tmp_path, tensors, monkeypatch):
    def none(data, encoding):
        # the words of the gguf library for an encoding that it has no decoder for, not a gap in this project
        raise NotImplementedError(f"dequantization for {encoding.name} is not yet implemented")

    source = open_source(write_gguf(tmp_path / "a.gguf", tensors))
    monkeypatch.setattr("gguf.dequantize", none)
    with pytest.raises(SourceError, match="F32 is not yet implemented") as caught:
        source.read(KEYS)
    assert KEYS in caught.value.where and "K-quant" in caught.value.remedy and caught.value.exit_code == 3


def test_tokenizer_is_unpacked(tmp_path, tensors):
    tokens = [*(chr(value) for value in range(33, 72)), "AB"]
    fields = {
        "add_tokenizer_model": "gpt2",
        "add_token_list": tokens,
        "add_token_merges": ["A B"],
        "add_bos_token_id": 1,
        "add_eos_token_id": 2,
    }
    source = open_source(write_gguf(tmp_path / "m.gguf", tensors, **fields))
    destination = tmp_path / "out"
    destination.mkdir()
    assert "tokenizer.json" in copy_companions(source, destination)
    assert tokenizer(source)("AC")["input_ids"] == [tokens.index("A"), tokens.index("C")]


def _byte_level(tmp_path, tensors, special, **fields):
    """A source with all bytes as tokens, and special ones behind them: text -> type."""
    words = [*bytes_to_unicode().values(), "12", *special]
    given = {
        "add_tokenizer_model": "gpt2",
        "add_token_list": words,
        "add_token_types": [1] * (len(words) - len(special)) + list(special.values()),
        "add_token_merges": ["1 2"],
        "add_eos_token_id": len(words) - 1,
    }
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), torch.ones(len(words), 32))
    return open_source(write_gguf(tmp_path / "m.gguf", tensors | ends, **given | fields)), words


def test_special_tokens_are_where_the_file_has_them(tmp_path, tensors):
    source, words = _byte_level(tmp_path, tensors, {"<|user|>": 4, "<|end|>": 3})
    found = tokenizer(source)("<|user|>12<|end|>")["input_ids"]
    assert [words[token] for token in found] == ["<|user|>", "12", "<|end|>"]
    (tmp_path / "other").mkdir()
    source, words = _byte_level(tmp_path / "other", tensors, {"<\uff5cUser\uff5c>": 4, "<\uff5cend\uff5c>": 3})
    with pytest.raises(SourceError, match="no tokenizer that can be read") as caught:
        tokenizer(source)
    assert "the file has it as 257" in caught.value.why and "safetensors" in caught.value.remedy


@pytest.mark.parametrize(("cuts", "found"), [("smollm", ["1", "2"]), ("qwen2", ["1", "2"]), ("gpt-2", ["12"])])
def test_text_is_cut_as_the_file_says(tmp_path, tensors, cuts, found):
    source, words = _byte_level(tmp_path, tensors, {"<|end|>": 3}, add_tokenizer_pre=cuts)
    assert tokenizer(source)("12")["input_ids"] == [words.index(word) for word in found]


def test_a_way_to_cut_text_that_nobody_knows(tmp_path, tensors):
    source, _ = _byte_level(tmp_path, tensors, {"<|end|>": 3}, add_tokenizer_pre="deepseek-llm")
    with pytest.raises(SourceError, match="no tokenizer that can be read") as caught:
        tokenizer(source)
    assert "'deepseek-llm'" in caught.value.why


def test_without_a_tokenizer(tmp_path, tensors):
    source = open_source(write_gguf(tmp_path / "m.gguf", tensors))
    with pytest.raises(SourceError, match="no tokenizer") as error:
        tokenizer(source)
    assert "m.gguf" in str(error.value)
