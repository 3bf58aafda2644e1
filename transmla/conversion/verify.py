"""Before a folder gets its name: read it back and run it, layer by layer, through the stock deepseek_v3 class.

The converter's own arithmetic (no latent norm, half-split rotary pairs, unscaled stream) and the stock class on the
written tensors share no code, so a wrong layout, scale, name or config value cannot pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock

from transmla.checkpoint.read import open_source
from transmla.maths.attention import MlaWeights, mla_attention
from transmla.model.source import SourceLayer
from transmla.progress import Progress
from transmla.targets.comparison import TOLERANCES, WITNESS_TOKENS, compare_logits
from transmla.targets.stock import expected_tensors


class Witness:
    """A few tokens that pass through the converted layers in float32 while these are made."""

    def __init__(self, ids_T: Tensor, embedded_TD: Tensor) -> None:
        """ids_T: token ids of a window; embedded_TD: their embeddings"""
        self.ids_T = ids_T[:WITNESS_TOKENS].clone()
        self.stream_TD = embedded_TD[:WITNESS_TOKENS].clone()

    def advance(self, layer: SourceLayer, mla: MlaWeights) -> None:
        """Past one converted layer."""
        mla = mla.to(dtype=torch.float32)
        stream_TD = self.stream_TD.to(mla.o_DHv.device)
        stream_TD = stream_TD + mla_attention(layer.input_layernorm(stream_TD), mla) @ mla.o_DHv.T
        self.stream_TD = stream_TD + layer.mlp(layer.post_attention_layernorm(stream_TD))

    @property
    def vocabulary_K(self) -> Tensor:
        """Token ids whose logits are compared: those that occur, sorted."""
        return self.ids_T.unique()

    def finish(self, norm_D: Tensor, eps: float, head_KD: Tensor) -> None:
        """Past the final norm and the rows `vocabulary_K` of the head; both as in the source."""
        stream_TD = self.stream_TD.to(norm_D.device)
        normed_TD = torch.nn.functional.rms_norm(stream_TD, norm_D.shape, norm_D.float(), eps)
        self.logits_TK = normed_TD @ head_KD.to(normed_TD).T


@dataclass(frozen=True)
class Verification:
    """relative_error: of logits, stock class against converter; tolerance: what was allowed."""

    relative_error: float
    tolerance: float
    num_tensors: int


def verify(folder: Path, witness: Witness, device: torch.device, progress: Progress) -> Verification:
    """Compare the written folder with the converter; raises `VerificationError`, holds one layer at a time."""
    source = open_source(folder)
    expected = expected_tensors(source.config)
    source.require(expected)
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    hidden_1TD = source.rows("model.embed_tokens.weight", witness.ids_T).float().to(device)[None]
    positions = torch.arange(len(witness.ids_T), device=device)[None]
    with torch.no_grad():
        angles = stock.DeepseekV3RotaryEmbedding(config).to(device)(hidden_1TD, positions)
        for index in range(config.num_hidden_layers):
            with torch.device("meta"):
                layer = stock.DeepseekV3DecoderLayer(config, index)
            prefix = f"model.layers.{index}."
            tensors = {
                name: source.read(prefix + name, dtype=torch.float32, device=device) for name in layer.state_dict()
            }
            layer.load_state_dict(tensors, assign=True)
            hidden_1TD = layer.eval()(hidden_1TD, attention_mask=None, position_embeddings=angles)
            del layer, tensors  # before the next ones are read
            progress("verify", index + 1, config.num_hidden_layers, "")
        norm = stock.DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps).to(device)
        norm.load_state_dict({"weight": source.read("model.norm.weight", dtype=torch.float32, device=device)})
        # read whole, although few rows are compared: what is not finite is refused here
        source.read("model.embed_tokens.weight")
        head_KD = source.read("lm_head.weight")[witness.vocabulary_K].to(device, torch.float32)
        found_TK = norm(hidden_1TD[0]) @ head_KD.T
    stored = str(config.dtype).removeprefix("torch.")
    error = compare_logits(folder, found_TK, witness.logits_TK.to(device), stored)
    return Verification(error, TOLERANCES[stored], len(expected))
