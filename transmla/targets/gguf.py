"""Metadata keys and tensors of a converted folder as GGUF, for llama.cpp's architecture deepseek2.

    token_embd, output, output_norm          unchanged
    attn_q (or attn_q_a, attn_q_b)           unchanged: rotary pairs are interleaved in the folder and in llama.cpp
    attn_kv_a_mqa, attn_kv_a_norm            unchanged
    attn_k_b [H, r, n], attn_v_b [H, v, r]   kv_b split by head; the key half transposed, since it is applied to queries
    ffn_*                                    unchanged; all layers are dense

H num_attention_heads, r kv_lora_rank, n qk_nope_head_dim, v v_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transmla.checkpoint.gguf.describe import BIASES_LEFT_OUT

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURE = "deepseek2"
# tensors with the latent rows of the folded form
SMALL = ("attn_kv_a_mqa.weight", "attn_q_a.weight")
# llama.cpp's number for a sigmoid over expert scores
_SIGMOID = 2


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file and where it comes from.

    name:   name in the GGUF file
    source: name in the converted folder
    shape:  shape in the GGUF file
    make:   maps the tensor of the folder to that of the file
    small:  it has the latent rows of the folded form, which are tiny
    """

    name: str
    source: str
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = _unchanged

    @property
    def small(self) -> bool:
        return self.name.endswith(SMALL)


def gguf_settings(config: Mapping[str, Any], name: str) -> dict[str, int | float | bool | str]:
    """The metadata that llama.cpp reads, by key.

    config: config.json of the converted folder;  name: name of the model

    Attention is described as multi-query attention over the latent, which is what the cache holds.
    """
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    of_model: dict[str, int | float | bool | str] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": 1,
        # 0 instead of leaving the key out, because loading fails without it
        "attention.q_lora_rank": config.get("q_lora_rank") or 0,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rope,
        "rope.freq_base": float(config["rope_theta"]),
        "rope.scaling.type": "none",
        # no layer has experts, but llama.cpp checks that there are more experts than groups
        "leading_dense_block_count": config["num_hidden_layers"],
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "expert_gating_func": _SIGMOID,
    }
    of_file: dict[str, int | float | bool | str] = {
        "general.name": name,
        "general.description": f"multi-head latent attention, {rank} + {rope} cached values per token and layer",
    }
    if config.get("biases_left_out"):
        of_file[BIASES_LEFT_OUT] = True
    return of_file | {f"{ARCHITECTURE}.{key}": value for key, value in of_model.items()}


def gguf_tensors(config: Mapping[str, Any]) -> Iterator[GgufTensor]:
    """Every tensor of the GGUF file, layer by layer; config is config.json of the converted folder."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, rank, rope = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value, q_rank = config["qk_nope_head_dim"], config["v_head_dim"], config.get("q_lora_rank")
    queries = heads * (nope + rope)

    def key_half(kv_b: Tensor) -> Tensor:
        return kv_b.view(heads, nope + value, rank)[:, :nope].transpose(1, 2)

    def value_half(kv_b: Tensor) -> Tensor:
        return kv_b.view(heads, nope + value, rank)[:, nope:]

    through_q_latent = (
        ("attn_q_a", "self_attn.q_a_proj", (q_rank, hidden), _unchanged),
        ("attn_q_a_norm", "self_attn.q_a_layernorm", (q_rank,), _unchanged),
        ("attn_q_b", "self_attn.q_b_proj", (queries, q_rank), _unchanged),
    )
    layer: tuple[tuple[str, str, tuple[Any, ...], Callable[[Tensor], Tensor]], ...] = (
        ("attn_norm", "input_layernorm", (hidden,), _unchanged),
        *(through_q_latent if q_rank else (("attn_q", "self_attn.q_proj", (queries, hidden), _unchanged),)),
        ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa", (rank + rope, hidden), _unchanged),
        ("attn_kv_a_norm", "self_attn.kv_a_layernorm", (rank,), _unchanged),
        ("attn_k_b", "self_attn.kv_b_proj", (heads, rank, nope), key_half),
        ("attn_v_b", "self_attn.kv_b_proj", (heads, value, rank), value_half),
        ("attn_output", "self_attn.o_proj", (hidden, heads * value), _unchanged),
        ("ffn_norm", "post_attention_layernorm", (hidden,), _unchanged),
        ("ffn_gate", "mlp.gate_proj", (inner, hidden), _unchanged),
        ("ffn_up", "mlp.up_proj", (inner, hidden), _unchanged),
        ("ffn_down", "mlp.down_proj", (hidden, inner), _unchanged),
    )
    yield GgufTensor("token_embd.weight", "model.embed_tokens.weight", (vocab, hidden))
    for index in range(config["num_hidden_layers"]):
        for name, source, shape, make in layer:
            yield GgufTensor(f"blk.{index}.{name}.weight", f"model.layers.{index}.{source}.weight", shape, make)
    yield GgufTensor("output_norm.weight", "model.norm.weight", (hidden,))
    yield GgufTensor("output.weight", "lm_head.weight", (vocab, hidden))
