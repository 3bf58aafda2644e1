"""The flow: plan -> calibrate, split, factor, repair, refine (layer by layer) -> distil -> measure -> write -> verify.

Each step is a file of its own: fitting.py, distilling.py, writing.py, verification.py. Between them the layers lie in a
journal beside the destination, so a conversion that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.calibrate.tokens import CalibrationTokens, calibration_tokens, sample_from, shuffled
from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.destination import partial_of
from transmla.checkpoint.journal import Journal
from transmla.checkpoint.write import CheckpointWriter
from transmla.distilling import BlockReport, distil_layers
from transmla.export.deepseek_v3 import deepseek_v3_config
from transmla.fitting import FittedLayer, choose_theta, fit_layers
from transmla.maths.closed_form import ClosedForm
from transmla.planning import Plan, plan
from transmla.processes import Processes
from transmla.refine.settings import LEVELS, Refinement
from transmla.run import Progress, Run, free_bytes
from transmla.verification import Verification, Witness, verify
from transmla.writing import HeldoutNats, measure, write_companions, write_weights


@dataclass(frozen=True)
class ConversionReport:
    """The closing summary. Perplexities are those of the held-out calibration windows, not of a benchmark.

    latent_scales: s of maths/fold.py, by layer
    """

    plan: Plan
    destination: Path
    theta: float
    theta_losses: dict[float, list[float]]
    layers: tuple[FittedLayer, ...]
    blocks: tuple[BlockReport, ...]
    latent_scales: tuple[float, ...]
    heldout: HeldoutNats
    num_calibration_tokens: int
    verification: Verification
    seconds: float
    written_bytes: int


def convert(
    source: str,
    destination: str | Path | None = None,
    *,
    latent: int | None = None,
    rope: int | None = None,
    refine: str | None = None,
    calibration: str | None = None,
    tokens: int | None = None,
    window: int | None = None,
    theta: float | str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    recipe: str | Path | None = None,
    device: str = "cpu",
    offload: float | None = None,
    block_layers: int | None = None,
    restart: bool = False,
    method: ClosedForm | None = None,
    refinement: Refinement | None = None,
    progress: Progress | None = None,
    shard_bytes: int = 4 * 2**30,
) -> ConversionReport:
    """Convert a GQA, MHA or MQA checkpoint to multi-head latent attention and write it as one folder.

    source:      Hugging Face folder, .gguf file, hub id, recipe name, or "stories260k" (ships with the package)
    destination: new folder; default NAME-mla-LATENT-ROPE in the working directory. Nothing is overwritten
    latent:      kv_lora_rank, cached values per token and layer;  rope: qk_rope_head_dim, cached beside them
    refine:      "off" (closed form alone), "fast" or "full": gradient steps on the calibration tokens
    calibration: text file, table with a `text` column, dataset id, "wikitext" (ships with the package) or "self";
                 several, separated by "+", share the tokens
    tokens:      calibration tokens in all;  window: tokens per window
    theta:       rope_theta of the target, or "auto": chosen by the measured error of a few layers
    dtype:       of the written weights: auto (as the source), float32, bfloat16, float16
    device:      where the arithmetic runs;  seed: of everything random (only "self" calibration is)
    offload:     GiB of calibration activations to hold in memory; more goes into a file beside the destination
    block_layers: layers that are distilled at once; default: all that fit into half of the free memory
    restart:     delete an unfinished conversion to the same destination instead of going on with it
    method, refinement: variants of the closed form and of the refinement, see `ClosedForm` and `Refinement`
    progress:    called as progress(stage, done, total, remark)

    Under `accelerate launch` or torchrun all processes call this; they share the windows, and process 0 writes.
    Raises the errors of `transmla.errors`; the destination exists only if all went well. A conversion that was
    interrupted leaves its finished steps in DESTINATION.partial, and the same call goes on from there.
    """
    started = time.monotonic()
    settings: dict[str, Any] = {
        "latent": latent, "rope": rope, "refine": refine, "calibration": calibration, "tokens": tokens,
        "window": window, "theta": theta, "dtype": dtype, "seed": seed, "recipe": recipe,
    }  # fmt: skip
    planned = plan(source, **settings)
    target = Path(destination) if destination is not None else default_destination(planned)
    processes = Processes.current()
    where = processes.device(device)
    # all that can be refused has been refused before gigabytes are downloaded
    planned = plan(source, target, download=True, **settings)
    level = refinement or LEVELS[planned.recipe.refine]
    run = Run(planned, method or ClosedForm(), level, where, progress or (lambda *_: None), processes)
    run.block_layers = block_layers
    with torch.no_grad(), _writer(processes, target, shard_bytes) as writer:
        text = _tokens(run)
        journal = Journal(target, _fingerprint(run, text), restart=restart and processes.first)
        processes.wait()
        run.folder = _offload_folder(run, text, target, offload)
        chosen, theta_losses = choose_theta(run, text, journal)
        streams = run.streams(text.ids_NT)
        witness = Witness(text.ids_NT[-1], _embedded(run, text.ids_NT[-1:])[0])
        layers = fit_layers(run, streams, chosen, journal)
        blocks = distil_layers(run, streams, text, journal)
        measured = measure(run, streams, text, journal)
        del streams
        if writer is not None:
            scales = write_weights(run, witness, measured, journal, writer)
            config = deepseek_v3_config(
                planned.source.config, planned.mla, chosen, planned.max_position_embeddings, planned.dtype
            )
            sections = {
                "rope_theta": {"chosen": chosen, "losses": {f"{key:g}": found for key, found in theta_losses.items()}},
                "calibration": {"text": text.name, "tokens": text.ids_NT.numel(), "sha256": text.digest},
                "computed": {
                    "device": where.type, "forward_dtype": str(run.compute), "processes": processes.size,
                },
                "heldout": asdict(measured.heldout),
                "layers": [
                    vars(layer) | {"latent_scale": scale} for layer, scale in zip(layers, scales, strict=True)
                ],
                "distilled_blocks": [vars(block) for block in blocks],
            }  # fmt: skip
            write_companions(run, config, sections, writer)
            verified = verify(writer.partial, witness, where, run.progress)
            writer.commit()
        scales, verified = processes.from_first((scales, verified) if processes.first else None)
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return ConversionReport(
        planned, target, chosen, theta_losses, layers, blocks, scales, measured.heldout, text.ids_NT.numel(), verified,
        time.monotonic() - started, written,
    )  # fmt: skip


def default_destination(planned: Plan) -> Path:
    """NAME-mla-LATENT-ROPE in the working directory."""
    stem = planned.resolved.path.stem if planned.source.format == "gguf" else planned.resolved.name
    name = Path(stem).expanduser().resolve().name if Path(stem).exists() else stem.rsplit("/", 1)[-1]
    return Path(f"{name}-mla-{planned.mla.kv_lora_rank}-{planned.mla.qk_rope_head_dim}")


@contextlib.contextmanager
def _writer(processes: Processes, target: Path, shard_bytes: int) -> Iterator[CheckpointWriter | None]:
    """The writer in process 0; the others wait until there is a place to write to."""
    if not processes.first:
        processes.wait()
        yield None
        return
    with CheckpointWriter(target, shard_bytes=shard_bytes) as writer:
        processes.wait()
        yield writer


def _tokens(run: Run) -> CalibrationTokens:
    """Calibration windows, made by process 0."""
    recipe, source, found = run.plan.recipe, run.plan.source, None
    run.progress("tokens", 0, 1, recipe.calibration)
    window = min(recipe.window, run.plan.max_position_embeddings)

    def sampler(num_windows: int, length: int) -> Tensor:
        from transmla.loading import load_source

        model = load_source(source, device=str(run.device))
        return sample_from(model, num_windows, length, seed=recipe.seed).cpu()

    if run.processes.first:
        made = calibration_tokens(recipe.calibration, tokenizer(source), recipe.tokens, window, sampler=sampler)
        found = shuffled(made, recipe.seed)
    text: CalibrationTokens = run.processes.from_first(found)
    run.progress("tokens", 1, 1, f"{text.ids_NT.numel():,} tokens")
    return text


def _embedded(run: Run, ids_NT: Tensor) -> Tensor:
    stream_NTD = torch.empty(*ids_NT.shape, run.plan.gqa.hidden_size)
    run.embed(ids_NT, stream_NTD)
    return stream_NTD


def _fingerprint(run: Run, text: CalibrationTokens) -> dict[str, Any]:
    """All that the steps in the journal depend on, but for the sizes, which are in their names."""
    planned = run.plan
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in planned.source.files()}
    return {
        "source": planned.resolved.name,
        "files": files,
        "calibration": [text.name, text.digest, list(text.ids_NT.shape)],
        "theta": planned.recipe.theta,
        "method": asdict(run.method),
        "refinement": asdict(run.refinement),
    }


def _offload_folder(run: Run, text: CalibrationTokens, target: Path, offload: float | None) -> Path | None:
    """Where the activations of this process go: None for memory."""
    sizes = run.plan.mla
    width = 2 * sizes.hidden_size + sizes.num_attention_heads * sizes.v_head_dim
    num_bytes = text.ids_NT.numel() / run.processes.size * width * 4
    limit = free_bytes(torch.device("cpu")) / 2 if offload is None else offload * 2**30
    return partial_of(target) if num_bytes > limit else None
