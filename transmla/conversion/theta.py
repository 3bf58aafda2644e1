"""Choosing rope_theta of the target: a pass over a few layers of the source that tries candidates and measures.

Legend: see transmla/conversion/streams.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from transmla.conversion.moments import observe
from transmla.conversion.run import Run
from transmla.conversion.streams import Streams, advance_source
from transmla.families import rope_parameters, rotary_dim
from transmla.maths.attention import MlaWeights
from transmla.maths.closed_form import aim, fit_aimed
from transmla.model.layer import SourceLayer
from transmla.processes import ALONE
from transmla.text.windows import spread_positions

# Exponents k of the candidates theta ** k; e / d as an exponent keeps exactly the fastest pairs of the source.
EXPONENTS = (1.0, 0.85, 0.7)
# A candidate has to beat the source's own theta by this factor: the survey is small, texts can be longer than what it
# sees, and a smaller theta has fewer slow pairs for what lies beyond.
MARGIN = 0.95
# windows of the survey
NUM_SURVEYED = 6

Candidate = TypeVar("Candidate")


def choose_theta(run: Run) -> tuple[float | None, dict[float, list[float]]]:
    """rope_theta of the target and, if it was chosen here, the losses of all candidates by surveyed layer.

    None in the own form, where every layer may have the frequencies that suit it, unless the recipe gives a theta.
    """
    wanted = run.plan.recipe.theta
    if not isinstance(wanted, str):
        return float(wanted), {}
    if run.plan.form != "deepseek_v3":
        return None, {}
    if (kept := run.kept.values("theta")) is not None:
        return kept["chosen"], {float(theta): losses for theta, losses in kept["losses"].items()}
    mla, config = run.plan.mla, run.plan.config
    own, turning = float(rope_parameters(config)["rope_theta"]), rotary_dim(config, run.plan.gqa.head_dim)
    thetas, sizes = candidates(own, turning, mla.qk_rope_head_dim), (mla.kv_lora_rank, mla.qk_rope_head_dim)
    found = survey(run, [(sizes, theta) for theta in thetas], "choose theta", rotated_only=True)
    losses: dict[float, list[float]] = dict(zip(thetas, found, strict=True))
    chosen: float = run.processes.from_first(choose(losses))
    run.kept.save("theta", {"chosen": chosen, "losses": {str(theta): found for theta, found in losses.items()}})
    return chosen, losses


def survey(
    run: Run, trials: Sequence[tuple[tuple[int, int], float | None]], stage: str, *, rotated_only: bool = False
) -> list[list[float]]:
    """`output_error` of each trial, (kv_lora_rank, qk_rope_head_dim) and theta, in a few layers, on a few windows.

    rotated_only: leave out layers without rotary embeddings, where theta does nothing
    """
    losses: list[list[float]] = [[] for _ in trials]
    streams = _surveyed_streams(run)
    surveyed = surveyed_layers(run.plan.mla.num_hidden_layers)
    for index in range(max(surveyed) + 1):
        layer = run.model.layer(index)
        if index in surveyed and (not rotated_only or bool(layer.gqa.inv_freq_P.any())):
            moments = observe(layer, streams, streams.num_fitted)
            aimed = aim(layer.gqa, moments, run.method)
            moments = moments.of_converted()
            for (sizes, theta), found in zip(trials, losses, strict=True):
                fitted = fit_aimed(aimed, moments, *sizes, theta, run.method, biases=not run.plan.recipe.lossy)
                found.append(output_error(layer, fitted.mla, streams))
            del aimed, moments, fitted
        advance_source(layer, streams)
        del layer  # before the next one is read
        run.progress(stage, index + 1, max(surveyed) + 1, "")
    return losses


def _surveyed_streams(run: Run) -> Streams:
    """The source's stream of a few windows, as both streams, in every process: they are not worth dealing out."""
    every = max(1, len(run.text.ids_NT) // NUM_SURVEYED)
    surveyed_NT = run.text.ids_NT[::every][:NUM_SURVEYED]
    # windows with and without a gap among the fitted ones, and among the last two, which measure
    skipping_N = torch.arange(len(surveyed_NT)) % 2 == 1
    seed = run.plan.recipe.seed
    positions_NT = spread_positions(skipping_N, surveyed_NT.shape[1], run.plan.calibration_context, seed)
    streams = run.streams_of(surveyed_NT, positions_NT, max(1, len(surveyed_NT) // 3), ALONE)
    streams.converted_NTD = streams.source_NTD
    return streams


def candidates(theta: float, head_dim: int, qk_rope_head_dim: int) -> tuple[float, ...]:
    """rope_theta values to try, the source's own first."""
    exponents = dict.fromkeys((*EXPONENTS, qk_rope_head_dim / head_dim))
    return tuple(theta**exponent for exponent in exponents)


def surveyed_layers(num_layers: int, at_most: int = 4) -> frozenset[int]:
    """Indices spread over the depth of the model."""
    return frozenset(torch.linspace(0, num_layers - 1, min(num_layers, at_most)).long().tolist())


def output_error(layer: SourceLayer, mla: MlaWeights, streams: Streams) -> float:
    """Squared error of the output of latent attention over its squared size, on held-out windows."""
    mla = layer.complete(mla).to(dtype=torch.float32)
    lost = size = 0.0
    for places, source_BTD, _ in streams.batches(converted=False):
        if places.start < streams.num_fitted:
            continue
        x_BTD, positions_BT = layer.into_attention(source_BTD), streams.positions(places)
        with streams.computing():
            exact_BTD = layer.attention(x_BTD, positions_BT)
            found_BTD = layer.latent_attention(x_BTD, mla, positions_BT)
        lost += float((exact_BTD.float() - found_BTD.float()).square().sum())
        size += float(exact_BTD.float().square().sum())
    return lost / size if size else 0.0  # of an output projection that is zero


def choose(losses: Mapping[Candidate, list[float]]) -> Candidate:
    """The candidate with the smallest mean loss, or the first unless that is beaten by `MARGIN`."""
    own, *others = losses
    best = min(others, key=lambda one: sum(losses[one]), default=own)
    return best if sum(losses[best]) < MARGIN * sum(losses[own]) else own
