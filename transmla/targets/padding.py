"""A converted folder padded with zeros to a geometry that GPU kernels are built for: `transmla export --to vllm`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from transmla.checkpoint.companions import copy_companions
from transmla.checkpoint.provenance import FILE_NAME, read_provenance, write_provenance
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.write import CheckpointWriter, check_destination
from transmla.errors import GeometryError
from transmla.geometry import GPU_KERNELS
from transmla.maths.pad import Widths, pad_attention
from transmla.progress import Progress
from transmla.targets.stock import MODELING_FILE, expected_tensors


def widths_of(config: Mapping[str, Any]) -> Widths:
    """The sizes of the attention in a deepseek_v3 config."""
    return Widths(
        heads=config["num_attention_heads"],
        rank=config["kv_lora_rank"],
        rope=config["qk_rope_head_dim"],
        nope=config["qk_nope_head_dim"],
        value=config["v_head_dim"],
    )


def padded_widths(old: Widths, size: str | None = None) -> Widths:
    """The widths of the smallest geometry with GPU kernels that `old` can be padded to.

    size: the geometry to use, for example "512+64"; None tries all of `GPU_KERNELS`

    Raises `GeometryError` if `old` cannot be padded to it, or to any of them.
    """
    kernels = [(*key, *heads) for key, widths in sorted(GPU_KERNELS.items()) for heads in widths]
    for rank, rope, nope, value in kernels:
        fits = old.rank <= rank and old.nope <= nope and old.value <= value
        if fits and old.rope <= rope and rope % old.rope == 0 and size in (None, f"{rank}+{rope}"):
            return Widths(old.heads, rank, rope, nope, value)
    known = [f"{rank}+{rope}" for rank, rope, _, _ in kernels]
    if size is not None and size not in known:
        raise GeometryError(
            f"no GPU kernel is built for {size}",
            where="--size",
            why=f"sizes with kernels are {', '.join(dict.fromkeys(known))}",
            remedy="give one of these, or leave it out: then the smallest that is large enough is taken",
        )
    sizes = ", ".join(f"{rank}+{rope} with heads of {nope} and {value}" for rank, rope, nope, value in kernels)
    raise GeometryError(
        f"the model cannot be padded to {size}" if size else "no GPU kernel is large enough",
        where="--to vllm",
        why=f"the model has a latent of {old.rank}, a rotary key of {old.rope} and heads of {old.nope} and "
        f"{old.value}; kernels are built for {sizes}, and the rotary size must divide theirs",
        remedy="convert with --latent and --rope within one of these sizes",
    )


def write_padded(source: Source, out: Path, size: str | None, progress: Progress) -> tuple[Widths, Widths]:
    """Write the padded folder to `out`, and return the widths of the attention before and after.

    source:   a converted folder
    size:     the geometry to pad to, for example "512+64"; None takes the smallest that is large enough
    progress: called once for each layer

    The dtype of each tensor stays. Raises `GeometryError` if the model does not fit, and `DestinationError` if `out`
    exists or cannot be written.
    """
    config = source.config
    old = widths_of(config)
    new = padded_widths(old, size)
    padded = config | {
        "kv_lora_rank": new.rank,
        "qk_rope_head_dim": new.rope,
        "qk_nope_head_dim": new.nope,
        "qk_head_dim": new.nope + new.rope,
        "v_head_dim": new.value,
    }
    if (new.rank, new.rope) != (old.rank, old.rope):  # it is of the values that were cached
        padded.pop("latent_code", None)
    shapes = expected_tensors(padded)
    stored = {name: getattr(torch, source.tensors[name].dtype).itemsize for name in shapes}
    check_destination(out, sum(stored[name] * math.prod(shape) for name, shape in shapes.items()))
    with torch.no_grad(), CheckpointWriter(out) as writer:
        _write_tensors(source, old, new, writer, progress)
        writer.write_json("config.json", padded)
        for name in (MODELING_FILE, "README.md"):
            if (source.path / name).is_file():
                writer.copy_file(source.path / name)
        copy_companions(source, writer.partial)
        if (source.path / FILE_NAME).is_file():
            parent = read_provenance(source.path)
            parent.pop("format")
            if "latent_code" not in padded:
                parent.pop("quantised_for", None)
            write_provenance(writer, **parent | {"padded": {"from": asdict(old), "to": asdict(new)}})
        open_source(writer.partial).require(shapes)
        writer.commit()
    return old, new


def _write_tensors(source: Source, old: Widths, new: Widths, writer: CheckpointWriter, progress: Progress) -> None:
    """All tensors of the folder, those of the attention padded."""
    names = expected_tensors(source.config)
    num_layers = source.config["num_hidden_layers"]
    for index in range(num_layers):
        prefix = f"model.layers.{index}.self_attn."
        block = {name.removeprefix(prefix): source.read(name) for name in names if name.startswith(prefix)}
        for name, tensor in pad_attention(block, old, new).items():
            writer.add_as(prefix + name, tensor, tensor.dtype)
        progress("pad", index + 1, num_layers, "")
    for name in names:
        if ".self_attn." not in name:
            writer.add(name, source.read(name))
    writer.close_shards()
