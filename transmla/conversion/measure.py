"""The finished layers on the held-out windows: what the closing summary says, and the sizes that the fold needs.

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

# fitted windows that the largest latent is searched in, besides the held-out ones
NUM_PEAK = 8


@dataclass(frozen=True)
class HeldoutNats:
    """Mean next-token loss in nats over the held-out calibration windows."""

    source: float
    converted: float
    num_windows: int


@dataclass(frozen=True)
class Measured:
    """Largest mean square of one token's latent by layer, and of its queries' latent: see `maths.fold.latent_scale`."""

    heldout: HeldoutNats
    latent_peaks: tuple[float, ...]
    query_peaks: tuple[float, ...]


def measure(run: Run, streams: Streams) -> Measured:
    """The finished layers on the held-out windows and a few others, the same as the written model will compute.

    The streams must be behind the last layer; of the source's, only its end is used.
    """
    part = _part(run, streams)
    peaks, query_peaks = [], []
    total = run.plan.mla.num_hidden_layers
    for index in range(total):
        layer = run.model.layer(index)
        (mla,) = run.kept.layers([index], final_stage(run))
        heads = converted_heads(layer, mla, part)
        advance_converted(layer, mla, heads.out_NTF, part)
        del layer  # before the next one is read
        peaks.append(heads.latent_peak)
        query_peaks.append(heads.query_peak)
        run.progress("measure", index + 1, total, "")
    ends = run.model.ends(run.compute)
    source_N, converted_N = next_token_losses(part, _ids(run.text, part), ends.logits)
    if not torch.isfinite(source_N).all() or not torch.isfinite(converted_N).all():
        raise VerificationError(
            "the model returns NaN or infinity",
            where="held-out calibration windows",
            why=f"losses {source_N.tolist()} of the source, {converted_N.tolist()} converted",
            remedy="check the source with `transmla eval SRC --dtype float32`",
        )
    nats = HeldoutNats(float(source_N.mean()), float(converted_N.mean()), len(source_N))
    return Measured(nats, tuple(peaks), tuple(query_peaks))


def _part(run: Run, streams: Streams) -> Streams:
    """Held-out windows and a few fitted ones: the source's stream behind the last layer, the converted one anew."""
    last = streams.last(min(streams.num_windows, streams.num_heldout + NUM_PEAK))
    part = replace(last, converted_NTD=torch.empty_like(last.converted_NTD), kept_in=last.converted_NTD.device)
    run.embed(_ids(run.text, part), part.converted_NTD)
    return part


def _ids(text: CalibrationTokens, part: Streams) -> Tensor:
    """Tokens of the windows of `part`, which are the last ones."""
    return text.ids_NT[len(text.ids_NT) - part.num_windows :][part.indices]


def final_stage(run: Run) -> str:
    """The stage at which a layer's weights have gone through all steps."""
    return FITTED if run.refinement.distil is None else DISTILLED
