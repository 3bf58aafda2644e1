"""`transmla export`: a converted folder for one engine, where the folder itself is not what it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from transmla.checkpoint.companions import copy_companions, tokenizer
from transmla.checkpoint.gguf.vocab import read_vocab
from transmla.checkpoint.gguf.write import GGUF_TYPES, check_gguf_destination, find_quantiser, write_gguf
from transmla.checkpoint.provenance import FILE_NAME, read_provenance, write_provenance
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.write import CheckpointWriter, check_destination
from transmla.errors import GeometryError, UnsupportedError
from transmla.geometry import GPU_KERNELS
from transmla.maths.pad import Widths, pad_attention
from transmla.progress import Progress, silent
from transmla.targets.engines import widths_of
from transmla.targets.gguf import ARCHITECTURE, gguf_settings, gguf_tensors
from transmla.targets.stock import MODELING_FILE, expected_tensors

TARGETS = ("gguf", "vllm")


@dataclass(frozen=True)
class ExportReport:
    """What was written: path, bytes of the weights; format: the GGUF type, or the padded geometry "512+64".

    values_per_token: cached per token and layer, of the folder and of what was written (more if padded)
    quantiser: what made the types, if not this program
    """

    path: Path
    to: str
    format: str
    num_bytes: int
    values_per_token: tuple[int, int]
    quantiser: str | None


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str = "gguf",
    type: str | None = None,
    size: str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the converted folder `model` in another form; `model` stays as it is.

    to:   "gguf": one file for llama.cpp and what reads its files. type: f32, f16, bf16 (default), q8_0, and with
          llama.cpp's quantiser on the PATH or as the Python package llama_cpp also q6_k, q5_k_m, q4_k_m, ...
          "vllm": a folder padded with zeros to a geometry that GPU kernels of vLLM and SGLang are built for; the same
          function, with a larger cache. size: "512+64" or "256+64", default the smallest that is large enough
    Raises `SourceError`, `UnsupportedError` (a tokenizer that llama.cpp does not know, a missing quantiser, another
    model), `GeometryError` (no kernel is large enough), `DestinationError`, `VerificationError`.
    """
    if (to == "gguf" and size is not None) or (to == "vllm" and type is not None):
        raise UnsupportedError(
            f"--{'size' if to == 'gguf' else 'type'} does not go with --to {to}",
            where="--to",
            why="sizes are those of padded folders, types those of GGUF files",
            remedy="leave it out, or choose the other target",
        )
    type = type or "bf16"
    if to not in TARGETS or type not in GGUF_TYPES:
        raise UnsupportedError(
            f"no export to {to!r} as {type!r}",
            where="--to / --type",
            why=f"targets are {', '.join(TARGETS)}; types {', '.join(GGUF_TYPES)}",
            remedy="choose one of them",
        )
    source, target = open_converted(Path(model)), Path(out)
    update = progress or silent
    return _to_gguf(source, target, type, update) if to == "gguf" else _to_vllm(source, target, size, update)


def open_converted(folder: Path) -> Source:
    """A folder of the form that `transmla convert` writes, all tensors in place; else `UnsupportedError`."""
    source = open_source(folder)
    if source.config.get("model_type") != "deepseek_v3" or not source.config.get("latent_norm_folded"):
        raise UnsupportedError(
            "this is not a converted folder",
            where=source.config_where,
            why=f"model_type is {source.config.get('model_type')!r}, and its latent norm is not a linear map",
            remedy="pass a folder that `transmla convert` has written",
        )
    source.require(expected_tensors(source.config))
    return source


def _to_gguf(source: Source, out: Path, type: str, progress: Progress) -> ExportReport:
    check_gguf_destination(out)
    quantiser = find_quantiser(type)
    config = source.config
    vocab = read_vocab(source.path, config["vocab_size"], tokenizer(source))
    tensors = list(gguf_tensors(config))
    settings = gguf_settings(config, source.path.resolve().name)
    write_gguf(
        source, out, ARCHITECTURE, settings, vocab, tensors, type, quantiser,
        lambda done, total, remark: progress("write", done, total, remark),
    )  # fmt: skip
    values = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    made = quantiser.name if quantiser is not None else None
    return ExportReport(out, "gguf", type, out.stat().st_size, (values, values), made)


def padded_widths(old: Widths, size: str | None = None) -> Widths:
    """The smallest geometry with GPU kernels that holds `old`, or that of `size`; `GeometryError` if none does."""
    for (rank, rope), (nope, value) in sorted(GPU_KERNELS.items()):
        fits = old.rank <= rank and old.nope <= nope and old.value <= value
        if fits and old.rope <= rope and rope % old.rope == 0 and size in (None, f"{rank}+{rope}"):
            return Widths(old.heads, rank, rope, nope, value)
    sizes = ", ".join(f"{rank}+{rope} with heads of {heads[0]}" for (rank, rope), heads in GPU_KERNELS.items())
    raise GeometryError(
        f"it cannot be padded to {size}" if size else "no GPU kernel is large enough",
        where="--to vllm",
        why=f"latent {old.rank}, rotary {old.rope}, heads of {old.nope} and {old.value}; kernels are built for "
        f"{sizes}, and the rotary size has to divide theirs",
        remedy="convert with --latent and --rope within one of these",
    )


def _to_vllm(source: Source, out: Path, size: str | None, progress: Progress) -> ExportReport:
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
    check_destination(out, sum(info.num_bytes for info in source.tensors.values()))
    with torch.no_grad(), CheckpointWriter(out) as writer:
        _write_padded(source, old, new, writer, progress)
        writer.write_json("config.json", padded)
        for name in (MODELING_FILE, "README.md"):
            if (source.path / name).is_file():
                writer.copy_file(source.path / name)
        copy_companions(source, writer.partial)
        if (source.path / FILE_NAME).is_file():
            parent = read_provenance(source.path)
            parent.pop("format")
            write_provenance(writer, **parent, padded={"from": asdict(old), "to": asdict(new)})
        open_source(writer.partial).require(expected_tensors(padded))
        writer.commit()
    num_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    values = (old.rank + old.rope, new.rank + new.rope)
    return ExportReport(out, "vllm", f"{new.rank}+{new.rope}", num_bytes, values, None)


def _write_padded(source: Source, old: Widths, new: Widths, writer: CheckpointWriter, progress: Progress) -> None:
    names = expected_tensors(source.config)
    total = source.config["num_hidden_layers"]
    for index in range(total):
        prefix = f"model.layers.{index}.self_attn."
        block = {name.removeprefix(prefix): source.read(name) for name in names if name.startswith(prefix)}
        for name, tensor in pad_attention(block, old, new).items():
            writer.add_as(prefix + name, tensor, tensor.dtype)
        progress("pad", index + 1, total, "")
    for name in names:
        if ".self_attn." not in name:
            writer.add(name, source.read(name))
    writer.close_shards()
