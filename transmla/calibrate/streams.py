"""The two residual streams: the source's, and the one of the model as converted so far.

Legend: N windows, T tokens per window, D hidden_size, F = H v features of all heads side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.calibrate.layers import SourceLayer
from transmla.maths.attention import MlaWeights, gqa_attention, mla_attention
from transmla.maths.refit import refit


@dataclass
class Streams:
    """Residual streams of all calibration windows, float32 on the CPU; windows move to the device one by one.

    source_NTD:    what the source computes
    converted_NTD: what the layers converted so far compute from the same tokens
    num_heldout:   the last windows never enter a moment or a fit, they only measure
    """

    source_NTD: Tensor
    converted_NTD: Tensor
    num_heldout: int
    device: torch.device
    autocast: torch.dtype | None

    @property
    def num_fitted(self) -> int:
        return len(self.source_NTD) - self.num_heldout

    def windows(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(index, source [T, D], converted [T, D]) on the device, float32."""
        for index in range(len(self.source_NTD)):
            yield index, self.source_NTD[index].to(self.device), self.converted_NTD[index].to(self.device)

    def computing(self) -> torch.autocast:
        """Context of forward passes: matmuls in the autocast dtype, streams and moments in float32."""
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)


@dataclass(frozen=True)
class ConvertedHeads:
    """Head outputs float32 [N, T, F] on the CPU; latent_peak: largest mean square of one token's latent."""

    out_NTF: Tensor
    latent_peak: float


@dataclass(frozen=True)
class StreamLoss:
    """Squared error of the converted stream over squared size of the source's, mean over tokens."""

    fitted: float
    heldout: float


def add_source_attention(layer: SourceLayer, streams: Streams) -> None:
    """Source stream past the layer's attention: the target that the converted layer has to meet."""
    for index, source_TD, _ in streams.windows():
        with streams.computing():
            out_TD = gqa_attention(layer.input_layernorm(source_TD), layer.gqa) @ layer.gqa.o_DHd.T
        streams.source_NTD[index] += out_TD.float().cpu()


def converted_heads(layer: SourceLayer, mla: MlaWeights, streams: Streams) -> ConvertedHeads:
    """Run the converted attention on the converted stream, without o_proj."""
    mla = mla.to(dtype=torch.float32, device=streams.device)
    heads, peak = [], 0.0
    for _, _, converted_TD in streams.windows():
        x_hat_TD = layer.input_layernorm(converted_TD)
        with streams.computing():
            heads.append(mla_attention(x_hat_TD, mla).float().cpu())
            peak = max(peak, float((x_hat_TD @ mla.kv_down_rD.T).float().square().mean(-1).max()))
    return ConvertedHeads(torch.stack(heads), peak)


def repair_output(o_DF: Tensor, heads_NTF: Tensor, streams: Streams, ridge: float) -> Tensor:
    """o_proj refitted so that the converted stream meets the source's, tokens weighted by 1 / their energy.

    Ridge regression in float64 from second moments; `add_source_attention` must have run. The weights are those of
    the RMSNorm that reads the stream next: an error counts relative to its token.
    """
    features = o_DF.shape[1]
    gram = torch.zeros(features, features, dtype=torch.float64, device=streams.device)
    residual = torch.zeros(features, o_DF.shape[0], dtype=torch.float64, device=streams.device)
    for index, target_TD, converted_TD in streams.windows():
        if index >= streams.num_fitted:
            break
        heads_TF = heads_NTF[index].to(streams.device)
        weighted_TF = heads_TF / target_TD.square().mean(-1, keepdim=True)
        error_TD = target_TD - converted_TD - heads_TF @ o_DF.T.to(heads_TF)
        gram += (weighted_TF.T @ heads_TF).double()
        residual += (weighted_TF.T @ error_TD).double()
    return refit(o_DF, gram, residual, ridge)


def add_converted_attention(o_DF: Tensor, heads_NTF: Tensor, streams: Streams) -> None:
    """Converted stream past the layer's attention."""
    o_FD = o_DF.float().T.to(streams.device)
    for index, _, _ in streams.windows():
        with streams.computing():
            out_TD = heads_NTF[index].to(streams.device) @ o_FD
        streams.converted_NTD[index] += out_TD.float().cpu()


def add_mlp(layer: SourceLayer, streams: Streams, source_only: bool = False) -> None:
    """Both streams past the layer's MLP; or the source's alone."""
    for index, source_TD, converted_TD in streams.windows():
        both = ((streams.source_NTD, source_TD), (streams.converted_NTD, converted_TD))
        for stream_NTD, stream_TD in both[: 1 if source_only else 2]:
            with streams.computing():
                out_TD = layer.mlp(layer.post_attention_layernorm(stream_TD))
            stream_NTD[index] += out_TD.float().cpu()


def stream_loss(streams: Streams) -> StreamLoss:
    """How far the converted stream is from the source's, on the windows fitted to and on the held-out ones."""
    losses = []
    for _, source_TD, converted_TD in streams.windows():
        error_T = (converted_TD - source_TD).square().mean(-1) / source_TD.square().mean(-1)
        losses.append(float(error_T.mean()))
    fitted, heldout = losses[: streams.num_fitted], losses[streams.num_fitted :]
    return StreamLoss(_mean(fitted), _mean(heldout))


def next_token_losses(streams: Streams, tokens_NT: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy per held-out window in nats, source and converted; head: stream [T, D] -> logits [T, V]."""
    losses: tuple[list[float], list[float]] = ([], [])
    for index, source_TD, converted_TD in streams.windows():
        if index < streams.num_fitted:
            continue
        labels = tokens_NT[index, 1:].to(streams.device)
        for found, stream_TD in zip(losses, (source_TD, converted_TD), strict=True):
            found.append(float(torch.nn.functional.cross_entropy(head(stream_TD)[:-1].float(), labels)))
    return torch.tensor(losses[0]), torch.tensor(losses[1])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
