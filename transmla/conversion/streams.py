"""The two residual streams: the source's, and the one of the model as converted so far.

Legend: N windows that this process holds, B of them at once, T tokens per window, D hidden_size, F = H v features of
all heads side by side.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from transmla.checkpoint.destination import disk_errors
from transmla.maths.attention import MlaWeights, Reading, with_one
from transmla.maths.moment import second_moment
from transmla.maths.refit import chosen_ridge, refit
from transmla.model.layer import SourceLayer
from transmla.processes import ALONE, Processes
from transmla.train.losses import energy, stream_error

# where activations are kept if nothing else is said
CPU = torch.device("cpu")
# tokens that pass a layer at once: enough for products at full rate, and little beside the weights
TOKENS_ON_CPU, TOKENS_ON_GPU = 2048, 32768
# of them whose logits are there at once
ROWS_OF_LOGITS = 256
# mean square that an output counts with at least behind a norm, which divides by no less either: its epsilon
LEAST_BEHIND_A_NORM = 1e-6


@dataclass
class Streams:
    """Residual streams of the calibration windows, float32: on the device if they fit there, else in memory or in a
    file, from where windows move to the device one by one.

    source_NTD:    what the source computes
    converted_NTD: what the layers converted so far compute from the same tokens
    num_heldout:   the last windows of all never enter a moment or a fit, they only measure
    processes:     who holds which windows: this one, every size-th
    num_windows:   of all processes together; default: those given here
    kept_in:       where activations are, a device or a folder: see `allocate`
    indices:       of the windows here among all
    positions_NT:  int64, of the tokens in the windows here; default: 0..T-1
    """

    source_NTD: Tensor
    converted_NTD: Tensor
    num_heldout: int
    device: torch.device
    autocast: torch.dtype | None
    processes: Processes = ALONE
    num_windows: int = 0
    kept_in: Path | torch.device = CPU
    indices: list[int] = field(default_factory=list)
    positions_NT: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if self.positions_NT.numel() and self.positions_NT.shape != self.source_NTD.shape[:2]:
            raise ValueError(f"positions {list(self.positions_NT.shape)} of streams {list(self.source_NTD.shape)}")
        if not self.positions_NT.numel():
            self.positions_NT = torch.arange(self.source_NTD.shape[1]).expand(self.source_NTD.shape[:2])
        self.num_windows = self.num_windows or len(self.source_NTD)
        if len(self.indices) != len(self.source_NTD):  # not given; of the last windows a process may hold none
            self.indices = self.processes.mine(self.num_windows)

    @property
    def num_fitted_of_all(self) -> int:
        """Windows that are fitted to, in all processes together."""
        return self.num_windows - self.num_heldout

    @property
    def num_fitted(self) -> int:
        """Of them, how many are here: the first ones."""
        return sum(index < self.num_fitted_of_all for index in self.indices)

    @property
    def num_aside(self) -> int:
        """Fitted windows of all processes, the last ones, that ridges are chosen on before they are fitted to as well:
        a quarter, none if there is but one."""
        return max(min(1, self.num_fitted_of_all - 1), self.num_fitted_of_all // 4)

    @property
    def first_aside(self) -> int:
        """Place here of the first of them."""
        start = self.num_fitted_of_all - self.num_aside
        return sum(index < start for index in self.indices)

    def last(self, count: int) -> Streams:
        """The last `count` windows of all processes, sharing memory with these; held-out ones are the last of them."""
        start = self.num_windows - count
        place = sum(index < start for index in self.indices)
        return replace(
            self,
            source_NTD=self.source_NTD[place:],
            converted_NTD=self.converted_NTD[place:],
            num_windows=count,
            indices=[index - start for index in self.indices[place:]],
            positions_NT=self.positions_NT[place:],
        )

    def mean_heldout(self, loss_of: Callable[[int], Tensor]) -> float:
        """Mean of a loss over the held-out windows of all processes; loss_of: place of a window here -> its loss."""
        with torch.no_grad():
            places = range(self.num_fitted, len(self.source_NTD))
            losses = [loss_of(place) for place in places]
            values = torch.stack(losses).tolist() if losses else []
            here = {self.indices[place]: value for place, value in zip(places, values, strict=True)}
        return _mean(list(self.processes.gather(here).values()))

    def batches(self, source: bool = True, converted: bool = True) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(places here, source [B, T, D], converted [B, T, D]) on the device, float32; empty for a stream not wanted.

        All of them are held out, or set aside, or neither.
        """
        nothing = torch.empty(0, device=self.device)
        tokens = TOKENS_ON_CPU if self.device.type == "cpu" else TOKENS_ON_GPU
        size = max(1, tokens // self.source_NTD.shape[1])
        edges = sorted({0, self.first_aside, self.num_fitted, len(self.source_NTD)})
        for first, end in pairwise(edges):
            for start in range(first, end, size):
                places = slice(start, min(start + size, end))
                source_BTD = self.source_NTD[places].to(self.device) if source else nothing
                yield places, source_BTD, self.converted_NTD[places].to(self.device) if converted else nothing

    def positions(self, place: int | slice | list[int]) -> Tensor:
        """Of one window [T] or of several [B, T], on the device."""
        return self.positions_NT[place].to(self.device)

    def last_position(self) -> int:
        """Of all windows of all processes."""
        here = {index: int(positions_T[-1]) for index, positions_T in zip(self.indices, self.positions_NT, strict=True)}
        return max(self.processes.gather(here).values())

    def computing(self) -> torch.autocast:
        """Context of forward passes: matmuls in the autocast dtype, streams and moments in float32."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)


def allocate(shape: tuple[int, ...], kept_in: Path | torch.device) -> Tensor:
    """Uninitialised float32 memory of a device, or a file in a folder that looks like it and vanishes with the process;
    `DestinationError` if the disk is too small."""
    if isinstance(kept_in, torch.device):
        return torch.empty(shape, device=kept_in)
    folder = kept_in
    with disk_errors(folder):
        handle, name = tempfile.mkstemp(dir=folder, prefix="activations-")
        try:
            if hasattr(os, "posix_fallocate"):  # without its blocks, a full disk would be a bus error later
                os.posix_fallocate(handle, 0, max(1, 4 * math.prod(shape)))
            tensor = torch.from_file(name, shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)
        finally:
            os.close(handle)
            os.unlink(name)  # the mapping keeps it
    return tensor


@dataclass(frozen=True)
class StreamLoss:
    """Squared error of the converted stream over squared size of the source's, mean over tokens."""

    fitted: float
    heldout: float


class Repair:
    """Second moments for an output projection that makes up for what the stream has lost so far.

    The converted attention should add to its stream what the source's adds, and the difference of the streams as well.
    Tokens are weighted by 1 / the energy of what the next norm reads: an error counts relative to its token. Ridge
    regression in float64.
    """

    def __init__(self, layer: SourceLayer, mla: MlaWeights, heads_NTF: Tensor, streams: Streams) -> None:
        """streams: of the windows that are fitted to, with the converted attention's head outputs"""
        self._layer, self._mla, self._heads_NTF, self._streams = layer, mla, heads_NTF, streams
        size, self._norm = mla.o_DHv.shape[1] + (mla.o_bias_D is not None), layer.output_norm
        if self._norm is not None:
            # of values of mean square 1; the smallest gains are not undone
            gain_D = self._norm(torch.ones(mla.o_DHv.shape[0], device=streams.device)).float()
            self._against_gain_D = gain_D / (gain_D.square() + 1e-2 * gain_D.square().mean())

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=streams.device)

        # of the windows that are set aside, and of the others
        self._grams = [zeros(size, size) for _ in range(2)]
        self._wanted = [zeros(size, mla.o_DHv.shape[0]) for _ in range(2)]
        self._energy = zeros(1)

    def see(self, places: slice, stream_BTD: Tensor, out_BTD: Tensor) -> None:
        """Some windows, of which those that are not fitted to are left out.

        places: of windows here, below 0 of those before them
        stream_BTD, out_BTD: the source's stream before the layer, and the output of its attention
        """
        first_aside, num_fitted = self._streams.first_aside, self._streams.num_fitted
        for part, (first, end) in enumerate(((first_aside, num_fitted), (0, first_aside))):
            first, end = max(first, places.start), min(end, places.stop)
            if first < end:
                here = slice(first - places.start, end - places.start)
                self._add(part, slice(first, end), stream_BTD[here], out_BTD[here])

    def _add(self, part: int, places: slice, stream_BTD: Tensor, out_BTD: Tensor) -> None:
        """Windows of one part: 0 are those set aside, 1 the others."""
        heads_BTF = self._heads_NTF[places].to(self._streams.device)
        if self._mla.o_bias_D is not None:
            heads_BTF = with_one(heads_BTF)
        missing_BTD = stream_BTD - self._streams.converted_NTD[places].to(stream_BTD)
        if self._norm is None:
            multiplier = self._layer.residual_multiplier
            wanted_BTD, read_BTD = out_BTD + missing_BTD / multiplier, stream_BTD + multiplier * out_BTD
            root_BT1 = energy(read_BTD).rsqrt()[..., None]
        else:
            # behind the norm, an output counts by its direction: what is missing is asked for at the output's own size
            read_BTD, size_BT = stream_BTD + self._norm(out_BTD), out_BTD.square().mean(-1) + LEAST_BEHIND_A_NORM
            wanted_BTD = out_BTD + missing_BTD * self._against_gain_D * size_BT.sqrt()[..., None]
            # root by root: the product may be too small for float32
            root_BT1 = (energy(read_BTD).rsqrt() * size_BT.rsqrt())[..., None]
        weighted_NF, weighted_ND = (heads_BTF * root_BT1).flatten(0, 1), (wanted_BTD * root_BT1).flatten(0, 1)
        self._grams[part] += second_moment(weighted_NF)
        self._wanted[part] += weighted_NF.T @ weighted_ND
        if not part:
            self._energy += weighted_ND.square().sum(dtype=torch.float64)

    def fitted(self, ridges: Sequence[float]) -> tuple[MlaWeights, float]:
        """The weights with another output projection, float64, and the chosen ridge. Every process calls this."""
        self._streams.processes.sum_((*self._grams, *self._wanted, self._energy))
        o_DF, bias_D = self._mla.o_DHv.double(), self._mla.o_bias_D
        both_DF = o_DF if bias_D is None else torch.cat([o_DF, bias_D.double()[:, None]], 1)
        ridge, (aside_FF, gram_FF), (aside_FD, wanted_FD) = ridges[0], self._grams, self._wanted
        if len(ridges) > 1 and self._streams.num_aside:
            energy_aside = float(self._energy)
            ridge = chosen_ridge(
                ridges, lambda one: refit(both_DF, gram_FF, wanted_FD, one), aside_FF, aside_FD, energy_aside
            )
        both_DF = refit(both_DF, gram_FF + aside_FF, wanted_FD + aside_FD, ridge)
        if bias_D is None:
            return replace(self._mla, o_DHv=both_DF), ridge
        return replace(self._mla, o_DHv=both_DF[:, :-1], o_bias_D=both_DF[:, -1]), ridge


def advance_source(
    layer: SourceLayer, streams: Streams, see: Callable[[slice, Tensor, Tensor], None] | None = None
) -> None:
    """Source stream behind the layer.

    see: called with the places of some windows, their streams before the layer and the outputs of its attention
    """
    for places, source_BTD, _ in streams.batches(converted=False):
        with streams.computing():
            out_BTD = layer.attention(layer.into_attention(source_BTD), streams.positions(places)).float()
        if see is not None:
            see(places, source_BTD, out_BTD)
        with streams.computing():
            passed_BTD = layer.past_attention(source_BTD, out_BTD)
        streams.source_NTD[places] = passed_BTD.to(streams.source_NTD.device)


def converted_heads(layer: SourceLayer, mla: MlaWeights, streams: Streams, read: Reading | None = None) -> Tensor:
    """Head outputs [N, T, F] of the converted attention on its own stream, float32, kept where the streams are.

    read: see `mla_attention`
    """
    mla = mla.to(dtype=torch.float32, device=streams.device)
    heads_NTF = allocate((*streams.converted_NTD.shape[:2], mla.o_DHv.shape[1]), streams.kept_in)
    for places, _, converted_BTD in streams.batches(source=False):
        x_hat_BTD = layer.into_attention(converted_BTD)
        with streams.computing():
            heads_BTF = layer.latent_heads(x_hat_BTD, mla, streams.positions(places), read)
            heads_NTF[places] = heads_BTF.to(heads_NTF)
    return heads_NTF


def advance_converted(layer: SourceLayer, mla: MlaWeights, heads_NTF: Tensor, streams: Streams) -> None:
    """Converted stream behind the layer, from the head outputs of its attention."""
    o_DF = mla.o_DHv.float().to(streams.device)
    bias_D = None if mla.o_bias_D is None else mla.o_bias_D.float().to(streams.device)
    for places, _, converted_BTD in streams.batches(source=False):
        with streams.computing():
            out_BTD = torch.nn.functional.linear(heads_NTF[places].to(streams.device), o_DF, bias_D).float()
            passed_BTD = layer.past_attention(converted_BTD, out_BTD)
        streams.converted_NTD[places] = passed_BTD.to(streams.converted_NTD.device)


def stream_loss(streams: Streams) -> StreamLoss:
    """How far the converted stream is from the source's, on the windows fitted to and on the held-out ones."""
    errors = [
        stream_error(converted_TD, source_TD)
        for _, source_BTD, converted_BTD in streams.batches()
        for converted_TD, source_TD in zip(converted_BTD, source_BTD, strict=True)
    ]
    here = dict(zip(streams.indices, torch.stack(errors).tolist() if errors else [], strict=True))
    losses = list(streams.processes.gather(here).values())
    fitted, heldout = losses[: streams.num_fitted_of_all], losses[streams.num_fitted_of_all :]
    return StreamLoss(_mean(fitted), _mean(heldout))


def next_token_losses(streams: Streams, tokens_NT: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy per held-out window in nats, source and converted; head: stream [T, D] -> logits [T, V]."""
    losses: dict[int, tuple[float, ...]] = {}
    for place in range(streams.num_fitted, len(streams.source_NTD)):
        labels_T = tokens_NT[place, 1:].to(streams.device)
        losses[streams.indices[place]] = tuple(
            _mean_nats(head, stream_TD[:-1], labels_T)
            for stream_TD in (streams.source_NTD[place], streams.converted_NTD[place])
        )
    of_all = torch.tensor(list(streams.processes.gather(losses).values()))
    return of_all[:, 0], of_all[:, 1]


def _mean_nats(head: Callable[[Tensor], Tensor], stream_TD: Tensor, labels_T: Tensor) -> float:
    """Of the labels, by what stands before each; few tokens at once, since a vocabulary is large."""
    parts = zip(stream_TD.split(ROWS_OF_LOGITS), labels_T.split(ROWS_OF_LOGITS), strict=True)
    nats = [
        torch.nn.functional.cross_entropy(head(part_TD.to(labels_T.device)).float(), part_T, reduction="sum")
        for part_TD, part_T in parts
    ]
    return float(torch.stack(nats).sum(dtype=torch.float64)) / len(labels_T)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
