"""Tiny checkpoints, made of tensors alone: no model is needed to test how files are read."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # heads * head_dim != hidden_size
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """A llama of CONFIG, with norms and projections that are all different."""
    hidden, inner, queries, keys = 32, 64, 64, 32
    generator = torch.Generator().manual_seed(0)

    def lively(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    made = {"model.embed_tokens.weight": lively(40, hidden), "lm_head.weight": lively(40, hidden)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        made |= {
            f"{prefix}self_attn.q_proj.weight": lively(queries, hidden),
            f"{prefix}self_attn.k_proj.weight": lively(keys, hidden),
            f"{prefix}self_attn.v_proj.weight": lively(keys, hidden),
            f"{prefix}self_attn.o_proj.weight": lively(hidden, queries),
            f"{prefix}mlp.gate_proj.weight": lively(inner, hidden),
            f"{prefix}mlp.up_proj.weight": lively(inner, hidden),
            f"{prefix}mlp.down_proj.weight": lively(hidden, inner),
            f"{prefix}input_layernorm.weight": 1 + lively(hidden),
            f"{prefix}post_attention_layernorm.weight": 1 + lively(hidden),
        }
    return made | {"model.norm.weight": 1 + lively(hidden)}


Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Makes a model folder; `num_shards` deals the tensors out one by one, as `save` writes them."""

    def make(
        tensors: dict[str, torch.Tensor],
        num_shards: int = 1,
        config: dict[str, Any] | None = None,
        save: Callable[[dict[str, torch.Tensor], Path], Any] = save_file,
        stem: str = "model",
        suffix: str = "safetensors",
        name: str = "source",
    ) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
        if num_shards == 1:
            save(tensors, path / f"{stem}.{suffix}")
            return path
        weight_map: dict[str, str] = {}
        for number, names in enumerate(_dealt(tensors, num_shards), start=1):
            shard = f"{stem}-{number:05d}-of-{num_shards:05d}.{suffix}"
            save({name: tensors[name] for name in names}, path / shard)
            weight_map |= dict.fromkeys(names, shard)
        index = {"metadata": {}, "weight_map": weight_map}
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        return path

    return make


def _dealt(names: Iterable[str], num_shards: int) -> list[list[str]]:
    names = list(names)
    return [names[start::num_shards] for start in range(num_shards)]
