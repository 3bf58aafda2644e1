"""Three ways to load a folder, saving and loading again, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.families import lively_source
from tests.model.test_attention import relative
from transmla.errors import SourceError, UnsupportedError
from transmla.model.loading import load, load_any
from transmla.model.modeling_transmla import DeepseekV3ForCausalLM, FoldedRMSNorm, LatentAttention


def three_ways(folder: Path) -> dict[str, Any]:
    return {
        "stock": AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False),
        "remote": AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
        "load": load(folder),
    }


def test_a_source_has_its_cap(tmp_path: Path, ids: torch.Tensor) -> None:
    """transformers 5.19 loads Gemma 2 with an attention that has none."""
    folder = lively_source(tmp_path / "gemma", model_type="gemma2")
    with torch.no_grad():
        found = load_any(folder, dtype="float32")(ids).logits
        free = load_any(lively_source(tmp_path / "free", model_type="gemma2", attn_logit_softcapping=None))(ids).logits
        wanted = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(ids).logits
    assert relative(found, wanted) < 1e-6 < 1e-3 < relative(free, wanted)


def test_three_ways_give_one_function(folder: Path, ids: torch.Tensor) -> None:
    models = three_ways(folder)
    assert type(models["stock"].model.layers[0].self_attn).__module__.startswith("transformers.models")
    assert type(models["remote"]).__module__.startswith("transformers_modules")
    assert type(models["load"]) is DeepseekV3ForCausalLM and not models["load"].training
    with torch.no_grad():
        logits = {way: model(ids).logits for way, model in models.items()}
    assert torch.equal(logits["remote"], logits["load"])
    assert relative(logits["load"], logits["stock"]) < 1e-3


@pytest.mark.parametrize("way", ["remote", "load"])
def test_saved_again_loads_in_three_ways(folder: Path, tmp_path: Path, ids: torch.Tensor, way: str) -> None:
    model = three_ways(folder)[way]
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_transmla.DeepseekV3ForCausalLM"}
    assert config["latent_norm_folded"] is True
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (tmp_path / "again" / "modeling_transmla.py").is_file()
    with torch.no_grad():
        expected = model(ids).logits
        for again in three_ways(tmp_path / "again").values():
            assert relative(again(ids).logits, expected) < 1e-3


def test_load_never_runs_code_of_the_folder(folder: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "modeling_transmla.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    assert type(load(tmp_path)) is DeepseekV3ForCausalLM


def test_every_layer_is_replaced_and_dtype_kept(folder: Path) -> None:
    model = load(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"
    for layer in model.model.layers:
        attention, norm = (type(m) for m in (layer.self_attn, layer.self_attn.kv_a_layernorm))
        assert (attention, norm) == (LatentAttention, FoldedRMSNorm)


def test_device_map_with_offloaded_layers(folder: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    devices |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = load(folder, device_map=devices, offload_folder=str(tmp_path))
    whole = load(folder)
    with torch.no_grad():
        cache = model(ids[:, :20]).past_key_values
        step = model(ids[:, 20:], past_key_values=cache).logits
        assert relative(step, whole(ids).logits[:, 20:]) < 1e-5
        steps = []
        for one in (model, whole):
            packed = one.latent_cache("int8", recent=4)
            one(ids[:, :20], past_key_values=packed)
            steps.append(one(ids[:, 20:], past_key_values=packed).logits)
            assert packed.layers[1].num_packed
        assert relative(*steps) < 1e-5


def test_unsupported_attention_is_refused(folder: Path) -> None:
    with pytest.raises((ValueError, ImportError)):
        load(folder, attn_implementation="flex_attention")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        load(tmp_path / "nowhere")
    assert "the folder does not exist" in str(caught.value)
    with pytest.raises(SourceError, match="the file does not exist"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(SourceError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "deepseek_v3"}, "it has no kv_lora_rank"),
        ([], "model_type is None"),
    ],
)
def test_folder_of_another_model(tmp_path: Path, config: object, fact: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsupportedError) as caught:
        load(tmp_path)
    for part in ("what", "where", "why", "remedy"):
        assert getattr(caught.value, part)
    assert fact in caught.value.why and "transmla convert" in caught.value.remedy
