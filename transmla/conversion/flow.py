"""The flow: plan -> calibrate, split, factor, repair, refine (layer by layer) -> distil -> measure -> write -> verify.

Each step is a file of its own: fitting.py, distilling.py, writing.py, verification.py. Between them the layers lie in a
journal beside the destination, so a conversion that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.destination import partial_of
from transmla.checkpoint.journal import Journal
from transmla.checkpoint.write import SHARD_BYTES, CheckpointWriter
from transmla.conversion.distil import BlockReport, distil_layers
from transmla.conversion.fit import LayerReport, choose_theta, fit_layers, step_name
from transmla.conversion.levels import LEVELS, Refinement, with_batch
from transmla.conversion.plan import Plan, plan
from transmla.conversion.run import Run, heldout_of
from transmla.conversion.search import Trial, find_latent
from transmla.conversion.verify import Verification, Witness, verify
from transmla.conversion.write import HeldoutNats, Measured, measure, write_companions, write_weights
from transmla.devices import free_bytes
from transmla.maths.closed_form import ClosedForm
from transmla.processes import ALONE, Processes
from transmla.progress import Progress, silent
from transmla.targets.stock import deepseek_v3_config
from transmla.text.mixes import needs_source, parse_mix
from transmla.text.sampling import continue_from, sample_from
from transmla.text.windows import CalibrationTokens, calibration_tokens, shuffled, with_sampled


@dataclass(frozen=True)
class ConversionReport:
    """The closing summary. Perplexities are those of the held-out calibration windows, not of a benchmark.

    latent_scales: s of maths/fold.py, by layer;  tried: sizes that `latent="auto"` looked at
    """

    plan: Plan
    destination: Path
    theta: float
    theta_losses: dict[float, list[float]]
    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...]
    latent_scales: tuple[float, ...]
    heldout: HeldoutNats
    tried: tuple[Trial, ...]
    num_calibration_tokens: int
    verification: Verification
    seconds: float
    written_bytes: int


def convert(
    source: str,
    destination: str | Path | None = None,
    *,
    latent: int | str | None = None,
    budget: float | None = None,
    rope: int | None = None,
    q_latent: int | None = None,
    nope: int | None = None,
    value: int | None = None,
    refine: str | None = None,
    batch: int | None = None,
    calibration: str | None = None,
    tokens: int | None = None,
    sampled: int | None = None,
    window: int | None = None,
    context: int | None = None,
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
    shard_bytes: int = SHARD_BYTES,
) -> ConversionReport:
    """Convert a GQA, MHA or MQA checkpoint to multi-head latent attention and write it as one folder.

    source:      Hugging Face folder, .gguf file, hub id, recipe name, or "stories260k" (ships with the package)
    destination: new folder; default NAME-mla-LATENT-ROPE in the working directory. Nothing is overwritten
    latent:      kv_lora_rank, cached values per token and layer;  rope: qk_rope_head_dim, cached beside them
    q_latent:    q_lora_rank: queries through a latent of their own, as in DeepSeek-V3; default: none, nothing is lost
    nope, value: qk_nope_head_dim and v_head_dim; default: head_dim. Up to the latent, wider heads are capacity for the
                 refinement that the cache does not pay for, but queries and output projection do
    budget:      with latent="auto": the smallest latent is taken whose perplexity on the held-out calibration windows
                 is at most 1 + budget times the source's
    refine:      "off" (closed form alone), "fast" or "full": gradient steps on the calibration tokens
    batch:       windows per refinement step, default 1; processes share them, so no more than these are busy
    calibration: text file, table with a `text` column, dataset id, "wikitext", "synthetic", "continued" or "code" (they
                 ship with the package) or "self"; several share the tokens, "A:3+B" three to one. Default: a mix of
                 those that ship, see `CALIBRATION`
    tokens:      calibration tokens in all, default 180,224, for "full" 573,440, for "off" 131,072;  window: tokens per
                 window
    sampled:     tokens more, which the source itself writes as continuations of pieces of the calibration text; in
                 whole windows; needs the whole source in memory
    context:     positions that half of the windows are spread over, by one gap each: distances beyond the window count,
                 too. At most, and by default, the source's context, but no more than 8,192
    theta:       rope_theta of the target, or "auto": chosen by the measured error of a few layers
    dtype:       of the written weights: auto (as the source), float32, bfloat16, float16
    device:      where the arithmetic runs;  seed: of the order of the windows, of gaps and of sampled text
    offload:     GiB that calibration activations may take in the memory of a process; if they need more, they go
                 into a file beside the destination. Default: half of the free memory
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
        "latent": latent, "budget": budget, "rope": rope, "q_latent": q_latent, "nope": nope, "value": value,
        "refine": refine, "batch": batch, "calibration": calibration, "tokens": tokens, "sampled": sampled,
        "window": window, "context": context, "theta": theta, "dtype": dtype, "seed": seed, "recipe": recipe,
    }  # fmt: skip
    planned = plan(source, **settings)
    target = Path(destination) if destination is not None else default_destination(planned)
    processes = Processes.current(device)
    where = processes.device(device)
    # all that can be refused has been refused before gigabytes are downloaded
    planned = plan(source, target, download=True, **settings)
    level = with_batch(refinement or LEVELS[planned.recipe.refine], planned.recipe.batch)
    run = Run(planned, method or ClosedForm(), level, where, progress or silent, processes)
    run.block_layers = block_layers
    with torch.no_grad(), _writer(processes, target, shard_bytes) as writer:
        journal = _journal(target, _fingerprint(run), processes, restart)
        run.check_outer_weights()
        text = _tokens(run, journal)
        run.folder = _offload_folder(run, text, target, offload)
        if planned.recipe.latent == "auto":
            run, tried, fitted = _searched(run, text, journal)
        else:
            tried, fitted = (), _fit(run, text, journal)
        scales, verified = processes.from_first(
            _write(replace(run, processes=ALONE), fitted, tried, text, journal, writer, processes.size)
            if writer is not None
            else None
        )
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return ConversionReport(
        run.plan, target, fitted.theta, fitted.theta_losses, fitted.layers, fitted.blocks, scales,
        fitted.measured.heldout, tried, text.ids_NT.numel(), verified, time.monotonic() - started, written,
    )  # fmt: skip


@dataclass(frozen=True)
class _Fitted:
    """What is known of the layers in the journal when all of them are finished."""

    theta: float
    theta_losses: dict[float, list[float]]
    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...]
    measured: Measured


def _fit(run: Run, text: CalibrationTokens, journal: Journal) -> _Fitted:
    """All that comes before writing; steps that the journal holds are not taken again."""
    theta, theta_losses = choose_theta(run, text, journal)
    streams = run.streams(text.ids_NT, run.positions(text.ids_NT))
    layers = fit_layers(run, streams, theta, journal)
    blocks = distil_layers(run, streams, text, journal)
    return _Fitted(theta, theta_losses, layers, blocks, measure(run, streams, text, journal))


def _searched(run: Run, text: CalibrationTokens, journal: Journal) -> tuple[Run, tuple[Trial, ...], _Fitted]:
    """The smallest latent within the budget. The journal keeps what each size came to, but the layers of one only."""
    found: dict[int, _Fitted] = {}

    def fit(candidate: Run) -> HeldoutNats:
        kept = run.processes.from_first(journal.values(step_name(candidate, "trial")))
        if kept is not None:
            return HeldoutNats(**kept)
        fitted = found[candidate.plan.mla.kv_lora_rank] = _fit(candidate, text, journal)
        if run.processes.first:
            journal.save(step_name(candidate, "trial"), {}, asdict(fitted.measured.heldout))
        return fitted.measured.heldout

    def forget(candidate: Run) -> None:
        if run.processes.first:
            journal.drop(step_name(candidate, "layer-*"))

    chosen, tried = find_latent(run, fit, forget)
    return chosen, tried, found.get(chosen.plan.mla.kv_lora_rank) or _fit(chosen, text, journal)


def _write(
    run: Run,
    fitted: _Fitted,
    tried: tuple[Trial, ...],
    text: CalibrationTokens,
    journal: Journal,
    writer: CheckpointWriter,
    num_processes: int,
) -> tuple[tuple[float, ...], Verification]:
    """The folder, verified and given its name; returns the latent scales and what verification found."""
    planned = run.plan
    witness = Witness(text.ids_NT[-1], run.embedded(text.ids_NT[-1]))
    scales = write_weights(run, witness, fitted.measured, journal, writer)
    config = deepseek_v3_config(
        planned.source.config, planned.mla, fitted.theta, planned.max_position_embeddings, planned.dtype
    )
    losses = {f"{theta:g}": found for theta, found in fitted.theta_losses.items()}
    sections = {
        "rope_theta": {"chosen": fitted.theta, "losses": losses},
        "calibration": {
            "text": text.name,
            "tokens": text.ids_NT.numel(),
            "window": text.ids_NT.shape[1],
            "context": planned.calibration_context,
            "sha256": text.digest,
        },
        "computed": {
            "device": run.device.type,
            "forward_dtype": str(run.compute),
            "processes": num_processes,
        },
        "heldout": asdict(fitted.measured.heldout),
        "tried": [vars(trial) for trial in tried],
        "layers": [vars(layer) | {"latent_scale": scale} for layer, scale in zip(fitted.layers, scales, strict=True)],
        "distilled_blocks": [vars(block) for block in fitted.blocks],
    }
    write_companions(run, config, sections, writer)
    verified = verify(writer.partial, witness, run.device, run.progress)
    writer.commit()
    return scales, verified


def default_destination(planned: Plan) -> Path:
    """NAME-mla-LATENT-ROPE in the working directory."""
    stem = planned.resolved.path.stem if planned.source.format == "gguf" else planned.resolved.name
    name = Path(stem).expanduser().resolve().name if Path(stem).exists() else stem.rsplit("/", 1)[-1]
    if planned.recipe.latent == "auto":
        return Path(f"{name}-mla-auto")
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


def _journal(target: Path, settings: dict[str, Any], processes: Processes, restart: bool) -> Journal:
    """The one journal of all processes: process 0 deletes what it has to before the others look, and writes after."""
    opened = Journal(target, settings, restart=restart) if processes.first else None
    processes.wait()
    opened = opened or Journal(target, settings)
    processes.wait()
    return opened


def _tokens(run: Run, journal: Journal) -> CalibrationTokens:
    """Calibration windows, made by process 0 once: an interrupted conversion goes on with those that it had, since
    what a model or a hub writes need not be the same twice."""
    recipe = run.plan.recipe
    run.progress("tokens", 0, 1, recipe.mix)
    text = None
    if run.processes.first:
        if kept := journal.load("text"):
            values = kept[1]
            text = CalibrationTokens(kept[0]["ids_NT"], values["name"], values["digest"])
            run.num_heldout = values["num_heldout"]
        else:
            text = _made(run)
            values = {"name": text.name, "digest": text.digest, "num_heldout": run.num_heldout}
            journal.save("text", {"ids_NT": text.ids_NT}, values, alone=needs_source(recipe.mix, recipe.sampled))
    run.num_heldout = run.processes.from_first(run.num_heldout)
    found: CalibrationTokens = run.processes.from_first(text)
    run.progress("tokens", 1, 1, f"{found.ids_NT.numel():,} tokens")
    return found


def _made(run: Run) -> CalibrationTokens:
    """Calibration windows from the texts of the recipe, and sampled ones among them."""
    recipe, source = run.plan.recipe, run.plan.source
    window = min(recipe.window, run.plan.max_position_embeddings)

    def model() -> Any:
        from transmla.model.loading import load_source

        return load_source(source, dtype=run.compute, device=str(run.device))

    def tell(done: int, total: int) -> None:
        run.progress("sample", done, total, "tokens")

    def sampler(num_windows: int, length: int) -> Tensor:
        return sample_from(model(), num_windows, length, seed=recipe.seed, progress=tell)

    made = calibration_tokens(recipe.mix, tokenizer(source), recipe.num_tokens, window, sampler=sampler)
    found = shuffled(made, recipe.seed)
    if num_sampled := -(-recipe.sampled // window):
        run.num_heldout = heldout_of(len(found.ids_NT))
        prompts_NT = found.ids_NT[: -run.num_heldout]
        sampled_NT = continue_from(model(), prompts_NT, num_sampled, seed=recipe.seed, progress=tell)
        found = with_sampled(found, sampled_NT, run.num_heldout)
    return found


def _fingerprint(run: Run) -> dict[str, Any]:
    """All that the steps in the journal depend on, but for the sizes, which are in their names; the windows of the
    calibration text are a step themselves."""
    planned, recipe = run.plan, run.plan.recipe
    texts = [Path(part.name).expanduser() for part in parse_mix(recipe.mix, "--calibration")]
    return {
        "source": planned.resolved.name,
        "config": dict(planned.source.config),
        "files": {file.name: _stamp(file) for file in planned.source.files()},
        "calibration": recipe.mix,
        "texts": {str(path): _stamp(path) for path in texts if path.is_file()},
        "tokens": [recipe.num_tokens, recipe.sampled],
        "window": recipe.window,
        "context": planned.calibration_context,
        "seed": recipe.seed,
        "theta": recipe.theta,
        "method": asdict(run.method),
        "refinement": asdict(run.refinement),
    }


def _stamp(file: Path) -> list[int]:
    """Size, and time of the last change."""
    return [file.stat().st_size, file.stat().st_mtime_ns]


def _offload_folder(run: Run, text: CalibrationTokens, target: Path, offload: float | None) -> Path | None:
    """Where the activations of this process go: None for memory."""
    sizes = run.plan.mla
    width = 2 * sizes.hidden_size + sizes.num_attention_heads * sizes.v_head_dim
    num_bytes = text.ids_NT.numel() / run.processes.size * width * 4
    limit = free_bytes(torch.device("cpu")) / 2 if offload is None else offload * 2**30
    return partial_of(target) if num_bytes > limit else None
