"""The flow: plan -> text -> theta -> closed form, layer by layer -> distil -> measure -> write -> verify.

Each step is a file of this folder. Between them the layers lie in a journal beside the destination, so that a
conversion that was killed continues from there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from transmla.checkpoint.companions import tokenizer_files
from transmla.checkpoint.destination import disk_errors, named_path, partial_of
from transmla.checkpoint.hashes import file_hashes
from transmla.checkpoint.hub_headers import UnreadHeadersError
from transmla.checkpoint.journal import Journal
from transmla.checkpoint.provenance import computing_versions, portable
from transmla.checkpoint.resolve import local
from transmla.checkpoint.write import SHARD_BYTES, CheckpointWriter
from transmla.conversion.calibration import calibration_text
from transmla.conversion.distil import BlockReport, distil_layers
from transmla.conversion.fit import LayerReport, fit_layers
from transmla.conversion.kept import KeptLayers
from transmla.conversion.levels import LEVELS, Refinement, with_batch
from transmla.conversion.measure import HeldoutNats, measure
from transmla.conversion.plan import Plan, plan
from transmla.conversion.run import Run
from transmla.conversion.search import Trial, find_latent
from transmla.conversion.split import SplitTrial, choose_split
from transmla.conversion.target import target_config
from transmla.conversion.theta import choose_theta
from transmla.conversion.verify import Verification, Witness, verify
from transmla.conversion.write import write_companions, write_weights
from transmla.devices import free_bytes, named
from transmla.geometry import latent_candidates
from transmla.maths.closed_form import ClosedForm
from transmla.model.source import SourceModel
from transmla.processes import ALONE, Processes
from transmla.progress import Progress, silent
from transmla.tables import Shown
from transmla.text.mixes import parse_mix
from transmla.text.windows import CalibrationTokens


@dataclass(frozen=True)
class ConversionReport(Shown):
    """The closing summary. Perplexities are those of the held-out calibration windows, not of a benchmark.

    theta:         of the rotary frequencies; None: every layer has its own, in the config
    latent_scales: s of maths/fold.py, by layer; none in the own form;  tried: sizes that `latent="auto"` tried
    splits:        divisions of the cache that `rope="auto"` measured
    """

    plan: Plan
    destination: Path
    theta: float | None
    theta_losses: dict[float, list[float]]
    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...]
    latent_scales: tuple[float, ...]
    heldout: HeldoutNats
    tried: tuple[Trial, ...]
    splits: tuple[SplitTrial, ...]
    num_calibration_tokens: int
    verification: Verification
    seconds: float
    written_bytes: int

    def summary(self) -> dict[str, Any]:
        """The conversion as plain values, for JSON."""
        return {
            "destination": str(self.destination),
            "plan": self.plan.summary(),
            "theta": self.theta,
            "layers": [asdict(layer) for layer in self.layers],
            "blocks": [asdict(block) for block in self.blocks],
            "heldout": asdict(self.heldout),
            "tried": [asdict(trial) for trial in self.tried],
            "splits": [asdict(trial) for trial in self.splits],
            "num_calibration_tokens": self.num_calibration_tokens,
            "verification": asdict(self.verification),
            "seconds": self.seconds,
            "written_bytes": self.written_bytes,
        }

    def show(self, console: Console) -> None:
        from transmla.conversion.show import show_conversion

        show_conversion(self, console)


def convert(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    recipe: str | Path | None = None,
    device: str = "auto",
    offload: float | None = None,
    block_layers: int | None = None,
    restart: bool = False,
    method: ClosedForm | None = None,
    refinement: Refinement | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    **settings: Any,
) -> ConversionReport:
    """Convert a GQA, MHA or MQA checkpoint to multi-head latent attention and write it as one folder.

    source:      Hugging Face folder, .gguf file, hub id, recipe name, or "stories260k" (ships with the package)
    destination: new folder; default NAME-mla-LATENT-ROPE in the working directory (NAME-mla-auto, NAME-mla-TOTAL
                 where sizes are searched for). Nothing is overwritten
    recipe:      path or name of a recipe; its values give way to the settings
    device:      where the arithmetic runs; "auto": a GPU if there is one
    offload:     GiB that calibration activations may take in the memory of a process; if they need more, they go
                 into a file beside the destination. Default: half of the free memory
    block_layers: layers that are distilled at once; default: all that fit into half of the free memory
    restart:     delete an unfinished conversion to the same destination instead of continuing it
    method, refinement: numbers of the closed form and of the refinement, see `ClosedForm` and `Refinement`
    progress:    called as progress(stage, done, total, remark)
    settings:    any field of `transmla.recipe.Recipe` but `heal`: latent, rope, refine, calibration, tokens, dtype ...

    Under `accelerate launch` or torchrun all processes call this; they share the windows, and process 0 writes.
    Raises the errors of `transmla.errors`; the destination exists only if all went well. A conversion that was
    interrupted leaves its finished steps in DESTINATION.partial, and the same call continues from there.
    """
    device = named(device)
    started = time.monotonic()
    try:
        planned = plan(source, recipe=recipe, **settings)
    except UnreadHeadersError:
        planned = plan(source, recipe=recipe, download=True, **settings)
    target = named_path(destination) if destination is not None else default_destination(planned)
    processes = Processes.current(device)
    where = processes.device(device)
    # everything that can be refused is refused before gigabytes are downloaded
    planned = plan(source, target, recipe=recipe, download=True, **settings)
    level = with_batch(refinement or LEVELS[planned.recipe.refine], planned.recipe.batch)
    method = method or ClosedForm()
    tell = (progress or silent) if processes.first else silent
    model = SourceModel(planned.source, planned.family, planned.gqa, where)
    with torch.no_grad(), _writer(processes, target, shard_bytes) as writer:
        tell("hash source", 0, 1, "")
        hashes = processes.from_first(_hashes(planned) if processes.first else None)
        tell("hash source", 1, 1, "")
        journal = _journal(target, _fingerprint(planned, method, level, hashes), processes, restart)
        if processes.first:
            model.check_ends()
        text = calibration_text(planned, journal, processes, where, tell)
        run = Run(
            planned, model, text, KeptLayers(journal, planned.mla, processes, where), method, level, where, processes,
            tell, _activations(planned, text, processes, target, where, offload), block_layers,
        )  # fmt: skip
        splits: tuple[SplitTrial, ...] = ()
        if planned.recipe.rope == "auto":
            run, splits = choose_split(run)
        if planned.recipe.latent == "auto":
            run, tried, fitted = _searched(run)
        else:
            tried, fitted = (), _fit(run)
        scales, verified = processes.from_first(
            _write(run, fitted, tried, splits, hashes["source"], writer) if writer is not None else None
        )
    with disk_errors(target):
        written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return ConversionReport(
        run.plan, target, fitted.theta, fitted.theta_losses, fitted.layers, fitted.blocks, scales,
        fitted.heldout, tried, splits, text.ids_NT.numel(), verified, time.monotonic() - started, written,
    )  # fmt: skip


@dataclass(frozen=True)
class _Fitted:
    """What is known of the layers in the journal when all of them are finished."""

    theta: float | None
    theta_losses: dict[float, list[float]]
    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...]
    heldout: HeldoutNats


def _fit(run: Run) -> _Fitted:
    """All that comes before writing; steps that the journal holds are not taken again."""
    theta, theta_losses = choose_theta(run)
    streams = run.streams()
    layers = fit_layers(run, streams, theta)
    blocks = distil_layers(run, streams)
    return _Fitted(theta, theta_losses, layers, blocks, measure(run, streams))


def _searched(run: Run) -> tuple[Run, tuple[Trial, ...], _Fitted]:
    """The smallest latent within the budget. The journal keeps what each size came to, but the layers of one only."""
    found: dict[int, _Fitted] = {}

    def fit(latent: int) -> HeldoutNats:
        candidate = run.with_latent(latent)
        if (kept := candidate.kept.values("trial")) is not None:
            return HeldoutNats(**kept)
        found[latent] = _fit(candidate)
        candidate.kept.save("trial", asdict(found[latent].heldout))
        return found[latent].heldout

    def forget(latent: int) -> None:
        run.with_latent(latent).kept.forget_layers()

    recipe = run.plan.recipe
    assert recipe.budget is not None
    assert not isinstance(recipe.rope, str)
    sizes = latent_candidates(run.plan.gqa, recipe.rope)
    latent, tried = find_latent(sizes, recipe.budget, fit, forget, run.progress)
    chosen = run.with_latent(latent)
    return chosen, tried, found.get(latent) or _fit(chosen)


def _write(
    run: Run,
    fitted: _Fitted,
    tried: tuple[Trial, ...],
    splits: tuple[SplitTrial, ...],
    source_hashes: dict[str, str],
    writer: CheckpointWriter,
) -> tuple[tuple[float, ...], Verification]:
    """The folder, verified and given its name; returns the latent scales and what verification found."""
    planned, text, num_processes = run.plan, run.text, run.processes.size
    # only this process reads from now on
    run = replace(run, processes=ALONE, kept=replace(run.kept, processes=ALONE))
    (embedded_TD,) = run.model.embed(text.ids_NT[-1:])
    witness = Witness(text.ids_NT[-1], embedded_TD)
    scales = write_weights(run, witness, writer)
    config = target_config(planned, fitted.theta, witness.inv_freq_LM, tied=run.model.tied)
    losses = {f"{theta:g}": found for theta, found in fitted.theta_losses.items()}
    sections = {
        "rope_theta": {"chosen": fitted.theta, "losses": losses},
        "calibration": {
            "text": text.name,
            "tokens": text.ids_NT.numel(),
            "window": text.ids_NT.shape[1],
            "context": planned.calibration_context,
            "begin": {"tokens": list(text.begin), "windows": planned.recipe.begin},
            "sha256": text.digest,
        },
        "computed": {"device": run.device.type, "forward_dtype": str(run.compute), "processes": num_processes},
        "heldout": asdict(fitted.heldout),
        "tried": [vars(trial) for trial in tried],
        "splits": [asdict(split) for split in splits],
        "layers": _with_scales(fitted.layers, scales),
        "distilled_blocks": [vars(block) for block in fitted.blocks],
    }
    write_companions(run, config, sections, source_hashes, writer)
    verified = verify(writer.partial, planned.family, witness, run.device, run.progress)
    writer.commit()
    return scales, verified


def _with_scales(layers: tuple[LayerReport, ...], scales: tuple[float, ...]) -> list[dict[str, Any]]:
    """Layers as plain values; scales: of their latents, where these are folded"""
    if not scales:
        return [vars(layer) for layer in layers]
    return [vars(layer) | {"latent_scale": scale} for layer, scale in zip(layers, scales, strict=True)]


def default_destination(planned: Plan) -> Path:
    """NAME-mla-LATENT-ROPE in the working directory."""
    stem = planned.resolved.path.stem if planned.source.format == "gguf" else planned.resolved.name
    name = Path(stem).expanduser().resolve().name if Path(stem).exists() else stem.rsplit("/", 1)[-1]
    if planned.recipe.latent == "auto":
        return Path(f"{name}-mla-auto")
    if planned.recipe.rope == "auto":
        return Path(f"{name}-mla-{planned.mla.cache_values()}")
    return Path(f"{name}-mla-{planned.mla.kv_lora_rank}-{planned.mla.qk_rope_head_dim}")


@contextlib.contextmanager
def _writer(processes: Processes, target: Path, shard_bytes: int) -> Iterator[CheckpointWriter | None]:
    """The writer in process 0; the others wait until there is a place to write to."""
    if not processes.first:
        processes.wait()
        yield None
        return
    with CheckpointWriter(target, shard_bytes=shard_bytes, resumes=True) as writer:
        processes.wait()
        yield writer


def _journal(target: Path, settings: dict[str, Any], processes: Processes, restart: bool) -> Journal:
    """The one journal of all processes: process 0 deletes what it has to before the others look, and writes after."""
    opened = Journal(target, settings, restart=restart) if processes.first else None
    processes.wait()
    opened = opened or Journal(target, settings)
    processes.wait()
    return opened


def _hashes(planned: Plan) -> dict[str, Any]:
    """SHA-256 of the source's files and of the texts, read once; a resumed conversion recognises them by it."""
    texts = [local(part.name) for part in parse_mix(planned.recipe.mix, "--calibration")]
    return {
        "source": file_hashes(planned.source.files()),
        "tokenizer": file_hashes(tokenizer_files(planned.source)),
        "texts": [file_hashes([path]) for path in texts if path is not None and path.is_file()],
    }


def _fingerprint(planned: Plan, method: ClosedForm, refinement: Refinement, hashes: dict[str, Any]) -> dict[str, Any]:
    """All that the steps in the journal depend on, but for the sizes, which are in their names; the windows of the
    calibration text are a step themselves. hashes: from `_hashes`"""
    recipe = planned.recipe
    settings = {
        "source": planned.resolved.name,
        "config": dict(planned.source.config),
        "files": hashes["source"],
        "tokenizer": hashes["tokenizer"],
        "calibration": recipe.mix,
        "texts": hashes["texts"],
        "tokens": [recipe.num_tokens, recipe.sampled],
        "window": recipe.window,
        "begin": recipe.begin,
        "context": planned.calibration_context,
        "seed": recipe.seed,
        "theta": recipe.theta,
        "form": planned.form,
        "lossy": recipe.lossy,
        "method": asdict(method),
        "refinement": asdict(refinement),
        "latent_bits": None if recipe.latent_bits is None else [recipe.latent_bits, recipe.latent_recent],
        "versions": computing_versions(),
    }
    portable_settings: dict[str, Any] = portable(settings)
    return portable_settings


def _activations(
    planned: Plan,
    text: CalibrationTokens,
    processes: Processes,
    target: Path,
    device: torch.device,
    offload: float | None,
) -> Path | torch.device:
    """Where the activations of a process are kept: on the device, in memory, or in the folder of the partial result."""
    sizes = planned.mla
    width = 2 * sizes.hidden_size + sizes.num_attention_heads * sizes.v_head_dim
    num_bytes = text.ids_NT.numel() / processes.size * width * 4
    if offload is None and device.type != "cpu" and num_bytes < free_bytes(device) / 4:
        return device
    cpu = torch.device("cpu")
    limit = free_bytes(cpu) / 2 if offload is None else offload * 2**30
    return partial_of(target) if num_bytes > limit else cpu
