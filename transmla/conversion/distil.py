"""The refinement: blocks of fitted layers against the source, first block to last; one block of all layers where memory
allows.

Legend: see transmla/conversion/streams.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transmla.conversion.block import BlockDistiller, DistilledBlock, through
from transmla.conversion.descent import tokens_per_pass
from transmla.conversion.fit import num_closed
from transmla.conversion.kept import DISTILLED, FITTED
from transmla.conversion.levels import Descent
from transmla.conversion.needs import layer_values, refined_bytes
from transmla.conversion.run import Run
from transmla.conversion.streams import Streams, advance_source
from transmla.devices import free_bytes
from transmla.train import bytes_of_logits

# points of the curve of training losses that is kept
MOST_STRETCHES = 32
# of the free memory, what a division into blocks may take: when it is made, and when an unfinished conversion goes on
# with it (free memory is never the same twice, and other blocks would be trained anew)
NEW_SHARE, BEGUN_SHARE = 0.5, 0.75
# seconds between two saved states: a killed run loses at most this much
SAVE_EVERY = 120.0


@dataclass(frozen=True)
class BlockReport:
    """One block of layers: mean held-out loss before and after, in nats (KL) for the last block, else stream error.

    steps:    that were taken, of `planned`: fewer if a loss or a gradient was not finite, which is the end
    windows:  that were trained on
    training: mean loss on the windows of equal stretches of the steps, each window before the step that it is used for:
              in the first pass, of windows that no step has seen
    """

    first_layer: int
    last_layer: int
    loss_before: float
    loss_after: float
    steps: int
    planned: int
    windows: int = 0
    training: Sequence[float] = ()

    @property
    def taken(self) -> bool:
        """Whether the trained weights are those of the result: only what lowers the held-out loss is."""
        return self.loss_after < self.loss_before


def distil_layers(run: Run, streams: Streams) -> tuple[BlockReport, ...]:
    """Train the fitted layers against the source; the streams must be behind the last layer.

    The distilled weights go into the journal beside the fitted ones. Blocks that it holds are taken over if they are
    of the same division, since the input of a block is what the blocks before it give.
    """
    descent = run.refinement.distil
    if descent is None:
        return ()
    total = run.plan.mla.num_hidden_layers
    size = _layers_at_once(run, streams)
    ids_NT = run.text.ids_NT[streams.indices]
    run.embed(ids_NT, streams.converted_NTD)
    if size < total:
        run.embed(ids_NT, streams.source_NTD)
    reports = []
    for first in range(0, total, size):
        indices = range(first, min(first + size, total))
        if size < total:
            for index in indices:
                run.progress(f"targets of layers {first}-{indices[-1]}", index - first, len(indices), "")
                layer = run.model.layer(index)
                advance_source(layer, streams)
                del layer  # before the next one is read
            run.progress(f"targets of layers {first}-{indices[-1]}", len(indices), len(indices), "")
        reports.append(_distil_block(run, indices, size, streams, descent))
    return tuple(reports)


def _layers_at_once(run: Run, streams: Streams) -> int:
    """Layers per block: as asked for, else as an unfinished conversion began, else all that fit.

    Blocks of an unfinished conversion that do not fit any more are only kept if all of them are finished.
    """
    total = run.plan.mla.num_hidden_layers
    division = run.kept.values("division")
    began = None if division is None else int(division["at_once"])
    size, most = _layers_that_fit_everywhere(run, streams)
    size = run.block_layers or size
    if began is not None and not run.block_layers:
        done = [run.kept.layer_values(index, DISTILLED) for index in range(total)]
        finished = all(values is not None and values["at_once"] == began for values in done)
        size = began if finished or began <= min(total, most) else min(size, began)
    size = run.processes.from_first(min(total, size))
    if began != size:
        run.kept.drop("layer-*-state")  # of a block that is not made any more
        run.kept.save("division", {"at_once": size})
    return size


def _distil_block(run: Run, indices: range, at_once: int, streams: Streams, descent: Descent) -> BlockReport:
    """One block, and the converted stream past it if another one follows."""
    final = indices.stop == run.plan.mla.num_hidden_layers
    report = _finished(run, indices, at_once)
    if report is not None and final:
        return report
    block = [run.model.layer(index).narrowed(run.compute) for index in indices]
    if report is not None:
        weights = run.kept.layers(indices, DISTILLED)
    else:
        ends = run.model.ends(run.compute) if final else None
        given = run.kept.layers(indices, FITTED)
        distiller = BlockDistiller(block, given, streams, ends, descent, num_trained_on(run, streams), run.read)
        found = _train(run, distiller, indices, _state_name(indices, at_once))
        weights = found.weights
        descender = distiller.descender
        bounds = (indices[0], indices[-1])
        losses = (found.loss_before, found.loss_after)
        counts = (descender.done, descender.num_steps, descender.num_windows)
        report = BlockReport(*bounds, *losses, *counts, stretches(descender.losses))
        for index, mla in zip(indices, weights, strict=True):
            run.kept.save_layer(index, DISTILLED, mla, {"block": vars(report), "at_once": at_once})
        run.kept.drop(_state_name(indices, at_once))
    if not final:
        for places, _, converted_BTD in streams.batches(source=False):
            with streams.computing():
                passed_BTD = through(block, weights, converted_BTD, streams.positions(places), run.read)
            streams.converted_NTD[places] = passed_BTD.to(streams.converted_NTD.device)
    return report


def _finished(run: Run, indices: range, at_once: int) -> BlockReport | None:
    """What the journal says of the block, if all of its layers are from that division."""
    kept = [run.kept.layer_values(index, DISTILLED) for index in indices]
    found = [BlockReport(**values["block"]) for values in kept if values is not None and values["at_once"] == at_once]
    return found[0] if len(found) == len(kept) else None


def num_trained_on(run: Run, streams: Streams) -> int:
    """Windows of all processes that are distilled on, the first ones."""
    return run.refinement.num_distilled(streams.num_windows, streams.num_heldout, num_closed(run, streams))


def _train(run: Run, distiller: BlockDistiller, indices: range, state_name: str) -> DistilledBlock:
    """All steps, from a saved state if there is one; the state is saved every few minutes."""
    descender = distiller.descender
    final = indices.stop == run.plan.mla.num_hidden_layers
    whole = len(indices) == run.plan.mla.num_hidden_layers
    stage = "distil" if whole else f"distil layers {indices[0]}-{indices[-1]}"
    state = run.kept.load(state_name)
    run.progress(stage, int(state[1]["done"]) if state else 0, descender.num_steps, "")  # the loss before takes a while
    before = distiller.heldout() if state is None else state[1]["loss_before"]
    if state is not None:
        descender.restore(*state)
    del state  # as large as the weights and their moments
    saved, mean = time.monotonic(), before

    def after_step(loss: float) -> None:
        nonlocal saved, mean
        mean = 0.9 * mean + 0.1 * loss
        shown = f"loss {mean:.4f} nats" if final else f"stream error {mean:.2%}"
        run.progress(stage, descender.done, descender.num_steps, shown)
        if run.processes.first and time.monotonic() - saved > SAVE_EVERY:
            tensors, values = descender.state()
            run.kept.save(state_name, values | {"loss_before": before}, tensors)
            saved = time.monotonic()

    return distiller.run(before, after_step)


def stretches(losses: Sequence[float], most: int = MOST_STRETCHES) -> list[float]:
    """Means of at most `most` stretches of nearly equal length, in order."""
    count = min(most, len(losses))
    edges = [place * len(losses) // count for place in range(count + 1)] if count else [0]
    return [sum(losses[start:end]) / (end - start) for start, end in itertools.pairwise(edges)]


def _state_name(indices: range, at_once: int) -> str:
    return f"layer-{indices[0]:05d}-to-{indices[-1]:05d}-of-{at_once}-state"


def _layers_that_fit_everywhere(run: Run, streams: Streams) -> tuple[int, int]:
    """How many layers fit in every process, in a new division and in one that has begun: devices may differ."""
    mine = [layers_that_fit(run, streams, share) for share in (NEW_SHARE, BEGUN_SHARE)]
    new, begun = zip(*run.processes.gather({run.processes.rank: mine}).values(), strict=True)
    return min(new), min(begun)


def layers_that_fit(run: Run, streams: Streams, share: float = NEW_SHARE) -> int:
    """How many layers can be trained at once in that share of the memory that is free."""
    recipe, descent = run.plan.recipe, run.refinement.distil
    window, compute = streams.source_NTD.shape[1], torch.empty((), dtype=run.compute).element_size()
    tokens = descent.tokens_at_once(window, tokens_per_pass(run.device)) if descent else window
    values, rounded = layer_values(run.plan.source, run.plan.family), recipe.latent_bits is not None
    vocabulary = int(run.plan.config["vocab_size"])
    logits = bytes_of_logits(run.device.type, vocabulary, compute, torch.get_num_threads())
    layer, head = refined_bytes(run.plan.config, run.plan.mla, values, tokens, window, compute, rounded, logits)
    return max(1, int((share * free_bytes(run.device) - head) // layer))
