"""Layer by layer: calibrate -> split -> factor -> repair -> refine. Each finished layer goes into the journal.

Never more than one layer of weights, the two streams of calibration activations and one head buffer are in memory.
Legend: see transmla/conversion/streams.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.journal import Journal
from transmla.conversion.layerwise import refine_layer
from transmla.conversion.moments import observe
from transmla.conversion.run import Run
from transmla.conversion.streams import (
    Streams,
    add_converted_attention,
    add_mlp,
    add_source_attention,
    converted_heads,
    repair_output,
    stream_loss,
)
from transmla.conversion.theta import candidates, choose, output_error, surveyed_layers
from transmla.families import rope_parameters
from transmla.maths.attention import MlaWeights
from transmla.maths.closed_form import fit_layer
from transmla.maths.widen import widen
from transmla.model.source import SourceLayer
from transmla.processes import ALONE
from transmla.text.windows import CalibrationTokens, spread_positions

# windows whose attention matrices are looked at
NUM_ATTENDED = 16
# windows of the survey that chooses theta
NUM_SURVEYED = 6


@dataclass(frozen=True)
class LayerReport:
    """What one layer lost: see `FittedLayer`, and `StreamLoss` behind it; refined_* are the held-out stream errors
    before and after layer-wise refinement, equal where there was none."""

    layer: int
    latent_loss: float
    stream_loss_fitted: float
    stream_loss_heldout: float
    refined_before: float
    refined_after: float
    query_loss: float | None = None


def choose_theta(run: Run, text: CalibrationTokens, journal: Journal) -> tuple[float, dict[float, list[float]]]:
    """rope_theta of the target and, if it was chosen here, the losses of all candidates by surveyed layer."""
    wanted = run.plan.recipe.theta
    if not isinstance(wanted, str):
        return float(wanted), {}
    if kept := run.processes.from_first(journal.load(step_name(run, "theta"))):
        return kept[1]["chosen"], {float(theta): losses for theta, losses in kept[1]["losses"].items()}
    own = float(rope_parameters(run.plan.source.config)["rope_theta"])
    mla = run.plan.mla
    tried = candidates(own, run.plan.gqa.head_dim, mla.qk_rope_head_dim)
    every = max(1, len(text.ids_NT) // NUM_SURVEYED)
    # so few windows are not worth dealing out
    alone = replace(run, processes=ALONE, folder=None)
    surveyed_NT = text.ids_NT[::every][:NUM_SURVEYED]
    # both kinds among the fitted ones, and among the last two, which measure
    skipping_N = torch.arange(len(surveyed_NT)) % 2 == 1
    window, context = surveyed_NT.shape[1], run.plan.calibration_context
    positions_NT = spread_positions(skipping_N, window, context, run.plan.recipe.seed)
    streams = alone.streams(surveyed_NT, positions_NT, num_heldout=max(1, len(surveyed_NT) // 3))
    streams.converted_NTD = streams.source_NTD
    method = replace(run.method, two_streams=False)
    losses: dict[float, list[float]] = {theta: [] for theta in tried}
    surveyed = surveyed_layers(mla.num_hidden_layers)
    for index in range(max(surveyed) + 1):
        layer = run.layer(index)
        if index in surveyed:
            moments = observe(layer, streams, streams.num_fitted, two_streams=False)
            for theta in tried:
                sizes = (mla.kv_lora_rank, mla.qk_rope_head_dim)
                losses[theta].append(output_error(layer, moments, streams, sizes, theta, method))
        add_source_attention(layer, streams)
        add_mlp(layer, streams, only="source")
        del layer  # before the next one is read
        run.progress("choose theta", index + 1, max(surveyed) + 1, "")
    chosen: float = run.processes.from_first(choose(losses))
    if run.processes.first:
        values = {"chosen": chosen, "losses": {str(theta): found for theta, found in losses.items()}}
        journal.save(step_name(run, "theta"), {}, values)
    return chosen, losses


def fit_layers(run: Run, streams: Streams, theta: float, journal: Journal) -> tuple[LayerReport, ...]:
    """Fit every layer that the journal does not hold yet; the source's stream ends behind the last one.

    Where distillation follows, the closed form is content with some of the windows; the others only pass the source.
    """
    reports = []
    total = run.plan.mla.num_hidden_layers
    closed = streams.last(num_closed(run, streams))
    for index in range(total):
        layer = run.layer(index)
        kept = run.processes.from_first(journal.load(layer_name(run, index)))
        if kept is None:
            mla, report = _fit(run, layer, streams, closed, theta)
            if run.processes.first:
                journal.save(layer_name(run, index), packed(mla), vars(report))
        else:
            mla, report = unpacked(kept[0], run), LayerReport(**kept[1])
            add_source_attention(layer, streams)
            add_converted_attention(mla.o_DHv, converted_heads(layer, mla, closed).out_NTF, closed)
        add_mlp(layer, streams, only="source")
        add_mlp(layer, closed, only="converted")
        del layer  # before the next one is read
        reports.append(report)
        run.progress("convert layers", index + 1, total, _remark(report))
    return tuple(reports)


def num_closed(run: Run, streams: Streams) -> int:
    """Windows of all processes that the closed form sees, held-out ones included."""
    tokens = run.refinement.closed_form_tokens
    if tokens is None or run.refinement.distil is None:
        return streams.num_windows
    wanted = max(1, tokens // streams.source_NTD.shape[1]) + streams.num_heldout
    return min(streams.num_windows, wanted)


def _fit(
    run: Run, layer: SourceLayer, streams: Streams, closed: Streams, theta: float
) -> tuple[MlaWeights, LayerReport]:
    """One layer, the source's stream past its attention, and the converted one of the windows that are fitted to."""
    sizes, method = run.plan.mla, run.method
    moments = observe(layer, closed, NUM_ATTENDED, two_streams=method.two_streams)
    gqa = layer.gqa.to(dtype=torch.float64)
    fitted = fit_layer(gqa, moments, sizes.kv_lora_rank, sizes.qk_rope_head_dim, theta, method, sizes.q_lora_rank)
    add_source_attention(layer, streams)
    heads_NTF = converted_heads(layer, fitted.mla, closed).out_NTF
    o_DHv = fitted.mla.o_DHv
    if method.refit_output:
        o_DHv = repair_output(o_DHv, heads_NTF, closed, method.output_ridge)
    # float32, as the journal keeps it: a resumed run computes the same
    narrow = _agreed(replace(fitted.mla, o_DHv=o_DHv).to(dtype=torch.float32), run)
    mla = _agreed(widen(narrow, sizes.qk_nope_head_dim, sizes.v_head_dim), run)
    read_DHv = narrow.o_DHv  # what the heads that were computed so far go through
    before = after = float("nan")
    if run.refinement.layerwise is not None:
        refined = refine_layer(
            layer,
            mla,
            closed,
            run.refinement.layerwise,
            lambda done, of, remark: run.progress("refine layer", done, of, f"layer {layer.index}: {remark}"),
        )
        mla, before, after = _agreed(refined.mla, run), refined.loss_before, refined.loss_after
        heads_NTF, read_DHv = converted_heads(layer, mla, closed).out_NTF, mla.o_DHv
    add_converted_attention(read_DHv, heads_NTF, closed)
    loss = stream_loss(closed)
    if run.refinement.layerwise is None:
        before = after = loss.heldout
    report = LayerReport(layer.index, fitted.latent_loss, loss.fitted, loss.heldout, before, after, fitted.query_loss)
    return mla, report


def layer_name(run: Run, index: int, stage: str = "fitted") -> str:
    """Of a layer in the journal."""
    return step_name(run, f"layer-{index:05d}-{stage}")


def packed(mla: MlaWeights) -> dict[str, Tensor]:
    """A layer's weights as the journal keeps them."""
    named = {field.name: getattr(mla, field.name) for field in fields(mla)}
    return {
        name: torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
        for name, value in named.items()
        if value is not None
    }


def unpacked(tensors: dict[str, Tensor], run: Run) -> MlaWeights:
    """The weights on the device."""
    scaling = float(tensors["scaling"])
    return MlaWeights(**{name: value for name, value in tensors.items() if name != "scaling"}, scaling=scaling).to(
        device=run.device
    )


def step_name(run: Run, step: str) -> str:
    """In the journal, which may hold steps of several sizes."""
    mla = run.plan.mla
    queries = f"-q{mla.q_lora_rank}" if mla.q_lora_rank else ""
    heads = (mla.qk_nope_head_dim, mla.v_head_dim)
    wide = "" if heads == (run.plan.gqa.head_dim,) * 2 else "-n{}-v{}".format(*heads)
    return f"{mla.kv_lora_rank}-{mla.qk_rope_head_dim}{queries}{wide}-{step}"


def _agreed(mla: MlaWeights, run: Run) -> MlaWeights:
    """The weights of process 0: the last bits of an eigenvector may differ between machines."""
    if run.processes.size == 1:
        return mla
    first: Any = run.processes.from_first(mla.to(device="cpu"))
    return first.to(device=run.device)


def _remark(report: LayerReport) -> str:
    if report.refined_before == report.refined_after:
        return f"stream error {report.stream_loss_heldout:.2%} held out"
    return f"stream error {report.refined_before:.2%} -> {report.refined_after:.2%} held out"
