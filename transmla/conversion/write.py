"""The finished layers, folded and written as one folder.

Legend: D hidden_size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.companions import copy_companions
from transmla.checkpoint.hashes import file_hashes
from transmla.checkpoint.provenance import versions, write_provenance
from transmla.checkpoint.write import CheckpointWriter
from transmla.conversion.card import model_card
from transmla.conversion.measure import final_stage
from transmla.conversion.run import Run
from transmla.conversion.verify import Witness
from transmla.errors import SourceError
from transmla.maths.attention import MlaWeights
from transmla.maths.fold import INPUT_NORM_GAIN, fold_layer, latent_scales, residual_scale, unfolded_attention
from transmla.model.layer import SourceLayer
from transmla.targets.own import own_attention
from transmla.targets.stock import MODELING_FILE, modeling_source

# of the embedding at once
ROWS = 2**14
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_weights(run: Run, witness: Witness, writer: CheckpointWriter) -> tuple[float, ...]:
    """Write every tensor in the form that is planned; the witness passes all of them. Returns the latent scales, if the
    form is folded."""
    folded, dtype = run.plan.form == "deepseek_v3", DTYPES[run.plan.dtype]
    residual = residual_scale(run.model.eps) if folded else 1.0
    scales = []
    total = run.plan.mla.num_hidden_layers
    for index in range(total):
        layer = run.model.layer(index)
        (mla,) = run.kept.layers([index], final_stage(run))
        witness.advance(layer, mla)
        if folded:
            tensors, scale = _folded(layer, mla, residual)
            scales.append(scale)
        else:
            attention = own_attention(mla, layer.order_d, layer.rotary_dim, layer.rotary_factor)
            tensors = {f"{layer.family.attention}.{name}": value for name, value in attention.items()}
            tensors |= layer.other_tensors
        for name, tensor in tensors.items():
            writer.add_as(f"{layer.family.layers}.{index}.{name}", tensor, dtype)
        del layer, tensors  # before the next ones are read
        run.progress("write", index + 1, total, "")
    _write_ends(run, residual, dtype, writer)
    writer.close_shards()
    witness.finish(run.model.ends(torch.float32, witness.vocabulary_K))
    return tuple(scales)


def _folded(layer: SourceLayer, mla: MlaWeights, residual: float) -> tuple[dict[str, Tensor], float]:
    """All tensors of a layer, and its latent scale."""
    others, attention = layer.other_tensors, unfolded_attention(mla)
    rank = len(mla.kv_down_rD)
    scale, query_scale = latent_scales(attention | {"input_layernorm.weight": others["input_layernorm.weight"]}, rank)
    tensors = fold_layer(attention, rank, residual, scale, query_scale)
    if (fused := others.pop("mlp.gate_up_proj.weight", None)) is not None:
        others["mlp.gate_proj.weight"], others["mlp.up_proj.weight"] = fused.chunk(2)
    for name, tensor in others.items():
        factor = {"input_layernorm.weight": INPUT_NORM_GAIN, "mlp.down_proj.weight": residual}.get(name, 1.0)
        tensors[name] = tensor * factor
    return tensors, scale


def _write_ends(run: Run, residual: float, dtype: torch.dtype, writer: CheckpointWriter) -> None:
    """Embeddings, head and final norm."""
    source, family, model = run.plan.source, run.model.family, run.model
    embeddings = f"{family.embed_tokens}.weight"
    embed_VD = torch.empty(source.tensors[embeddings].shape, dtype=dtype)
    for rows in torch.arange(len(embed_VD)).split(ROWS):
        embed_VD[rows] = writer.stored(embeddings, source.rows(embeddings, rows).float() * residual, dtype)
    writer.add(embeddings, embed_VD)
    del embed_VD  # before the next one is read
    if run.plan.form == "deepseek_v3" or not model.tied:
        # some families call it otherwise in the file than in the class
        writer.add_as("lm_head.weight", source.read(model.head_name), dtype)
        if (bias := f"{family.lm_head}.bias") in source.tensors:
            writer.add_as("lm_head.bias", source.read(bias), dtype)
    for name, tensor in model.final_norm().state_dict().items():
        writer.add_as(f"{family.norm}.{name}", tensor, dtype)


def write_companions(
    run: Run, config: dict[str, Any], sections: dict[str, Any], source_hashes: dict[str, str], writer: CheckpointWriter
) -> None:
    """Everything beside the weights: config, modeling file, tokenizer, provenance, model card.

    source_hashes: of the source's files when the conversion began; `SourceError` if they have changed since
    """
    planned = run.plan
    writer.write_json("config.json", config)
    writer.write_text(MODELING_FILE, modeling_source())
    copied = copy_companions(planned.source, writer.partial)
    if file_hashes(planned.source.files()) != source_hashes:
        raise SourceError(
            "the source has changed while it was converted",
            where=str(planned.source.path),
            why="its files have another SHA-256 than when the conversion began",
            remedy="convert again with --restart, from a folder that nothing writes to",
        )
    provenance = {
        "source": {
            "name": planned.resolved.name,
            "revision": planned.resolved.revision,
            "files": source_hashes,
            **({} if (whole := planned.source.whole) is None else {"language_model_of": whole.model_type}),
        },
        "recipe": planned.recipe.resolved | {"source": planned.resolved.name, "dtype": planned.dtype},
        "geometry": {"gqa": asdict(planned.gqa), "mla": asdict(planned.mla)},
        "method": asdict(run.method),
        "refinement": asdict(run.refinement),
        "companions": copied,
        "versions": versions(),
        **sections,
    }
    writer.write_text("README.md", model_card(planned, sections))
    write_provenance(writer, **provenance)
