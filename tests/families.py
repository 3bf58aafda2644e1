"""Lively random models, one function for all families: built by the Hugging Face class, saved as a folder.

A default random model cannot see the mistakes that matter (weights of deviation 0.02, norms of 1: leaving out the
rotation moves the logits by less than a percent), so weights have deviation 0.2 and norms scatter around 1.
"""

import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from transmla.checkpoint.language_model import language_model
from transmla.families import FAMILIES
from transmla.model.skeleton import checkpoint_tensors, skeleton, source_config

# the fixture `lively`
MakeSource = Callable[..., Path]

# what makes each family what it is, so that a converter that overlooks it is wrong; the others need nothing
_TWO_KINDS = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_GEMMA = {"sliding_window": 8, "query_pre_attn_scalar": 20}
ODDITIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "minimax_m2": _PARTIAL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "gemma2": _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA | {"rope_parameters": _TWO_KINDS, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "logit_scale": 0.5},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "ministral": {"sliding_window": 256},
    "glm4": _PARTIAL | {"attention_bias": True},
    "phi3": _PARTIAL | {"sliding_window": None},
    "phi": _PARTIAL,
    "stablelm": _PARTIAL | {"use_qkv_bias": True},
    "starcoder2": {"sliding_window": None},
    "gpt_neox": _PARTIAL,
}  # fmt: skip
# these have no head_dim of their own: it is hidden_size / num_attention_heads
_NO_HEAD_DIM = ("phi", "stablelm", "starcoder2", "gpt_neox")
# of the tokenizer that goes along
VOCAB = 512
THETA = 10000.0
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 64}


def lively_config(
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 12,
    hidden: int = 48,
    layers: int = 3,
    vocab: int = VOCAB,
    tied: bool = False,
    rope: dict[str, Any] | None = None,
    eps: float = 1e-5,
    model_type: str = "llama",
    **others: Any,
) -> Any:
    """More query than key/value heads, and heads * head_dim != hidden."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_parameters": dict(rope or {"rope_type": "default", "rope_theta": THETA}),
        "rms_norm_eps": eps,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if model_type in ("llama", "mistral"):
        del sizes["pad_token_id"]
    if model_type in _NO_HEAD_DIM:
        del sizes["head_dim"]
    oddities = dict(ODDITIES.get(model_type, {}))
    for key in ("layer_types", "no_rope_layers"):
        if key in oddities:
            oddities[key] = oddities[key][:layers]
    if rope is not None:
        oddities.pop("rope_parameters", None)
    return AutoConfig.for_model(model_type, **sizes | oddities | others)


def lively_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """A random model whose every weight matters."""
    generator = torch.Generator().manual_seed(seed)
    # transformers 5.19 loads Gemma 2 with sdpa, which has no cap
    capped = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **capped).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = 0.2 * torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + noise if name.endswith("norm.weight") else noise)
    return model


def lively_source(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Save a lively model and a small tokenizer in `folder`; settings are those of `lively_config`."""
    model = lively_model(lively_config(**settings), seed).to(dtype)
    num_bytes = sum(weight.nbytes for weight in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=num_bytes if shards == 1 else num_bytes // shards)
    saved = len(list(folder.glob("*.safetensors")))
    assert (saved == 1) == (shards == 1), f"{saved} files"
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """The tokenizer of the embedded model, 512 tokens.

    That of a qwen2 is a Qwen2Tokenizer for transformers, whatever the files say; they say so, too, as real ones do, so
    that the converted folder is read alike.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(str(resources.files("transmla.data") / "stories260k" / name), folder / name)
    path = folder / "tokenizer_config.json"
    if json.loads((folder / "config.json").read_text("utf-8")).get("model_type") == "qwen2":
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"tokenizer_class": "Qwen2Tokenizer"}))


def sparse_source(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of any size of which only config and headers are there; its values are a hole in the file.

    Of a model that no row of the table names, it has one small tensor; of a multimodal one, such a tensor beside its
    language model.
    """
    shapes: dict[str, tuple[int, ...]] = {"unknown.weight": (1,)}
    tied = any(one.get("tie_word_embeddings") for one in (config, config.get("text_config") or {}))
    names = ["model.language_model.norm.weight"] + ([] if tied else ["lm_head.weight"])
    named: Any = SimpleNamespace(tensors=dict.fromkeys(names))
    inner, _, whole = language_model(config, named)
    if inner["model_type"] in FAMILIES:
        model, tied = skeleton(source_config(inner)), bool(inner.get("tie_word_embeddings"))
        found = checkpoint_tensors(FAMILIES[inner["model_type"]], model, tied)
        if whole is not None:
            found = {re.sub("^model[.]", "model.language_model.", name): shape for name, shape in found.items()}
            found["model.visual.weight"] = (1,)
        shapes = found
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    written = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(written)) + written)
        file.truncate(8 + len(written) + end)
    return folder
