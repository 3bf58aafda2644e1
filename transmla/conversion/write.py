"""The finished layers, folded and written as one folder.

Legend: D hidden_size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.companions import copy_companions
from transmla.checkpoint.provenance import file_hashes, versions, write_provenance
from transmla.checkpoint.write import CheckpointWriter
from transmla.conversion.card import model_card
from transmla.conversion.measure import Measured, final_stage
from transmla.conversion.run import Run
from transmla.conversion.verify import Witness
from transmla.maths.fold import INPUT_NORM_GAIN, fold_attention, latent_scale, residual_scale
from transmla.model.source import SourceLayer
from transmla.targets.stock import MODELING_FILE, modeling_source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_weights(run: Run, witness: Witness, measured: Measured, writer: CheckpointWriter) -> tuple[float, ...]:
    """Fold and write every tensor; the witness passes all of them. Returns the latent scales."""
    source, family, dtype = run.plan.source, run.plan.family, DTYPES[run.plan.dtype]
    residual = residual_scale(run.model.eps)
    scales = tuple(latent_scale(peak) for peak in measured.latent_peaks)
    for index, scale in enumerate(scales):
        layer = run.model.layer(index)
        (mla,) = run.kept.layers([index], final_stage(run))
        witness.advance(layer, mla)
        query_scale = latent_scale(measured.query_peaks[index])
        _write_layer(layer, fold_attention(mla, scale, residual, query_scale), residual, dtype, writer)
        del layer  # before the next one is read
        run.progress("write", index + 1, len(scales), "")
    embed_VD = source.read(family.embed_tokens, dtype=torch.float32).mul_(residual)
    writer.add_as("model.embed_tokens.weight", embed_VD, dtype)
    del embed_VD  # before the next one is read
    head_VD = source.read(run.model.head_name)
    writer.add_as("lm_head.weight", head_VD, dtype)
    norm_D = run.model.norm()
    writer.add_as("model.norm.weight", norm_D, dtype)
    writer.close_shards()
    witness.finish(norm_D, run.model.eps, head_VD[witness.vocabulary_K])
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
    source_hashes = file_hashes(planned.source.files())
    run.progress("hash source", 1, 1, "")
    provenance = {
        "source": {
            "name": planned.resolved.name,
            "revision": planned.resolved.revision,
            "files": source_hashes,
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
