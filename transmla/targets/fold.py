"""`transmla unfold` and `transmla fold`: from the stock form of a model to its form for training, and back.

A stock deepseek_v3 model has a norm on the latent, which a converted model does not want. The stock form neutralises it
with extreme scales (maths/fold.py) that the first optimizer step would destroy. The unfolded form has ordinary scales,
and a model_type of its own, so that stock classes refuse it instead of computing something else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.companions import copy_companions, tokenizer
from transmla.checkpoint.destination import named_path
from transmla.checkpoint.provenance import FILE_NAME, read_provenance, versions, write_provenance
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.store import understood
from transmla.checkpoint.write import CheckpointWriter, check_destination
from transmla.devices import named, release
from transmla.errors import UnsupportedError
from transmla.maths import EPS
from transmla.maths.fold import (
    biased_query,
    constant_query,
    fold_layer,
    latent_scales,
    residual_scale,
    unfold_layer,
)
from transmla.model.loading import load
from transmla.model.modeling_transmla import UnfoldedConfig, UnfoldedForCausalLM
from transmla.progress import Progress, silent
from transmla.targets.comparison import WITNESS_TOKENS, compare_logits, load_stock
from transmla.targets.engines import OWN_MODEL_TYPE
from transmla.targets.export import open_converted
from transmla.targets.stock import ARCHITECTURE, MODELING_FILE, expected_tensors, flat_rotary, modeling_source
from transmla.text.sources import CHARACTERS_PER_TOKEN, read_text
from transmla.text.windows import windows

# config keys that differ between the two forms, with their values in the folded form
_FOLDED = {
    "model_type": "deepseek_v3",
    "architectures": [ARCHITECTURE],
    "latent_norm_folded": True,
    "rms_norm_eps": EPS,
}
_AUTO_MAP = {"AutoModelForCausalLM": f"modeling_transmla.{ARCHITECTURE}"}
_UNFOLDED_AUTO_MAP = {
    "AutoConfig": f"modeling_transmla.{UnfoldedConfig.__name__}",
    "AutoModelForCausalLM": f"modeling_transmla.{UnfoldedForCausalLM.__name__}",
}


def unfold(model: str | Path, out: str | Path, *, dtype: str = "auto", progress: Progress | None = None) -> Path:
    """Write the converted folder `model` in the form for training to the new folder `out`, and return its path.

    dtype:    of the written weights: "float32", "bfloat16", "float16", or "auto" for the dtype of `model`
    progress: called as progress(stage, done, total, remark)

    Raises `UnsupportedError` if `model` is not a converted folder, `SourceError` if it cannot be read, and
    `DestinationError` if `out` exists or cannot be written.
    """
    if open_source(Path(model)).config.get("model_type") == OWN_MODEL_TYPE:
        raise UnsupportedError(
            "this folder needs no unfolding",
            where=str(model),
            why="it has the form of its source's own class, whose weights have ordinary sizes",
            remedy="train it as it is",
        )
    source = open_converted(Path(model))
    config = source.config
    with understood(source.config_where):
        residual = residual_scale(float(config.get("unfolded_rms_norm_eps", EPS)))
    unfolded_config = dict(config) | {
        "model_type": UnfoldedConfig.model_type,
        "architectures": [UnfoldedForCausalLM.__name__],
        "auto_map": _UNFOLDED_AUTO_MAP,
        "latent_norm_folded": False,
        "rms_norm_eps": config.get("unfolded_rms_norm_eps", EPS),
    }
    # measured on weights that are about to be trained
    unfolded_config.pop("latent_code", None)
    query_rank = unfolded_config.pop("unfolded_q_lora_rank", None)
    if query_rank is not None:
        unfolded_config |= {"q_lora_rank": query_rank or None, "query_bias": True}

    def layer(_: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        unfolded = unfold_layer(tensors, config["kv_lora_rank"], residual)
        return unfolded if query_rank is None else biased_query(unfolded, latent=query_rank > 0)

    with _writer(source, named_path(out), unfolded_config, dtype) as writer:
        _write(source, writer, unfolded_config, dtype, layer, 1 / residual, progress or silent)
        writer.commit()
    return named_path(out)


def fold(
    model: str | Path,
    out: str | Path,
    *,
    text: str = "wikitext",
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> Path:
    """Write the unfolded folder `model`, trained or not, in the stock form to the new folder `out`; return its path.

    text:     text of which a piece is run through both forms, to compare them
    dtype:    of the written weights: "float32", "bfloat16", "float16", or "auto" for the dtype of `model`
    device:   where the model is run
    progress: called as progress(stage, done, total, remark)

    Raises `UnsupportedError` if `model` is not an unfolded folder, `SourceError` if it cannot be read, `DataError` for
    text that is missing or too short, `DestinationError` if `out` exists or cannot be written, and `VerificationError`
    if the folded model, run through the stock class, does not compute what `model` computes; then nothing is written.
    """
    source = open_unfolded(Path(model))
    with _writer(source, named_path(out), _folded(source), dtype) as writer:
        fold_into(writer, source, text=text, dtype=dtype, device=named(device), progress=progress or silent)
        writer.commit()
    return named_path(out)


def fold_into(
    writer: CheckpointWriter, source: Source, *, text: str, dtype: str, device: str, progress: Progress
) -> None:
    """Fold `source`, an unfolded folder, into the writer's folder and verify it; the caller commits the writer.

    The other parameters and the errors are those of `fold`.
    """
    folded_config = _folded(source)
    model_tokenizer = tokenizer(source)
    ids = model_tokenizer(
        read_text(text, 2 * WITNESS_TOKENS * CHARACTERS_PER_TOKEN, evaluation=True),
        add_special_tokens=False,
        verbose=False,
    ).input_ids
    window = max(1, min(WITNESS_TOKENS, folded_config["max_position_embeddings"], len(ids) // 2))
    witness_ids = windows(ids, 2 * window, window, name=text).ids_NT[-1:]
    expected_TV = _logits(source.path, witness_ids, device)
    release(device)
    config = source.config
    residual = residual_scale(float(config["rms_norm_eps"]))

    def layer(_: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors, rank = constant_query(tensors) if config.get("query_bias") else tensors, config["kv_lora_rank"]
        return fold_layer(tensors, rank, residual, *latent_scales(tensors, rank))

    _write(source, writer, folded_config, dtype, layer, residual, progress)
    _verify(writer.partial, witness_ids, expected_TV, device)


def _folded(source: Source) -> dict[str, Any]:
    """config.json of the folded form of an unfolded folder, without its dtype."""
    with understood(source.config_where):
        config = flat_rotary(source.config)
        folded = config | _FOLDED | {"auto_map": _AUTO_MAP, "unfolded_rms_norm_eps": float(config["rms_norm_eps"])}
        folded["max_position_embeddings"] = int(config["max_position_embeddings"])
        if folded.pop("query_bias", False):
            rank = config.get("q_lora_rank")
            folded |= {"q_lora_rank": (rank or config["hidden_size"]) + 1, "unfolded_q_lora_rank": rank or 0}
    return folded


def open_unfolded(folder: Path) -> Source:
    """The opened folder, if it has the form that `unfold` writes and all tensors.

    Raises `UnsupportedError` for a folder of another form, and `SourceError` for one that cannot be read or lacks
    tensors.
    """
    source = open_source(folder)
    if (kind := source.config.get("model_type")) != UnfoldedConfig.model_type:
        raise UnsupportedError(
            "this is not an unfolded model",
            where=source.config_where,
            why=f"model_type is {kind!r}" + (", the same for training and inference" if kind == OWN_MODEL_TYPE else ""),
            remedy="use it as it is, trained or not"
            if kind == OWN_MODEL_TYPE
            else "unfold a converted folder first: transmla unfold OUT TRAIN",
        )
    with understood(source.config_where):
        source.require(expected_tensors(source.config))
    return source


def _writer(source: Source, out: Path, config: dict[str, Any], dtype: str) -> CheckpointWriter:
    """Of the other form, with this config.json; `DestinationError` if there is no room for it."""
    values = sum(map(math.prod, expected_tensors(config).values()))
    check_destination(out, values * getattr(torch, _stored(source, dtype)).itemsize)
    return CheckpointWriter(out)


def _stored(source: Source, dtype: str) -> str:
    """Name of the dtype that is written."""
    return source.tensors["model.embed_tokens.weight"].dtype if dtype == "auto" else dtype


def _write(
    source: Source,
    writer: CheckpointWriter,
    config: dict[str, Any],
    dtype: str,
    layer: Callable[[int, dict[str, Tensor]], dict[str, Tensor]],
    embedding: float,
    progress: Progress,
) -> None:
    """Write all files of the other form.

    config:    config.json of the other form, without its dtype
    layer:     maps the index and the float32 tensors of a layer to the tensors to write
    embedding: factor of the embeddings
    """
    stored = _stored(source, dtype)
    number_format = getattr(torch, stored)
    names = expected_tensors(source.config)
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        tensors = {
            name.removeprefix(prefix): source.read(name, dtype=torch.float32)
            for name in names
            if name.startswith(prefix)
        }
        for name, tensor in layer(index, tensors).items():
            writer.add_as(prefix + name, tensor, number_format)
        progress("write", index + 1, config["num_hidden_layers"], "")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        factor = embedding if name == "model.embed_tokens.weight" else 1.0
        writer.add_as(name, source.read(name).float() * factor, number_format)
    writer.close_shards()
    writer.write_json("config.json", config | {"dtype": stored, "torch_dtype": stored})
    writer.write_text(MODELING_FILE, modeling_source())
    if (source.path / "README.md").is_file():
        writer.copy_file(source.path / "README.md")
    copy_companions(source, writer.partial)
    # a trainer that has saved the folder may have left out where it came from
    sections = read_provenance(source.path) if (source.path / FILE_NAME).is_file() else {"versions": versions()}
    sections.pop("format", None)
    if "latent_code" not in config:
        sections.pop("quantised_for", None)
    write_provenance(writer, **sections)


@torch.no_grad()
def _logits(folder: Path, witness_1T: Tensor, device: str) -> Tensor:
    """Of the unfolded model, to compare with: float64 [T, V] on the CPU."""
    model = load(folder, dtype=torch.float32, device=device)
    logits: Tensor = model(witness_1T.to(device), use_cache=False).logits[0]
    return logits.double().cpu()


@torch.no_grad()
def _verify(folder: Path, witness_1T: Tensor, wanted_TV: Tensor, device: str) -> None:
    """The written folder through the stock class, against the unfolded model."""
    found_TV = load_stock(folder, device)(witness_1T.to(device), use_cache=False).logits[0].double().cpu()
    stored = json.loads((folder / "config.json").read_text("utf-8"))["dtype"]
    compare_logits(folder, found_TV, wanted_TV, stored)
