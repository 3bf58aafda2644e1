"""The source model, read in pieces: one layer at a time, embeddings, final norm and head.

Legend: see transmla/model/layer.py.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transmla.checkpoint.read import Source
from transmla.families import Family
from transmla.geometry import GqaGeometry
from transmla.model.head import Head, logit_scale
from transmla.model.layer import SourceLayer, build_layer
from transmla.model.outline import is_tied
from transmla.model.skeleton import layer_tensors, skeleton, source_config


@dataclass(frozen=True)
class Ends:
    """What turns the residual stream into logits.

    norm: the final norm, float32;  head: lm_head
    """

    norm: Callable[[Tensor], Tensor]
    head: Head

    def inputs(self, stream_TD: Tensor) -> Tensor:
        """What the matrix of the head is multiplied with, float32."""
        return self.head.inputs(self.norm(stream_TD))

    def logits(self, stream_TD: Tensor) -> Tensor:
        """[T, V], in the dtype of the head."""
        return self.head.logits(self.norm(stream_TD))


class SourceModel:
    """Reads pieces of the source onto `device`; nothing is kept in memory.

    source:   the opened checkpoint
    family:   its row in the table of families
    geometry: sizes of its attention
    device:   where the pieces are put

    All methods that read raise `SourceError` for tensors that are missing, damaged or not finite.
    """

    def __init__(self, source: Source, family: Family, geometry: GqaGeometry, device: torch.device) -> None:
        self.source, self.family, self.geometry, self.device = source, family, geometry, device
        self.config: Any = source_config(source.config)
        self.skeleton = skeleton(self.config)

    @functools.cached_property
    def tied(self) -> bool:
        """Whether lm_head is the embeddings: as the config says, unless the checkpoint has a head of other values.

        So does transformers (`PreTrainedModel.tie_weights`).
        """
        head, embeddings = (f"{name}.weight" for name in (self.family.lm_head, self.family.embed_tokens))
        if not is_tied(self.config.to_dict()):
            return False
        return head not in self.source.tensors or torch.equal(self.source.read(head), self.source.read(embeddings))

    @property
    def head_name(self) -> str:
        """Name of the tensor that is used as lm_head."""
        return f"{self.family.embed_tokens if self.tied else self.family.lm_head}.weight"

    @property
    def eps(self) -> float:
        """Epsilon of the RMS norms."""
        return float(self.config.rms_norm_eps)

    def layer(self, index: int) -> SourceLayer:
        """Layer number `index`, in float32. The disk reads the next one ahead: layers are wanted in order."""

        def read(name: str) -> Tensor:
            return self.source.read(name, dtype=torch.float32, device=self.device)

        stored = layer_tensors(self.family, self.skeleton, index)
        tensors = {name: one.assembled(read) for name, one in stored.items()}
        if index + 1 < self.geometry.num_hidden_layers:
            following = layer_tensors(self.family, self.skeleton, index + 1)
            self.source.announce(part for one in following.values() for part in one.parts)
        factors = self.source.rope_frequency_factors
        return build_layer(self.family, self.skeleton, self.geometry, index, tensors, factors)

    def final_norm(self) -> nn.Module:
        """The final norm, float32."""
        norm = copy.deepcopy(self.skeleton.get_submodule(self.family.norm))
        tensors = {
            name: self.source.read(f"{self.family.norm}.{name}", dtype=torch.float32, device=self.device)
            for name in norm.state_dict()
        }
        norm.load_state_dict(tensors, assign=True)
        return norm.requires_grad_(False)

    def ends(self, dtype: torch.dtype, rows_K: Tensor | None = None) -> Ends:
        """The final norm in float32, and lm_head in `dtype`; rows_K: ids of the tokens whose rows are wanted, or all"""
        bias = f"{self.family.lm_head}.bias"

        def read(name: str) -> Tensor:
            if rows_K is None:
                return self.source.read(name, dtype=dtype, device=self.device)
            return self.source.rows(name, rows_K).to(self.device, dtype)

        weight_VD, biased = read(self.head_name), bias in self.source.tensors
        if biased:
            weight_VD = torch.cat([weight_VD, read(bias)[:, None]], dim=1)
        values = self.config.to_dict()
        head = Head(weight_VD, logit_scale(values), values.get("final_logit_softcapping"), biased)
        return Ends(self.final_norm(), head)

    def embed(self, ids_NT: Tensor) -> Iterator[Tensor]:
        """Embeddings of each window of token ids, float32 [T, D] on the CPU.

        Only the rows of tokens that occur are read.
        """
        ids, places_NT = ids_NT.unique(return_inverse=True)
        scale = embedding_scale(self.family, self.config.to_dict())
        rows = self.source.rows(f"{self.family.embed_tokens}.weight", ids).float() * scale
        return (rows[places_T] for places_T in places_NT)

    def check_ends(self) -> None:
        """Read embeddings, final norm and lm_head once; raises `SourceError` if a value is not finite."""
        for name in {f"{self.family.embed_tokens}.weight", self.head_name, f"{self.family.norm}.weight"}:
            self.source.read(name)


def embedding_scale(family: Family, config: Mapping[str, Any]) -> float:
    """What embeddings are multiplied with before the first layer."""
    if family.embedding_scale == "sqrt":
        return float(config["hidden_size"]) ** 0.5
    return float(config.get("embedding_multiplier") or 1.0)
