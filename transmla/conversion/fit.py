"""The closed form, layer by layer: calibrate -> split -> factor -> repair. Each finished layer is kept in the journal.

Never more than one layer of weights, the two streams of calibration activations and one head buffer are in memory.
Legend: see transmla/conversion/streams.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transmla.conversion.kept import FITTED
from transmla.conversion.moments import observe
from transmla.conversion.run import Run
from transmla.conversion.streams import (
    Repair,
    Streams,
    advance_converted,
    advance_source,
    converted_heads,
    stream_loss,
)
from transmla.maths.attention import MlaWeights
from transmla.maths.closed_form import FittedLayer, aim, fit_aimed
from transmla.model.layer import SourceLayer

# windows whose attention matrices enter the moments, and the least number of their tokens per feature
NUM_ATTENDED, ATTENDED_PER_FEATURE = 16, 8


@dataclass(frozen=True)
class LayerReport:
    """What one layer lost, and the ridges that were chosen for it: see `FittedLayer`, `Repair`, and `StreamLoss` behind
    it."""

    layer: int
    latent_loss: float
    stream_loss_fitted: float
    stream_loss_heldout: float
    query_loss: float | None = None
    stream_ridge: float | None = None
    output_ridge: float | None = None


def fit_layers(run: Run, streams: Streams, theta: float | None) -> tuple[LayerReport, ...]:
    """Fit every layer that the journal does not hold yet; the source's stream ends behind the last one.

    Where distillation follows, the closed form uses only some of the windows; the others only pass through the source.
    """
    reports = []
    total = run.plan.mla.num_hidden_layers
    closed = streams.last(num_closed(run, streams))
    for index in range(total):
        layer = run.model.layer(index)
        kept = run.kept.layer(index, FITTED)
        if kept is None:
            mla, report = _fit(run, layer, streams, closed, theta)
            run.kept.save_layer(index, FITTED, mla, vars(report))
        else:
            mla, report = kept[0], LayerReport(**kept[1])
            advance_source(layer, streams)
            advance_converted(layer, mla, converted_heads(layer, mla, closed), closed)
        del layer  # before the next one is read
        reports.append(report)
        run.progress("convert layers", index + 1, total, f"stream error {report.stream_loss_heldout:.2%} held out")
    return tuple(reports)


def num_closed(run: Run, streams: Streams) -> int:
    """Windows of all processes that the closed form sees, held-out ones included."""
    window = streams.source_NTD.shape[1]
    return run.refinement.num_closed(streams.num_windows, streams.num_heldout, window, run.plan.mla.widest)


def _fit(
    run: Run, layer: SourceLayer, streams: Streams, closed: Streams, theta: float | None
) -> tuple[MlaWeights, LayerReport]:
    """One layer; the source's stream behind it, and the converted one of the windows that are fitted to."""
    fitted = _factored(run, layer, closed, theta)
    mla = layer.complete(fitted.mla)
    heads_NTF = converted_heads(layer, mla, closed)
    repair, before = Repair(layer, mla, heads_NTF, closed), len(streams.indices) - len(closed.indices)

    def see(places: slice, stream_BTD: Tensor, out_BTD: Tensor) -> None:
        repair.see(slice(places.start - before, places.stop - before), stream_BTD, out_BTD)

    advance_source(layer, streams, see)
    # float32, as the journal keeps it: a resumed run computes the same
    repaired, output_ridge = repair.fitted(run.method.ridges(run.method.output_ridge))
    mla = _agreed(repaired.to(dtype=torch.float32), run)
    advance_converted(layer, mla, heads_NTF, closed)
    loss = stream_loss(closed)
    return mla, LayerReport(
        layer.index, fitted.latent_loss, loss.fitted, loss.heldout, fitted.query_loss, fitted.stream_ridge, output_ridge
    )


def _factored(run: Run, layer: SourceLayer, closed: Streams, theta: float | None) -> FittedLayer:
    """One layer without the repair, float32; its moments and all in float64 are gone before the streams pass it."""
    sizes = run.plan.mla
    moments = observe(layer, closed, num_attended(sizes.widest, closed.source_NTD.shape[1]))
    aimed = aim(layer.gqa, moments, run.method)
    moments = moments.of_converted()
    fitted = fit_aimed(
        aimed, moments, sizes.kv_lora_rank, sizes.qk_rope_head_dim, theta, run.method, sizes.q_lora_rank,
        biases=not run.plan.recipe.lossy,
    )  # fmt: skip
    return replace(fitted, mla=fitted.mla.to(dtype=torch.float32))


def num_attended(width: int, window: int) -> int:
    """Windows of `window` tokens whose attention matrices enter the moments of `width` features."""
    return max(NUM_ATTENDED, -(-ATTENDED_PER_FEATURE * width // window))


def _agreed(mla: MlaWeights, run: Run) -> MlaWeights:
    """The weights of process 0: the last bits of an eigenvector may differ between machines."""
    if run.processes.size == 1:
        return mla
    first: Any = run.processes.from_first(mla.to(device="cpu"))
    return first.to(device=run.device)
