"""Multimodal models: the language model inside is converted alone, and computes what the whole computes from text."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLTextConfig

import transmla
from tests.conversion.made import Convert
from tests.families import add_tokenizer, lively_config, sparse_source
from tests.maths.weights import relative
from transmla.checkpoint.language_model import PREFIXES
from transmla.checkpoint.read import open_source
from transmla.errors import UnsupportedError
from transmla.families import FAMILIES, INNER, WRAPPERS
from transmla.model.loading import load, load_source

IDS = torch.arange(3, 60)[None]
_EYES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_CLIP = _EYES | {"model_type": "clip_vision_model"}
EYES: dict[str, dict[str, Any]] = {
    "gemma3": _EYES,
    "mistral3": _EYES | {"model_type": "pixtral"},
    "llava": _CLIP,
    "llava_next": _CLIP,
    "llava_onevision": _EYES | {"model_type": "siglip_vision_model"},
    "idefics3": _EYES,
    "smolvlm": _EYES,
    "internvl": _EYES | {"image_size": [16, 16], "patch_size": [8, 8]},
    "qwen3_vl": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    },
}  # fmt: skip
OWN_NAMES = {family: name for name, family in INNER.items()}
# of pictures: tokens of text have one position
_MROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [3, 2, 1], "mrope_interleaved": True}

MakeWhole = Callable[..., tuple[Path, torch.Tensor]]


def whole_config(model_type: str, family: str, **others: Any) -> Any:
    inner = lively_config(model_type=family, **others).to_dict()
    if model_type == "qwen3_vl":
        inner |= {"model_type": OWN_NAMES[family], "rope_parameters": _MROPE}
    extra = {"mm_tokens_per_image": 4} if model_type == "gemma3" else {}
    return AutoConfig.for_model(model_type, text_config=inner, vision_config=EYES[model_type], **extra)


@pytest.fixture
def whole(tmp_path: Path) -> MakeWhole:
    """A random multimodal model, saved as transformers saves it, and its logits of a text."""

    def made(model_type: str, family: str, **others: Any) -> tuple[Path, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        model = AutoModelForImageTextToText.from_config(whole_config(model_type, family, **others)).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = 0.2 * torch.randn(weight.shape, generator=generator)
                weight.copy_(1 + noise if name.endswith("norm.weight") else noise)
            logits = model(input_ids=IDS).logits
        folder = tmp_path / f"{model_type}-{family}"
        model.save_pretrained(folder)
        add_tokenizer(folder)
        return folder, logits

    return made


@pytest.mark.parametrize(("model_type", "family"), [(one, family) for one in WRAPPERS for family in WRAPPERS[one]])
def test_the_language_model_inside_is_the_source(whole: MakeWhole, model_type: str, family: str) -> None:
    folder, wanted = whole(model_type, family)
    source = open_source(folder)
    assert source.config["model_type"] == family and source.whole is not None
    assert source.whole.model_type == model_type and any("vis" in name for name in source.whole.left_out)
    with torch.no_grad():
        assert torch.equal(load_source(source)(IDS).logits, wanted)


@pytest.mark.parametrize(
    ("model_type", "family"), [("gemma3", "gemma3_text"), ("mistral3", "mistral"), ("qwen3_vl", "qwen3")]
)
def test_it_converts(whole: MakeWhole, run: Convert, model_type: str, family: str) -> None:
    """As the language model does that was saved alone; and it says what was left out."""
    folder, wanted = whole(model_type, family, kv_heads=1)
    report = run(folder, latent=24, rope=12, format="transmla")
    alone = folder.with_name("alone")
    inner = load_source(open_source(folder))
    inner.config.save_pretrained(alone)
    save_file({name: value.clone() for name, value in inner.state_dict().items()}, alone / "model.safetensors")
    add_tokenizer(alone)
    same = run(alone, "same", latent=24, rope=12, format="transmla").destination
    weights = load_file(report.destination / "model.safetensors")
    assert weights.keys() == load_file(same / "model.safetensors").keys()
    assert all(torch.equal(value, weights[name]) for name, value in load_file(same / "model.safetensors").items())
    model = load(report.destination, dtype=torch.float32)
    with torch.no_grad():
        assert relative(model(IDS).logits, wanted) < 0.1
    (note,) = (note for note in report.plan.notes if "language model alone" in note)
    assert model_type in note and any(part in note for part in ("vision_tower", "visual"))
    assert f"language model of a {model_type} alone" in (report.destination / "README.md").read_text("utf-8")
    provenance = json.loads((report.destination / "transmla.json").read_text("utf-8"))
    assert provenance["source"]["language_model_of"] == model_type
    assert not any("vis" in name for name in weights) and "vision_config" not in str(model.config)


def test_names_of_every_release_of_transformers(whole: MakeWhole, tmp_path: Path) -> None:
    folder, wanted = whole("llava", "llama")
    for place, (inside, head) in enumerate(
        (("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head."))
    ):
        target = tmp_path / f"names-{place}"
        shutil.copytree(folder, target)
        tensors = {}
        for name, value in load_file(folder / "model.safetensors").items():
            alone = next((alone + name.removeprefix(one) for one, alone in PREFIXES if name.startswith(one)), None)
            tensors[name if alone is None else re.sub("^model[.]", inside, re.sub("^lm_head[.]", head, alone))] = value
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        with torch.no_grad():
            assert torch.equal(load_source(open_source(target))(IDS).logits, wanted), inside


def test_a_published_one_is_planned_from_headers(tmp_path: Path) -> None:
    for tied in (False, True):
        values = whole_config("qwen3_vl", "qwen3").to_dict() | {"tie_word_embeddings": tied}
        values["text_config"] |= {"tie_word_embeddings": tied}
        folder = sparse_source(tmp_path / f"{tied}", values)
        planned = transmla.plan(str(folder), latent=16, rope=8)
        assert planned.family is FAMILIES["qwen3"] and planned.source.whole is not None
        assert planned.source.whole.left_out == ("visual",)
        assert ("lm_head.weight" in planned.source.tensors) == (not tied)


PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # what is in config.json, and layers, hidden size, heads, key/value heads, head width and vocabulary of the class
    "gemma-3-4b-it": (
        {"model_type": "gemma3", "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}},
        (34, 2560, 8, 4, 256, 262208),
    ),
    "llava-1.5-7b-hf": (
        {"model_type": "llava", "tie_word_embeddings": False, "text_config": {
            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16",
            "vocab_size": 32064}},
        (32, 4096, 32, 32, 128, 32064),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_that_a_published_config_leaves_out(tmp_path: Path, name: str) -> None:
    values, sizes = PUBLISHED[name]
    planned = transmla.plan(str(sparse_source(tmp_path / name, values)))
    gqa = planned.gqa
    found = (gqa.num_hidden_layers, gqa.hidden_size, gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim)
    assert (*found, planned.outline.config["vocab_size"]) == sizes
    if name.startswith("gemma"):
        assert planned.source.config["eos_token_id"] == [1, 106] and planned.dtype == "bfloat16"
        rotary = planned.outline.config["rope_parameters"]
        assert rotary["full_attention"]["factor"] == 8.0 and rotary["sliding_attention"]["rope_type"] == "default"


def test_the_defaults_are_those_of_the_class_inside(tmp_path: Path) -> None:
    """Not of the family, whose theta and context are others."""
    values = whole_config("qwen3_vl", "qwen3").to_dict()
    for key in ("rope_parameters", "max_position_embeddings"):
        del values["text_config"][key]
    config = open_source(sparse_source(tmp_path / "model", values)).config
    inner = Qwen3VLTextConfig()
    assert config["max_position_embeddings"] == inner.max_position_embeddings
    assert config["rope_parameters"]["rope_theta"] == inner.rope_parameters["rope_theta"]  # type: ignore[index]


@pytest.mark.parametrize(("model_type", "family"), [("mistral3", "mistral"), ("internvl", "qwen3"), ("llava", "llama")])
@pytest.mark.parametrize("said", [(True, False), (False, True), (None, None)])
def test_a_head_of_its_own_is_not_lost(
    whole: MakeWhole, model_type: str, family: str, said: tuple[bool | None, bool | None]
) -> None:
    """Whatever the configs say of ties: they differ between the whole and the inside, and so do their defaults."""
    folder, _ = whole(model_type, family)
    values = json.loads((folder / "config.json").read_text("utf-8"))
    for one, ties in zip((values, values["text_config"]), said, strict=True):
        one.pop("tie_word_embeddings", None)
        one |= {} if ties is None else {"tie_word_embeddings": ties}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensors = {name: value for name, value in load_file(folder / "model.safetensors").items() if "lm_head" not in name}
    table = next(value for name, value in tensors.items() if name.endswith("embed_tokens.weight"))
    tensors["language_model.lm_head.weight"] = table.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    planned = transmla.plan(str(folder), latent=12, rope=8)
    assert "lm_head.weight" in planned.outline.tensors
    head = load_source(open_source(folder)).get_output_embeddings().weight
    assert torch.equal(head, table.flip(0)) and torch.equal(head, planned.source.read("lm_head.weight"))


def test_others_are_refused(tmp_path: Path) -> None:
    """Where the whole does something else with the logits, or its language model is of no known family."""
    scaled = {"model_type": "llava_next", "text_config": lively_config(model_type="granite").to_dict()}
    with pytest.raises(UnsupportedError, match="llava_next is a multimodal model") as caught:
        transmla.plan(str(sparse_source(tmp_path / "scaled", scaled)))
    assert "llama, mistral, qwen2" in caught.value.remedy
    unknown = {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}
    with pytest.raises(UnsupportedError, match="qwen3_vl_moe is a multimodal model") as caught:
        transmla.plan(str(sparse_source(tmp_path / "unknown", unknown)))
    assert "gemma3" in caught.value.remedy
