"""Many layers at once against the source: the last block against its predictions, earlier blocks against its stream.

One block is the whole model where that fits into memory. Its weights are then distilled from end to end
(attention only; Hinton et al., 1503.02531) on the calibration windows: no labels, no text beyond them, and no source
model in memory, since its stream behind the last layer is known already.

Legend: see transmla/conversion/streams.py; B windows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.conversion.descent import Descender, detached, tokens_per_pass, trainable
from transmla.conversion.levels import Descent
from transmla.conversion.streams import Streams
from transmla.maths.attention import MlaWeights, Reading
from transmla.model.layer import SourceLayer
from transmla.model.source import Ends
from transmla.train.losses import distillation_loss, predictions_of, stream_error


@dataclass(frozen=True)
class DistilledBlock:
    """Weights (float32) and their mean loss over the held-out windows, before and after; in nats behind a head."""

    weights: list[MlaWeights]
    loss_before: float
    loss_after: float


def through(
    block: Sequence[SourceLayer],
    weights: Sequence[MlaWeights],
    stream_BTD: Tensor,
    positions_BT: Tensor | None = None,
    read: Reading | None = None,
) -> Tensor:
    """Converted stream past a block of layers, float32; differentiable in `weights`.

    positions_BT, read: see `mla_attention`
    """
    for layer, mla in zip(block, weights, strict=True):

        def attend(x_BTD: Tensor, layer: SourceLayer = layer, mla: MlaWeights = mla) -> Tensor:
            return layer.latent_attention(x_BTD, mla, positions_BT, read).float()

        stream_BTD = layer.through(stream_BTD, attend)
    return stream_BTD


class BlockDistiller:
    """Trains one block; the streams hold its input (converted) and what the source has behind it (source).

    num_windows: of all processes, the first ones, that are trained on; None: all that are fitted to
    read: what is attended to of the latents, in training and measuring; None: the latents as they are
    """

    def __init__(
        self,
        block: Sequence[SourceLayer],
        weights: Sequence[MlaWeights],
        streams: Streams,
        ends: Ends | None,
        descent: Descent,
        num_windows: int | None = None,
        read: Reading | None = None,
    ) -> None:
        self._block, self._streams, self._ends, self._read = block, streams, ends, read
        self._given = [mla.to(dtype=torch.float32) for mla in weights]
        self.trained = [trainable(mla, streams.device) for mla in weights]
        num_windows = num_windows or streams.num_fitted_of_all
        self.descender = Descender(self.trained, descent, num_windows, streams.processes)

    def losses(self, places: list[int], weights: Sequence[MlaWeights]) -> tuple[Tensor, Tensor]:
        """Of windows of this process, each the mean over its tokens: their sum, to descend on, and each of them."""
        streams = self._streams
        target_BTD = streams.source_NTD[places].to(streams.device)
        with streams.computing():
            stream_BTD = streams.converted_NTD[places].to(streams.device)
            found_BTD = through(self._block, weights, stream_BTD, streams.positions(places), self._read)
        if self._ends is None:
            errors = [stream_error(found, target) for found, target in zip(found_BTD, target_BTD, strict=True)]
            losses_B = torch.stack(errors)
            return losses_B.sum(), losses_B.detach()
        batch, tokens, _ = target_BTD.shape
        found_ND, target_ND = (self._ends.inputs(stream_BTD).flatten(0, 1) for stream_BTD in (found_BTD, target_BTD))
        head_VD, softcap = self._ends.head.weight_VD, self._ends.head.softcap
        teacher = predictions_of(target_ND, head_VD, softcap)
        weights_N = torch.full((batch * tokens,), 1 / tokens, device=streams.device)
        loss, found_N = distillation_loss(found_ND, head_VD, teacher, weights_N, softcap=softcap)
        return loss, found_N.view(batch, tokens).mean(1)

    def heldout(self) -> float:
        """Mean loss over the held-out windows of all processes, with the weights as they are now."""
        return self._streams.mean_heldout(lambda place: self.losses([place], self.trained)[1][0])

    def run(self, loss_before: float, after_step: Callable[[float], None]) -> DistilledBlock:
        """Take all steps that remain; weights that do not lower the held-out loss are not taken.

        loss_before: of the weights that were given, from `heldout`
        """
        places = {index: place for place, index in enumerate(self._streams.indices)}
        at_once = max(1, tokens_per_pass(self._streams.device) // self._streams.source_NTD.shape[1])
        for loss in self.descender.steps(lambda here: self.losses(here, self.trained)[0], places, at_once):
            after_step(loss)
        after = self.heldout()
        if not after < loss_before:
            return DistilledBlock(self._given, loss_before, loss_before)
        return DistilledBlock([detached(mla) for mla in self.trained], loss_before, after)
