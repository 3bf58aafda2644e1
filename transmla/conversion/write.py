"""The journal's layers measured, folded and written: what the closing summary says and what the folder holds.

Legend: N windows, T tokens, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.companions import copy_companions
from transmla.checkpoint.journal import Journal
from transmla.checkpoint.provenance import file_hashes, versions, write_provenance
from transmla.checkpoint.write import CheckpointWriter
from transmla.conversion.card import model_card
from transmla.conversion.distil import load_layers
from transmla.conversion.run import Run
from transmla.conversion.streams import Streams, add_converted_attention, add_mlp, converted_heads, next_token_losses
from transmla.conversion.verify import Witness
from transmla.errors import VerificationError
from transmla.maths.attention import MlaWeights
from transmla.maths.fold import INPUT_NORM_GAIN, fold_attention, latent_scale, residual_scale
from transmla.model.source import SourceLayer
from transmla.targets.stock import MODELING_FILE, modeling_source
from transmla.text.windows import CalibrationTokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# fitted windows that are looked at for the largest latent, besides the held-out ones
NUM_PEAK = 8


@dataclass(frozen=True)
class HeldoutNats:
    """Mean next-token loss in nats over the held-out calibration windows."""

    source: float
    converted: float
    num_windows: int


@dataclass(frozen=True)
class Measured:
    """Largest mean square of one token's latent by layer, and of its queries' latent: see `maths.fold.latent_scale`."""

    heldout: HeldoutNats
    latent_peaks: tuple[float, ...]
    query_peaks: tuple[float, ...]


def measure(run: Run, streams: Streams, text: CalibrationTokens, journal: Journal) -> Measured:
    """The finished layers on the held-out windows and a few others, the same as the written model will compute.

    The streams must be behind the last layer; of the source's, only its end is used.
    """
    part = _part(run, streams, text)
    peaks, query_peaks = [], []
    total = run.plan.mla.num_hidden_layers
    for index in range(total):
        layer = run.layer(index)
        mla = final_layer(run, index, journal)
        heads = converted_heads(layer, mla, part)
        add_converted_attention(mla.o_DHv, heads.out_NTF, part)
        add_mlp(layer, part, only="converted")
        del layer  # before the next one is read
        peaks.append(heads.latent_peak)
        query_peaks.append(heads.query_peak)
        run.progress("measure", index + 1, total, "")
    head = run.head()

    def logits(stream_TD: Tensor) -> Tensor:
        return head.norm(stream_TD).to(run.compute) @ head.weight_VD.T

    source_N, converted_N = next_token_losses(part, _ids(text, part), logits)
    if not torch.isfinite(source_N).all() or not torch.isfinite(converted_N).all():
        raise VerificationError(
            "the model returns NaN or infinity",
            where="held-out calibration windows",
            why=f"losses {source_N.tolist()} of the source, {converted_N.tolist()} converted",
            remedy="check the source with `transmla eval SRC --dtype float32`",
        )
    nats = HeldoutNats(float(source_N.mean()), float(converted_N.mean()), len(source_N))
    return Measured(nats, tuple(peaks), tuple(query_peaks))


def _part(run: Run, streams: Streams, text: CalibrationTokens) -> Streams:
    """Held-out windows and a few fitted ones: the source's stream behind the last layer, the converted one anew."""
    last = streams.last(min(streams.num_windows, streams.num_heldout + NUM_PEAK))
    part = replace(last, converted_NTD=torch.empty_like(last.converted_NTD), folder=None)
    run.embed(_ids(text, part), part.converted_NTD)
    return part


def _ids(text: CalibrationTokens, part: Streams) -> Tensor:
    """Tokens of the windows of `part`, which are the last ones."""
    return text.ids_NT[len(text.ids_NT) - part.num_windows :][part.indices]


def final_layer(run: Run, index: int, journal: Journal) -> MlaWeights:
    """A layer's weights after all steps, on the device."""
    stage = "fitted" if run.refinement.distil is None else "distilled"
    return load_layers(run, range(index, index + 1), journal, stage)[0]


def write_weights(
    run: Run, witness: Witness, measured: Measured, journal: Journal, writer: CheckpointWriter
) -> tuple[float, ...]:
    """Fold and write every tensor; the witness passes all of them. Returns the latent scales."""
    source, family, dtype = run.plan.source, run.plan.family, DTYPES[run.plan.dtype]
    eps = float(source.config["rms_norm_eps"])
    residual = residual_scale(eps)
    scales = tuple(latent_scale(peak) for peak in measured.latent_peaks)
    for index, scale in enumerate(scales):
        layer = run.layer(index)
        mla = final_layer(run, index, journal)
        witness.advance(layer, mla)
        query_scale = latent_scale(measured.query_peaks[index])
        _write_layer(layer, fold_attention(mla, scale, residual, query_scale), residual, dtype, writer)
        del layer  # before the next one is read
        run.progress("write", index + 1, len(scales), "")
    embed_VD = source.read(family.embed_tokens, dtype=torch.float32).mul_(residual)
    writer.add_as("model.embed_tokens.weight", embed_VD, dtype)
    del embed_VD  # before the next one is read
    head_VD = source.read(run.head_name)
    writer.add_as("lm_head.weight", head_VD, dtype)
    norm_D = source.read(family.norm, dtype=torch.float32, device=run.device)
    writer.add_as("model.norm.weight", norm_D, dtype)
    writer.close_shards()
    witness.finish(norm_D, eps, head_VD[witness.vocabulary_K])
    return scales


def _write_layer(
    layer: SourceLayer, attention: dict[str, Tensor], residual: float, dtype: torch.dtype, writer: CheckpointWriter
) -> None:
    tensors = {f"self_attn.{name}": tensor for name, tensor in attention.items()}
    for name, tensor in layer.other_tensors.items():
        factor = {"input_layernorm.weight": INPUT_NORM_GAIN, "mlp.down_proj.weight": residual}.get(name, 1.0)
        tensors[name] = tensor * factor
    for name, tensor in tensors.items():
        writer.add_as(f"model.layers.{layer.index}.{name}", tensor, dtype)


def write_companions(run: Run, config: dict[str, Any], sections: dict[str, Any], writer: CheckpointWriter) -> None:
    """Everything beside the weights: config, modeling file, tokenizer, provenance, model card."""
    planned = run.plan
    writer.write_json("config.json", config)
    writer.write_text(MODELING_FILE, modeling_source())
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
        "refinement": asdict(run.refinement),
        "companions": copied,
        "versions": versions(),
        **sections,
    }
    write_provenance(writer, **provenance)
    writer.write_text("README.md", model_card(planned, sections))
