"""The flow: plan -> read a layer -> calibrate -> split -> factor -> repair -> write -> verify.

Never more than one layer of weights, the two streams of calibration activations and one shard are in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.calibrate.layers import (
    SourceLayer,
    build_layer,
    layer_tensor_names,
    source_config,
    source_frequencies,
)
from transmla.calibrate.moments import observe
from transmla.calibrate.streams import (
    Streams,
    add_converted_attention,
    add_mlp,
    add_source_attention,
    converted_heads,
    next_token_losses,
    repair_output,
    stream_loss,
)
from transmla.calibrate.survey import candidates, choose, output_error, surveyed_layers
from transmla.calibrate.tokens import CalibrationTokens, calibration_tokens, sample_from
from transmla.checkpoint.companions import copy_companions, tokenizer
from transmla.checkpoint.provenance import file_hashes, versions, write_provenance
from transmla.checkpoint.write import CheckpointWriter
from transmla.errors import VerificationError
from transmla.export.deepseek_v3 import MODELING_FILE, deepseek_v3_config
from transmla.export.model_card import model_card
from transmla.families import rope_parameters
from transmla.maths.closed_form import ClosedForm, fit_layer
from transmla.maths.fold import INPUT_NORM_GAIN, fold_attention, latent_scale, residual_scale
from transmla.planning import Plan, plan
from transmla.verification import Verification, Witness, verify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# (stage, done, total, remark)
Progress = Callable[[str, int, int, str], None]
# share of the calibration windows that only measure
HELDOUT_SHARE = 1 / 16
# windows whose attention matrices are looked at
NUM_ATTENDED = 16
# windows of the survey that chooses theta
NUM_SURVEYED = 10


@dataclass(frozen=True)
class LayerReport:
    """What one layer lost: see `LowRank.loss`, `StreamLoss`; latent_scale is s of maths/fold.py."""

    layer: int
    latent_loss: float
    stream_loss_fitted: float
    stream_loss_heldout: float
    latent_scale: float


@dataclass(frozen=True)
class HeldoutNats:
    """Mean next-token loss in nats over the held-out calibration windows."""

    source: float
    converted: float
    num_windows: int


@dataclass(frozen=True)
class ConversionReport:
    """The closing summary. Perplexities are those of the held-out calibration windows, not of a benchmark."""

    plan: Plan
    destination: Path
    theta: float
    theta_losses: dict[float, list[float]]
    layers: tuple[LayerReport, ...]
    heldout: HeldoutNats
    num_calibration_tokens: int
    verification: Verification
    seconds: float
    written_bytes: int


@dataclass
class _Run:
    """One conversion at work: what all steps share."""

    plan: Plan
    method: ClosedForm
    device: torch.device
    autocast: torch.dtype | None
    progress: Progress
    frequencies: tuple[Tensor, float] = field(init=False)
    config: Any = field(init=False)

    def __post_init__(self) -> None:
        source = self.plan.source
        self.config = source_config(source.config)
        self.frequencies = source_frequencies(self.config, self.plan.gqa, source.rope_frequency_factors)

    def layer(self, index: int) -> SourceLayer:
        """Read one layer, float32 on the device."""
        names = layer_tensor_names(self.plan.family, self.config, index)
        read = self.plan.source.read
        tensors = {name: read(name, dtype=torch.float32, device=self.device) for name in names}
        return build_layer(self.plan.family, self.config, self.plan.gqa, index, tensors, *self.frequencies)

    def streams(self, ids_NT: Tensor, heldout_share: float = HELDOUT_SHARE) -> Streams:
        """Both streams at the input of layer 0; only the embeddings of tokens that occur are read."""
        ids, places = ids_NT.unique(return_inverse=True)
        rows = self.plan.source.rows(self.plan.family.embed_tokens, ids).float()
        stream_NTD = rows[places]
        num_heldout = max(1, round(len(ids_NT) * heldout_share))
        return Streams(stream_NTD, stream_NTD.clone(), num_heldout, self.device, self.autocast)


def convert(
    source: str,
    destination: str | Path | None = None,
    *,
    latent: int | None = None,
    rope: int | None = None,
    calibration: str | None = None,
    tokens: int | None = None,
    window: int | None = None,
    theta: float | str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    recipe: str | Path | None = None,
    device: str = "cpu",
    method: ClosedForm | None = None,
    progress: Progress | None = None,
    shard_bytes: int = 4 * 2**30,
) -> ConversionReport:
    """Convert a GQA, MHA or MQA checkpoint to multi-head latent attention and write it as one folder.

    source:      Hugging Face folder, .gguf file, hub id, recipe name, or "stories260k" (ships with the package)
    destination: new folder; default NAME-mla-LATENT-ROPE in the working directory. Nothing is overwritten
    latent:      kv_lora_rank, cached values per token and layer;  rope: qk_rope_head_dim, cached beside them
    calibration: text file, table with a `text` column, dataset id, "wikitext" (ships with the package) or "self"
    tokens:      calibration tokens in all;  window: tokens per window
    theta:       rope_theta of the target, or "auto": chosen by the measured error of a few layers
    dtype:       of the written weights: auto (as the source), float32, bfloat16, float16
    device:      where the arithmetic runs;  seed: of everything random (only "self" calibration is)
    method:      variants of the closed form, see `transmla.maths.closed_form.ClosedForm`
    progress:    called as progress(stage, done, total, remark)
    Raises the errors of `transmla.errors`; the destination exists only if all went well.
    """
    started = time.monotonic()
    settings: dict[str, Any] = {
        "latent": latent, "rope": rope, "calibration": calibration, "tokens": tokens, "window": window,
        "theta": theta, "dtype": dtype, "seed": seed, "recipe": recipe,
    }  # fmt: skip
    planned = plan(source, **settings)
    target = Path(destination) if destination is not None else default_destination(planned)
    # all that can be refused has been refused before gigabytes are downloaded
    planned = plan(source, target, download=True, **settings)
    where = torch.device(device)
    run = _Run(planned, method or ClosedForm(), where, _autocast(where), progress or (lambda *_: None))
    with torch.no_grad(), CheckpointWriter(target, shard_bytes=shard_bytes) as writer:
        text = _tokens(run)
        chosen, theta_losses = _theta(run, text)
        streams = run.streams(text.ids_NT)
        witness = Witness(text.ids_NT[-1], streams.source_NTD[-1])
        layers = _convert_layers(run, streams, witness, chosen, writer)
        nats = _finish_weights(run, streams, witness, text, writer)
        del streams
        config = deepseek_v3_config(
            planned.source.config, planned.mla, chosen, planned.max_position_embeddings, planned.dtype
        )
        sections = {
            "rope_theta": {"chosen": chosen, "losses": {f"{theta:g}": found for theta, found in theta_losses.items()}},
            "calibration": {"text": text.name, "tokens": text.ids_NT.numel(), "sha256": text.digest},
            "computed": {"device": where.type, "forward_dtype": str(run.autocast or torch.float32)},
            "heldout": asdict(nats),
            "layers": [asdict(layer) for layer in layers],
        }
        _write_companions(run, config, sections, writer)
        verified = verify(writer.partial, witness, where, run.progress)
        writer.commit()
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return ConversionReport(
        planned, target, chosen, theta_losses, layers, nats, text.ids_NT.numel(), verified,
        time.monotonic() - started, written,
    )  # fmt: skip


def default_destination(planned: Plan) -> Path:
    """NAME-mla-LATENT-ROPE in the working directory."""
    stem = planned.resolved.path.stem if planned.source.format == "gguf" else planned.resolved.name
    name = Path(stem).expanduser().resolve().name if Path(stem).exists() else stem.rsplit("/", 1)[-1]
    return Path(f"{name}-mla-{planned.mla.kv_lora_rank}-{planned.mla.qk_rope_head_dim}")


def _autocast(device: torch.device) -> torch.dtype | None:
    """bfloat16 for the forward passes where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else None


def _tokens(run: _Run) -> CalibrationTokens:
    recipe, source = run.plan.recipe, run.plan.source
    run.progress("tokens", 0, 1, recipe.calibration)
    window = min(recipe.window, run.plan.max_position_embeddings)

    def sampler(num_windows: int, length: int) -> Tensor:
        from transmla.loading import load_source

        model = load_source(source, device=str(run.device))
        return sample_from(model, num_windows, length, seed=recipe.seed).cpu()

    found = calibration_tokens(recipe.calibration, tokenizer(source), recipe.tokens, window, sampler=sampler)
    run.progress("tokens", 1, 1, f"{found.ids_NT.numel():,} tokens")
    return found


def _theta(run: _Run, text: CalibrationTokens) -> tuple[float, dict[float, list[float]]]:
    """rope_theta of the target and, if it was chosen here, the losses of all candidates by surveyed layer."""
    wanted = run.plan.recipe.theta
    if not isinstance(wanted, str):
        return float(wanted), {}
    own = float(rope_parameters(run.plan.source.config)["rope_theta"])
    mla = run.plan.mla
    tried = candidates(own, run.plan.gqa.head_dim, mla.qk_rope_head_dim)
    every = max(1, len(text.ids_NT) // NUM_SURVEYED)
    streams = run.streams(text.ids_NT[::every][:NUM_SURVEYED], heldout_share=0.2)
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
        add_mlp(layer, streams, source_only=True)
        del layer  # before the next one is read
        run.progress("choose theta", index + 1, max(surveyed) + 1, "")
    return choose(losses), losses


def _convert_layers(
    run: _Run, streams: Streams, witness: Witness, theta: float, writer: CheckpointWriter
) -> tuple[LayerReport, ...]:
    """Fit, repair and write every layer; the streams end behind the last one."""
    mla, method = run.plan.mla, run.method
    residual = residual_scale(float(run.plan.source.config["rms_norm_eps"]))
    reports = []
    for index in range(mla.num_hidden_layers):
        layer = run.layer(index)
        moments = observe(layer, streams, NUM_ATTENDED, two_streams=method.two_streams)
        gqa = layer.gqa.to(dtype=torch.float64)
        fitted = fit_layer(gqa, moments, mla.kv_lora_rank, mla.qk_rope_head_dim, theta, method)
        add_source_attention(layer, streams)
        heads = converted_heads(layer, fitted.mla, streams)
        o_DHv = fitted.mla.o_DHv
        if method.refit_output:
            o_DHv = repair_output(o_DHv, heads.out_NTF, streams, method.output_ridge)
        converted = replace(fitted.mla, o_DHv=o_DHv)
        add_converted_attention(o_DHv, heads.out_NTF, streams)
        loss = stream_loss(streams)
        add_mlp(layer, streams)
        witness.advance(layer, converted)
        scale = latent_scale(heads.latent_peak)
        _write_layer(run, layer, fold_attention(converted, scale, residual), residual, writer)
        del layer  # before the next one is read
        reports.append(LayerReport(index, fitted.latent_loss, loss.fitted, loss.heldout, scale))
        run.progress("convert layers", index + 1, mla.num_hidden_layers, f"stream error {loss.heldout:.2%} held out")
    return tuple(reports)


def _write_layer(
    run: _Run, layer: SourceLayer, attention: dict[str, Tensor], residual: float, writer: CheckpointWriter
) -> None:
    dtype = DTYPES[run.plan.dtype]
    tensors = {f"self_attn.{name}": tensor for name, tensor in attention.items()}
    for name, tensor in layer.other_tensors.items():
        factor = {"input_layernorm.weight": INPUT_NORM_GAIN, "mlp.down_proj.weight": residual}.get(name, 1.0)
        tensors[name] = tensor * factor
    for name, tensor in tensors.items():
        _add(writer, f"model.layers.{layer.index}.{name}", tensor, dtype)


def _add(writer: CheckpointWriter, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Write a tensor in its final dtype, unless that cannot hold it."""
    stored = tensor.to(dtype)
    if not torch.isfinite(torch.stack(torch.aminmax(stored))).all():
        raise VerificationError(
            "a weight does not fit into the wanted dtype",
            where=name,
            why=f"its largest value is {float(tensor.abs().max()):.3g}, {dtype} ends at {torch.finfo(dtype).max:.3g}",
            remedy="use --dtype bfloat16 or float32",
        )
    writer.add(name, stored)


def _finish_weights(
    run: _Run, streams: Streams, witness: Witness, text: CalibrationTokens, writer: CheckpointWriter
) -> HeldoutNats:
    """Write what is not in a layer, and read the head once for the held-out losses."""
    family, source, dtype = run.plan.family, run.plan.source, DTYPES[run.plan.dtype]
    eps = float(source.config["rms_norm_eps"])
    head_VD = source.read(family.embed_tokens)  # also the head, if the two are tied
    _add(writer, "model.embed_tokens.weight", head_VD.float() * residual_scale(eps), dtype)
    if family.lm_head in source.tensors and not source.config.get("tie_word_embeddings"):
        del head_VD  # before the next one is read
        head_VD = source.read(family.lm_head)
    _add(writer, "lm_head.weight", head_VD, dtype)
    norm_D = source.read(family.norm, dtype=torch.float32, device=run.device)
    _add(writer, "model.norm.weight", norm_D, dtype)
    writer.close_shards()
    witness.finish(norm_D, eps, head_VD[witness.vocabulary_K])
    compute = run.autocast or torch.float32
    head_VD, norm_D = head_VD.to(run.device, compute), norm_D.to(run.device)

    def logits(stream_TD: Tensor) -> Tensor:
        normed = torch.nn.functional.rms_norm(stream_TD, (stream_TD.shape[1],), norm_D, eps)
        return normed.to(compute) @ head_VD.T

    source_N, converted_N = next_token_losses(streams, text.ids_NT, logits)
    if not torch.isfinite(source_N).all() or not torch.isfinite(converted_N).all():
        raise VerificationError(
            "the model returns NaN or infinity",
            where="held-out calibration windows",
            why=f"losses {source_N.tolist()} of the source, {converted_N.tolist()} converted",
            remedy="check the source with `transmla eval SRC --dtype float32`",
        )
    return HeldoutNats(float(source_N.mean()), float(converted_N.mean()), len(source_N))


def _write_companions(run: _Run, config: dict[str, Any], sections: dict[str, Any], writer: CheckpointWriter) -> None:
    """Everything beside the weights: config, modeling file, tokenizer, provenance, model card."""
    planned = run.plan
    writer.write_json("config.json", config)
    modeling = resources.files("transmla.modeling") / MODELING_FILE
    writer.write_text(MODELING_FILE, modeling.read_text("utf-8"))
    copied = copy_companions(planned.source, writer.partial)
    run.progress("hash source", 0, 1, "")
    provenance = {
        "source": {
            "name": planned.resolved.name,
            "revision": planned.resolved.revision,
            "files": file_hashes(planned.source.files()),
        },
        "recipe": planned.recipe.resolved | {"source": planned.resolved.name, "dtype": planned.dtype},
        "geometry": {"gqa": asdict(planned.gqa), "mla": asdict(planned.mla)},
        "method": asdict(run.method),
        "companions": copied,
        "versions": versions(),
        **sections,
    }
    write_provenance(writer, **provenance)
    writer.write_text("README.md", model_card(planned, sections))
