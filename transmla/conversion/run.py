"""One conversion at work: the plan, the machine and the processes that all steps share, and what they read.

Legend: N windows of this process, T tokens, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.conversion.block import FrozenLayer, Head
from transmla.conversion.levels import Refinement
from transmla.conversion.plan import Plan
from transmla.conversion.streams import Streams, allocate
from transmla.devices import narrow_dtype
from transmla.maths.closed_form import ClosedForm
from transmla.model.source import SourceLayer, build_layer, layer_tensor_names, source_config, source_frequencies
from transmla.processes import ALONE, Processes
from transmla.progress import Progress, silent
from transmla.text.windows import skipping_windows, spread_positions

# share of the calibration windows that only measure, and how many at most
HELDOUT_SHARE, MAX_HELDOUT = 1 / 16, 8


@dataclass
class Run:
    """folder: where activations go that shall not stay in memory;  block_layers: layers distilled at once, None: all
    that fit into memory;  num_heldout: windows that only measure, None: a sixteenth, at most 8"""

    plan: Plan
    method: ClosedForm
    refinement: Refinement
    device: torch.device
    progress: Progress
    processes: Processes = ALONE
    folder: Path | None = None
    block_layers: int | None = None
    num_heldout: int | None = None
    autocast: torch.dtype | None = field(init=False)
    frequencies: tuple[Tensor, float] = field(init=False)
    config: Any = field(init=False)

    def __post_init__(self) -> None:
        source = self.plan.source
        self.autocast = narrow_dtype(self.device)
        self.config = source_config(source.config)
        self.frequencies = source_frequencies(self.config, self.plan.gqa, source.rope_frequency_factors)
        if not self.processes.first:
            self.progress = silent

    @property
    def compute(self) -> torch.dtype:
        """Of matrix products in forward passes."""
        return self.autocast or torch.float32

    def layer(self, index: int) -> SourceLayer:
        """Read one layer, float32 on the device."""
        names = layer_tensor_names(self.plan.family, self.config, index)
        read = self.plan.source.read
        tensors = {name: read(name, dtype=torch.float32, device=self.device) for name in names}
        return build_layer(self.plan.family, self.config, self.plan.gqa, index, tensors, *self.frequencies)

    def frozen_layer(self, index: int) -> FrozenLayer:
        """Read what is not attention of a layer."""
        layer = self.layer(index)
        mlp: Any = layer.mlp
        return FrozenLayer(layer.input_layernorm, layer.post_attention_layernorm, mlp.to(self.compute))

    def head(self) -> Head:
        """Read final norm and head."""
        source, family = self.plan.source, self.plan.family
        eps = float(source.config["rms_norm_eps"])
        norm_D = source.read(family.norm, dtype=torch.float32, device=self.device)
        head_VD = source.read(self.head_name).to(self.device, self.compute)
        return Head(lambda x_TD: torch.nn.functional.rms_norm(x_TD, norm_D.shape, norm_D, eps), head_VD)

    def check_outer_weights(self) -> None:
        """Read what is not in a layer once, so that a value that is not finite shows before the work and not after."""
        family = self.plan.family
        for name in {family.embed_tokens, self.head_name, family.norm} if self.processes.first else ():
            self.plan.source.read(name)

    @property
    def head_name(self) -> str:
        """The tensor that predicts: the embedding, if the two are tied."""
        source, family = self.plan.source, self.plan.family
        own = family.lm_head in source.tensors and not source.config.get("tie_word_embeddings")
        return family.lm_head if own else family.embed_tokens

    def streams(self, ids_NT: Tensor, positions_NT: Tensor, num_heldout: int | None = None) -> Streams:
        """Both streams of this process's windows at the input of layer 0.

        ids_NT, positions_NT: of all windows;  num_heldout: the last ones that only measure; default: a sixteenth, at
                              most 8
        """
        if num_heldout is None:
            num_heldout = self.num_heldout or heldout_of(len(ids_NT))
        mine = self.processes.mine(len(ids_NT))
        shape = (len(mine), ids_NT.shape[1], self.plan.gqa.hidden_size)
        source_NTD, converted_NTD = (allocate(shape, self.folder) for _ in range(2))
        self.embed(ids_NT[mine], source_NTD)
        for place in range(len(mine)):
            converted_NTD[place] = source_NTD[place]
        return Streams(
            source_NTD, converted_NTD, num_heldout, self.device, self.autocast, self.processes, len(ids_NT),
            self.folder, positions_NT=positions_NT[mine],
        )  # fmt: skip

    def positions(self, ids_NT: Tensor) -> Tensor:
        """Of the tokens of all windows, int64 [N, T]."""
        seed = self.plan.recipe.seed
        skipping_N = skipping_windows(len(ids_NT), self.num_heldout or heldout_of(len(ids_NT)), seed)
        return spread_positions(skipping_N, ids_NT.shape[1], self.plan.calibration_context, seed)

    def embed(self, ids_NT: Tensor, stream_NTD: Tensor) -> None:
        """Fill a stream with the embeddings; only those of tokens that occur are read."""
        ids, places_NT = ids_NT.unique(return_inverse=True)
        rows = self.plan.source.rows(self.plan.family.embed_tokens, ids).float()
        for place, places_T in enumerate(places_NT):
            stream_NTD[place] = rows[places_T]

    def embedded(self, ids_T: Tensor) -> Tensor:
        """Embeddings of one window, float32 on the CPU."""
        return self.plan.source.rows(self.plan.family.embed_tokens, ids_T).float()


def heldout_of(num_windows: int) -> int:
    """How many calibration windows only measure."""
    return min(MAX_HELDOUT, max(1, round(num_windows * HELDOUT_SHARE)))
