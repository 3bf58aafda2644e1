"""The finished layers on the held-out windows: what the closing summary says.

Legend: N windows, T tokens, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transmla.conversion.kept import DISTILLED, FITTED
from transmla.conversion.run import Run
from transmla.conversion.streams import Streams, advance_converted, converted_heads, next_token_losses
from transmla.errors import VerificationError
from transmla.text.windows import CalibrationTokens


@dataclass(frozen=True)
class HeldoutNats:
    """Mean next-token loss in nats over the held-out calibration windows."""

    source: float
    converted: float
    num_windows: int


def measure(run: Run, streams: Streams) -> HeldoutNats:
    """The finished layers on the held-out windows, the same as the written model will compute: with the packed cache
    that it was refined for, if there is one.

    The streams must be behind the last layer; of the source's, only its end is used.
    """
    part = _part(run, streams)
    total = run.plan.mla.num_hidden_layers
    for index in range(total):
        layer = run.model.layer(index)
        (mla,) = run.kept.layers([index], final_stage(run))
        advance_converted(layer, mla, converted_heads(layer, mla, part, run.read), part)
        del layer  # before the next one is read
        run.progress("measure", index + 1, total, "")
    ends = run.model.ends(run.compute)
    source_N, converted_N = next_token_losses(part, _ids(run.text, part), ends.logits)
    sound = bool(torch.isfinite(source_N).all())
    if not sound or not torch.isfinite(converted_N).all():
        raise VerificationError(
            f"the {'converted' if sound else 'source'} model returns NaN or infinity",
            where="held-out calibration windows",
            why=f"losses {source_N.tolist()} of the source, {converted_N.tolist()} converted",
            remedy="convert with `--refine off`, and please report it: the source is finite on the same text"
            if sound
            else "check the source with `transmla eval SRC --dtype float32`",
        )
    return HeldoutNats(float(source_N.mean()), float(converted_N.mean()), len(source_N))


def _part(run: Run, streams: Streams) -> Streams:
    """Held-out windows: the source's stream behind the last layer, the converted one anew."""
    last = streams.last(streams.num_heldout)
    part = replace(last, converted_NTD=torch.empty_like(last.converted_NTD), kept_in=last.converted_NTD.device)
    run.embed(_ids(run.text, part), part.converted_NTD)
    return part


def _ids(text: CalibrationTokens, part: Streams) -> Tensor:
    """Tokens of the windows of `part`, which are the last ones."""
    return text.ids_NT[len(text.ids_NT) - part.num_windows :][part.indices]


def final_stage(run: Run) -> str:
    """The stage at which a layer's weights have gone through all steps."""
    return FITTED if run.refinement.distil is None else DISTILLED
