"""One conversion at work: what is fixed before its steps begin, and what all of them share.

Legend: N windows, T tokens, D hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from transmla.conversion.kept import KeptLayers
from transmla.conversion.levels import Refinement
from transmla.conversion.plan import Plan, with_latent, with_sizes
from transmla.conversion.streams import CPU, Streams, allocate
from transmla.devices import narrow_dtype
from transmla.geometry import MlaGeometry
from transmla.maths.attention import Reading
from transmla.maths.closed_form import ClosedForm
from transmla.model.rounding import Rounding
from transmla.model.source import SourceModel
from transmla.processes import Processes
from transmla.progress import Progress
from transmla.text.windows import CalibrationTokens, skipping_windows, spread_positions


@dataclass(frozen=True)
class Run:
    """model:    reads the source;  text: the calibration windows;  kept: the finished steps
    kept_in:     where calibration activations are: a device, or a folder if they fit into no memory
    block_layers: layers distilled at once; None: all that fit into memory
    narrow:      dtype of the products in forward passes where the device has one; None: float32
    """

    plan: Plan
    model: SourceModel
    text: CalibrationTokens
    kept: KeptLayers
    method: ClosedForm
    refinement: Refinement
    device: torch.device
    processes: Processes
    progress: Progress
    kept_in: Path | torch.device = CPU
    block_layers: int | None = None
    narrow: torch.dtype | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "narrow", narrow_dtype(self.device))

    def with_latent(self, latent: int) -> Run:
        """The same conversion at another kv_lora_rank."""
        return self.with_sizes(with_latent(self.plan, latent).mla)

    def with_sizes(self, mla: MlaGeometry) -> Run:
        """The same conversion at other sizes."""
        return replace(self, plan=with_sizes(self.plan, mla), kept=self.kept.of(mla))

    @property
    def compute(self) -> torch.dtype:
        """Of matrix products in forward passes."""
        return self.narrow or torch.float32

    @property
    def read(self) -> Reading | None:
        """What is attended to of latents from the refinement on: what a packed cache holds, if the recipe says so."""
        recipe, sizes = self.plan.recipe, self.plan.mla
        if recipe.latent_bits is None:
            return None
        return Rounding(sizes.kv_lora_rank, sizes.qk_rope_head_dim, recipe.latent_bits, recipe.latent_recent).read

    def streams(self) -> Streams:
        """Both streams of this process's windows at the input of layer 0."""
        seed, (num_windows, window) = self.plan.recipe.seed, self.text.ids_NT.shape
        skipping_N = skipping_windows(num_windows, self.text.num_heldout, seed)
        positions_NT = spread_positions(skipping_N, window, self.plan.calibration_context, seed)
        return self.streams_of(self.text.ids_NT, positions_NT, self.text.num_heldout, self.processes, self.kept_in)

    def streams_of(
        self,
        ids_NT: Tensor,
        positions_NT: Tensor,
        num_heldout: int,
        processes: Processes,
        kept_in: Path | torch.device = CPU,
    ) -> Streams:
        """Streams of other windows, dealt to `processes`; the last `num_heldout` only measure."""
        mine = processes.mine(len(ids_NT))
        shape = (len(mine), ids_NT.shape[1], self.plan.gqa.hidden_size)
        source_NTD, converted_NTD = (allocate(shape, kept_in) for _ in range(2))
        self.embed(ids_NT[mine], source_NTD)
        for place in range(len(mine)):
            converted_NTD[place] = source_NTD[place]
        return Streams(
            source_NTD, converted_NTD, num_heldout, self.device, self.narrow, processes, len(ids_NT), kept_in,
            positions_NT=positions_NT[mine],
        )  # fmt: skip

    def embed(self, ids_NT: Tensor, stream_NTD: Tensor) -> None:
        """Fill a stream with the embeddings of its tokens."""
        for place, embedded_TD in enumerate(self.model.embed(ids_NT)):
            stream_NTD[place] = embedded_TD
