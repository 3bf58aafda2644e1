"""One layer against the source's stream (method, section 4): it repairs what the layers before it broke.

Legend: see transmla/conversion/streams.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.conversion.levels import Descent
from transmla.conversion.streams import Streams
from transmla.maths.attention import MlaWeights, mla_attention
from transmla.maths.losses import stream_error
from transmla.model.source import SourceLayer
from transmla.train.descent import Descender, detached, tokens_per_pass, trainable


@dataclass(frozen=True)
class RefinedLayer:
    """Weights (float32) and their mean loss over the held-out windows, before and after."""

    mla: MlaWeights
    loss_before: float
    loss_after: float


def refine_layer(
    layer: SourceLayer, mla: MlaWeights, streams: Streams, descent: Descent, progress: Callable[[int, int, str], None]
) -> RefinedLayer:
    """Fit all weights of one attention block to the source's stream behind it.

    `add_source_attention` must have run, the converted stream must still be in front of the block. Weights that do not
    lower the loss of the held-out windows are not taken.
    """
    trained = trainable(mla, streams.device)

    def losses(places: list[int]) -> list[Tensor]:
        target_BTD = streams.source_NTD[places].to(streams.device)
        converted_BTD = streams.converted_NTD[places].to(streams.device)
        with streams.computing():
            x_hat_BTD = layer.input_layernorm(converted_BTD)
            out_BTD = mla_attention(x_hat_BTD, trained, streams.positions(places)) @ trained.o_DHv.T
        found_BTD = converted_BTD + out_BTD.float()
        return [stream_error(found, target) for found, target in zip(found_BTD, target_BTD, strict=True)]

    before = streams.mean_heldout(lambda place: losses([place])[0])
    descender = Descender([trained], descent, streams.num_fitted_of_all, streams.processes)
    places = {index: place for place, index in enumerate(streams.indices)}
    at_once = max(1, tokens_per_pass(streams.device) // streams.source_NTD.shape[1])
    for loss in descender.steps(lambda here: torch.stack(losses(here)).sum(), places, at_once):
        progress(descender.done, descender.num_steps, f"stream error {loss:.2%}")
    after = streams.mean_heldout(lambda place: losses([place])[0])
    if not after < before:
        return RefinedLayer(mla.to(dtype=torch.float32), before, before)
    return RefinedLayer(detached(trained), before, after)
