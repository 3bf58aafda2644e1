"""Choosing rope_theta of the target: a pass over a few layers of the source that tries candidates and measures.

Legend: N windows, T tokens, D hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.conversion.streams import Streams
from transmla.maths.attention import gqa_attention, mla_attention
from transmla.maths.closed_form import ClosedForm, Moments, fit_layer
from transmla.model.source import SourceLayer

# Exponents k of the candidates theta ** k; e / d as an exponent keeps exactly the fastest pairs of the source.
EXPONENTS = (1.0, 0.85, 0.7)
# A candidate has to beat the source's own theta by this factor: the survey is small, texts can be longer than what it
# sees, and a smaller theta has fewer slow pairs for what lies beyond.
MARGIN = 0.95


def candidates(theta: float, head_dim: int, qk_rope_head_dim: int) -> tuple[float, ...]:
    """rope_theta values to try, the source's own first."""
    exponents = dict.fromkeys((*EXPONENTS, qk_rope_head_dim / head_dim))
    return tuple(theta**exponent for exponent in exponents)


def surveyed_layers(num_layers: int, at_most: int = 4) -> frozenset[int]:
    """Indices spread over the depth of the model."""
    return frozenset(torch.linspace(0, num_layers - 1, min(num_layers, at_most)).long().tolist())


def output_error(
    layer: SourceLayer,
    moments: Moments,
    streams: Streams,
    sizes: tuple[int, int],
    theta: float,
    method: ClosedForm,
) -> float:
    """Squared error of the converted attention's output over its squared size, on held-out windows.

    sizes: (kv_lora_rank, qk_rope_head_dim)
    """
    fitted = fit_layer(layer.gqa.to(dtype=torch.float64), moments, *sizes, theta, method)
    mla = fitted.mla.to(dtype=torch.float32)
    lost = size = 0.0
    for index, source_TD, _ in streams.windows():
        if index < streams.num_fitted:
            continue
        x_TD, positions_T = layer.input_layernorm(source_TD), streams.positions(index)
        with streams.computing():
            exact_TD: Tensor = gqa_attention(x_TD, layer.gqa, positions_T) @ layer.gqa.o_DHd.T
            found_TD: Tensor = mla_attention(x_TD, mla, positions_T) @ mla.o_DHv.T
        lost += float((exact_TD.float() - found_TD.float()).square().sum())
        size += float(exact_TD.float().square().sum())
    return lost / size if size else 0.0  # of an output projection that is zero


def choose(losses: dict[float, list[float]]) -> float:
    """The candidate with the smallest mean loss, or the first unless that is beaten by `MARGIN`."""
    own, *others = losses
    best = min(others, key=lambda theta: sum(losses[theta]), default=own)
    return best if sum(losses[best]) < MARGIN * sum(losses[own]) else own
