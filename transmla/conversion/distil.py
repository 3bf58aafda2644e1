"""Blocks of fitted layers against the source, first block to last; one block of all layers where memory allows.

Legend: see transmla/conversion/streams.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transmla.checkpoint.journal import Journal
from transmla.conversion.block import SAVE_EVERY, BlockDistiller, DistilledBlock, through
from transmla.conversion.fit import layer_name, num_closed, packed, unpacked
from transmla.conversion.levels import Descent
from transmla.conversion.run import Run
from transmla.conversion.streams import Streams, add_mlp, add_source_attention
from transmla.devices import free_bytes
from transmla.maths.attention import MlaWeights
from transmla.text.windows import CalibrationTokens
from transmla.train.descent import tokens_per_pass

# points of the curve of training losses that is kept
MOST_STRETCHES = 32


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


def distil_layers(run: Run, streams: Streams, text: CalibrationTokens, journal: Journal) -> tuple[BlockReport, ...]:
    """Train the layers of the journal against the source; the streams must be behind the last layer.

    The distilled weights go into the journal beside the fitted ones. Blocks that it holds are taken over if they are
    of the same division, since the input of a block is what the blocks before it give.
    """
    descent = run.refinement.distil
    if descent is None:
        return ()
    total = run.plan.mla.num_hidden_layers
    size = run.processes.from_first(_layers_at_once(run, streams, journal))
    ids_NT = text.ids_NT[streams.indices]
    run.embed(ids_NT, streams.converted_NTD)
    if size < total:
        run.embed(ids_NT, streams.source_NTD)
    reports = []
    for first in range(0, total, size):
        indices = range(first, min(first + size, total))
        if size < total:
            for index in indices:
                layer = run.layer(index)
                add_source_attention(layer, streams)
                add_mlp(layer, streams, only="source")
                del layer  # before the next one is read
        reports.append(_distil_block(run, indices, size, streams, descent, journal))
    return tuple(reports)


def _layers_at_once(run: Run, streams: Streams, journal: Journal) -> int:
    """Layers per block: as asked for, else as an unfinished conversion began, else all that fit. What began larger than
    what fits now is only kept if no block of it is left to train."""
    total = run.plan.mla.num_hidden_layers
    began = journal.values(layer_name(run, 0, "division"))
    size = run.block_layers or layers_that_fit(run, streams)
    if began is not None and not run.block_layers:
        done = [journal.values(layer_name(run, index, "distilled")) for index in range(total)]
        finished = all(values is not None and values["at_once"] == began["at_once"] for values in done)
        size = began["at_once"] if finished else min(size, began["at_once"])
    size = min(total, size)
    if run.processes.first and (began is None or began["at_once"] != size):
        journal.save(layer_name(run, 0, "division"), {}, {"at_once": size})
    return size


def _distil_block(
    run: Run, indices: range, at_once: int, streams: Streams, descent: Descent, journal: Journal
) -> BlockReport:
    """One block, and the converted stream past it if another one follows."""
    final = indices.stop == run.plan.mla.num_hidden_layers
    report = run.processes.from_first(_finished(run, indices, at_once, journal))
    if report is not None and final:
        return report
    block = [run.frozen_layer(index) for index in indices]
    if report is not None:
        weights = load_layers(run, indices, journal, "distilled")
    else:
        given = load_layers(run, indices, journal, "fitted")
        head = run.head() if final else None
        distiller = BlockDistiller(block, given, streams, head, descent, num_trained_on(run, streams))
        found = _train(run, distiller, indices, _state_name(run, indices, at_once), journal)
        weights = found.weights
        descender = distiller.descender
        ends = (indices[0], indices[-1])
        losses = (found.loss_before, found.loss_after)
        counts = (descender.done, descender.num_steps, descender.num_windows)
        report = BlockReport(*ends, *losses, *counts, stretches(descender.losses))
        if run.processes.first:
            for index, mla in zip(indices, weights, strict=True):
                journal.save(
                    layer_name(run, index, "distilled"), packed(mla), {"block": vars(report), "at_once": at_once}
                )
            journal.drop(_state_name(run, indices, at_once))
    if not final:
        for place, _, converted_TD in streams.windows():
            with streams.computing():
                passed_BTD = through(block, weights, converted_TD[None], streams.positions([place]))
            streams.converted_NTD[place] = passed_BTD[0].cpu()
    return report


def _finished(run: Run, indices: range, at_once: int, journal: Journal) -> BlockReport | None:
    """What the journal says of the block, if all of its layers are from that division."""
    kept = [journal.values(layer_name(run, index, "distilled")) for index in indices]
    found = [BlockReport(**values["block"]) for values in kept if values is not None and values["at_once"] == at_once]
    return found[0] if len(found) == len(kept) else None


def num_trained_on(run: Run, streams: Streams) -> int:
    """Windows of all processes that are distilled on, the first ones: those that the closed form has not seen are."""
    fitted, unseen = streams.num_fitted_of_all, streams.num_windows - num_closed(run, streams)
    return max(unseen, min(fitted, 2 * (fitted - unseen))) if run.refinement.distil_unseen else fitted


def _train(run: Run, distiller: BlockDistiller, indices: range, name: str, journal: Journal) -> DistilledBlock:
    """All steps, from a saved state if there is one; the state is saved every few minutes."""
    descender = distiller.descender
    state = run.processes.from_first(journal.load(name))
    before = distiller.heldout() if state is None else state[1]["loss_before"]
    if state is not None:
        descender.restore(*state)
    del state  # as large as the weights and their moments
    saved = time.monotonic()
    unit = "nats" if indices.stop == run.plan.mla.num_hidden_layers else "of the stream"
    mean = before

    def after_step(loss: float) -> None:
        nonlocal saved, mean
        mean = 0.9 * mean + 0.1 * loss
        run.progress(_stage(run, indices), descender.done, descender.num_steps, f"loss {mean:.4f} {unit}")
        if run.processes.first and time.monotonic() - saved > SAVE_EVERY:
            tensors, values = descender.state()
            journal.save(name, tensors, values | {"loss_before": before})
            saved = time.monotonic()

    return distiller.run(before, after_step)


def stretches(losses: Sequence[float], most: int = MOST_STRETCHES) -> list[float]:
    """Means of at most `most` stretches of nearly equal length, in order."""
    count = min(most, len(losses))
    edges = [place * len(losses) // count for place in range(count + 1)] if count else [0]
    return [sum(losses[start:end]) / (end - start) for start, end in itertools.pairwise(edges)]


def _state_name(run: Run, indices: range, at_once: int) -> str:
    return layer_name(run, indices[0], f"to-{indices[-1]:05d}-of-{at_once}-state")


def _stage(run: Run, indices: range) -> str:
    whole = len(indices) == run.plan.mla.num_hidden_layers
    return "distil" if whole else f"distil layers {indices[0]}-{indices[-1]}"


def load_layers(run: Run, indices: range, journal: Journal, stage: str) -> list[MlaWeights]:
    """Weights of layers from the journal, on the device."""
    found = []
    for index in indices:
        kept = run.processes.from_first(journal.load(layer_name(run, index, stage)))
        found.append(unpacked(kept[0], run))
    return found


def layers_that_fit(run: Run, streams: Streams) -> int:
    """How many layers can be trained at once in half of the memory that is free.

    Per layer: attention weights as they were and as they are, gradients and two moments of Adam in float32, the weights
    that products keep for backward, the MLP in the dtype of the products, and what backward needs of each token: about
    12 hidden sizes, 4 inner sizes, and queries, keys, values twice.
    """
    config, mla = run.plan.source.config, run.plan.mla
    hidden, inner = mla.hidden_size, int(config["intermediate_size"])
    width = mla.num_attention_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    window, descent = streams.source_NTD.shape[1], run.refinement.distil
    tokens = max(window, min(descent.batch * window if descent else 0, tokens_per_pass(run.device)))
    compute = torch.empty((), dtype=run.compute).element_size()
    per_token = 12 * hidden * 4 + (4 * inner + 2 * (2 * width + mla.expanded_values)) * compute
    layer = (5 * 4 + compute) * mla.attention_weights + (3 * hidden * inner) * compute + tokens * per_token
    head = int(config["vocab_size"]) * hidden * compute + 6 * tokens * hidden * 4
    return max(1, int((free_bytes(run.device) / 2 - head) // layer))
