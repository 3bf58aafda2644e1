"""A tiny converted folder with lively weights, and a reference that computes its attention in plain loops."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockForCausalLM

from transmla.model import modeling_transmla

LAYERS, HIDDEN, HEADS, RANK, ROPE, NOPE, VALUE, VOCAB = 3, 48, 6, 12, 8, 8, 8, 97
EPSILON = 1e-6
FOLD = 2.0**-17


def tiny_config(**changes: Any) -> DeepseekV3Config:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "moe_intermediate_size": 8,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "kv_lora_rank": RANK,
        "q_lora_rank": None,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": NOPE,
        "v_head_dim": VALUE,
        "first_k_dense_replace": LAYERS,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "rope_interleave": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "latent_norm_folded": True,
        "auto_map": {"AutoModelForCausalLM": "modeling_transmla.DeepseekV3ForCausalLM"},
    }
    return DeepseekV3Config(**(sizes | changes))


def lively_model(config: DeepseekV3Config, seed: int = 0) -> StockForCausalLM:
    """Weights of deviation 0.2 and random norms; a latent of unit RMS, folded if the config says so."""
    generator = torch.Generator().manual_seed(seed)
    model = StockForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if weight.dim() == 1 and "norm" in name else 0.2 * noise)
        if getattr(config, "latent_norm_folded", False):
            for layer in model.model.layers:
                layer.self_attn.kv_a_proj_with_mqa.weight[:RANK] *= FOLD
                layer.self_attn.kv_a_layernorm.weight.fill_(math.sqrt(EPSILON) / FOLD)
    return model


def write_folder(folder: Path, **changes: Any) -> Path:
    """What the converter would write: the stock state dict, a config with auto_map, and the shipped file."""
    lively_model(tiny_config(**changes)).save_pretrained(folder)
    source = Path(modeling_transmla.__file__)
    (folder / source.name).write_bytes(source.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] and config["architectures"] == ["DeepseekV3ForCausalLM"]
    return folder


def naive_attention(
    attention: Any, hidden: torch.Tensor, theta: float = 10000.0, *, rotate: bool = True
) -> torch.Tensor:
    """One sequence [T, D] through the attention, one head and one token at a time, in float64."""
    weights = {name: weight.double() for name, weight in attention.state_dict().items()}
    hidden = hidden.double()
    down = hidden @ weights["kv_a_proj_with_mqa.weight"].T
    latent = down[:, :RANK] * weights["kv_a_layernorm.weight"] / math.sqrt(EPSILON)
    up = weights["kv_b_proj.weight"].view(HEADS, NOPE + VALUE, RANK)
    queries = (hidden @ weights["q_proj.weight"].T).view(-1, HEADS, NOPE + ROPE)

    def turn(vector: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.view_as_complex(vector.contiguous().view(ROPE // 2, 2))
        angles = position * theta ** (-torch.arange(0, ROPE, 2, dtype=torch.float64) / ROPE)
        return pairs * torch.polar(torch.ones_like(angles), angles * rotate)

    rows = []
    for t in range(hidden.shape[0]):
        heads = []
        for head in range(HEADS):
            scores = []
            for s in range(t + 1):
                plain = queries[t, head, :NOPE] @ (up[head, :NOPE] @ latent[s])
                turned = turn(queries[t, head, NOPE:], t) * turn(down[s, RANK:], s).conj()
                scores.append((plain + turned.sum().real) / math.sqrt(NOPE + ROPE))
            share = torch.stack(scores).softmax(0)
            heads.append(sum(share[s] * (up[head, NOPE:] @ latent[s]) for s in range(t + 1)))
        rows.append(torch.cat(heads))
    output: torch.Tensor = torch.stack(rows) @ weights["o_proj.weight"].T
    return output
