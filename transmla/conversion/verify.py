"""Before a folder gets its name: read it back and run it, layer by layer, through the class that it is written for.

The converter's own arithmetic (no latent norm, half-split rotary pairs, unscaled stream) and the class on the written
tensors share no code, so a wrong layout, scale, name or config value cannot pass.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from transmla.checkpoint.destination import disk_errors
from transmla.checkpoint.read import open_source
from transmla.families import FAMILIES, Family
from transmla.maths.attention import MlaWeights, visible
from transmla.model.head import logit_scale
from transmla.model.layer import SourceLayer
from transmla.model.skeleton import skeleton
from transmla.model.source import Ends, embedding_scale
from transmla.progress import Progress
from transmla.targets.comparison import TOLERANCES, WITNESS_TOKENS, compare_logits
from transmla.targets.own import MODEL_TYPE, own_tensors
from transmla.targets.stock import expected_tensors


@dataclass
class Witness:
    """A few tokens that pass through the converted layers in float32 while these are made.

    ids_T: token ids of a window;  stream_TD: their embeddings
    windows, inv_freq_LM: of the layers that they have passed
    """

    ids_T: Tensor
    stream_TD: Tensor
    windows: list[int | None] = field(default_factory=list)
    inv_freq_LM: list[list[float]] = field(default_factory=list)
    logits_TK: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.ids_T = self.ids_T[:WITNESS_TOKENS].clone()
        self.stream_TD = self.stream_TD[:WITNESS_TOKENS].clone()

    def advance(self, layer: SourceLayer, mla: MlaWeights) -> None:
        """Past one converted layer."""
        mla = mla.to(dtype=torch.float32)
        stream_TD = self.stream_TD.to(mla.o_DHv.device)
        self.stream_TD = layer.through(stream_TD, lambda x_TD: layer.latent_attention(x_TD, mla))
        self.windows.append(mla.window)
        self.inv_freq_LM.append(mla.inv_freq_M.tolist())

    @property
    def vocabulary_K(self) -> Tensor:
        """Token ids whose logits are compared: those that occur, sorted."""
        return self.ids_T.unique()

    def finish(self, ends: Ends) -> None:
        """Past the source's head, of which only the rows `vocabulary_K` are given."""
        self.logits_TK = ends.logits(self.stream_TD.to(ends.head.weight_VD.device))


@dataclass(frozen=True)
class Verification:
    """relative_error: of logits, the written class against the converter; tolerance: what was allowed."""

    relative_error: float
    tolerance: float
    num_tensors: int


def verify(folder: Path, family: Family, witness: Witness, device: torch.device, progress: Progress) -> Verification:
    """Compare the written folder with the converter; raises `VerificationError`, holds one layer at a time.

    family: of the source
    """
    source = open_source(folder)
    own = source.config["model_type"] == MODEL_TYPE
    expected = own_tensors(source.config) if own else expected_tensors(source.config)
    source.require(expected)
    with disk_errors(folder):
        config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    # a deepseek_v3 folder has the layout of llama, and neither scales nor caps
    family = family if own else FAMILIES["llama"]
    # as the class understands config.json, which it fills in where that is silent
    values: dict[str, Any] = config.text_config.to_dict() if own else {}
    model = skeleton(config)
    base = model.get_submodule(family.layers.rpartition(".")[0])
    embedding = embedding_scale(family, values) if own else 1.0
    embeddings = f"{family.embed_tokens}.weight"
    hidden_1TD = source.rows(embeddings, witness.ids_T).float().to(device)[None] * embedding
    positions = torch.arange(len(witness.ids_T), device=device)[None]
    rotary: Any = type(base.rotary_emb)(config).to(device)
    with torch.no_grad():
        for index, window in enumerate(witness.windows):
            layer: Any = copy.deepcopy(model.get_submodule(family.layers)[index])
            prefix = f"{family.layers}.{index}."
            tensors = {
                name: source.read(prefix + name, dtype=torch.float32, device=device) for name in layer.state_dict()
            }
            layer.load_state_dict(tensors, assign=True)
            seen_TT = visible(positions[0], window)
            out = layer.eval()(
                hidden_1TD,
                attention_mask=None if seen_TT is None else seen_TT[None, None],
                position_embeddings=rotary(hidden_1TD, positions),
            )
            hidden_1TD = out if isinstance(out, Tensor) else out[0]
            del layer, tensors  # before the next ones are read
            progress("verify", index + 1, len(witness.windows), "")
        norm: Any = copy.deepcopy(model.get_submodule(family.norm))
        norm.load_state_dict(
            {
                name: source.read(f"{family.norm}.{name}", dtype=torch.float32, device=device)
                for name in norm.state_dict()
            },
            assign=True,
        )
        # read whole, although few rows are compared: what is not finite is refused here
        source.read(embeddings)
        head = "lm_head.weight" if "lm_head.weight" in expected else embeddings
        found_TK = norm(hidden_1TD[0]) @ source.read(head)[witness.vocabulary_K].to(device, torch.float32).T
        if "lm_head.bias" in expected:
            found_TK = found_TK + source.read("lm_head.bias")[witness.vocabulary_K].to(device, torch.float32)
        found_TK = found_TK * logit_scale(values)
        if cap := values.get("final_logit_softcapping"):
            found_TK = cap * torch.tanh(found_TK / cap)
    stored = str(source.config["dtype"])
    error = compare_logits(folder, found_TK, witness.logits_TK.to(device), stored)
    return Verification(error, TOLERANCES[stored], len(expected))
