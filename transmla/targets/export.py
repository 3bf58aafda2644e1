"""`transmla export`: write a converted folder in the form that one engine needs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.destination import named_path
from transmla.checkpoint.gguf.types import GGUF_TYPES
from transmla.checkpoint.gguf.vocab import read_vocab
from transmla.checkpoint.gguf.write import check_gguf_destination, find_quantiser, write_gguf
from transmla.checkpoint.provenance import read_provenance
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.store import understood
from transmla.errors import SourceError, UnsupportedError
from transmla.model.modeling_transmla import UnfoldedConfig
from transmla.progress import Progress, silent
from transmla.tables import Shown
from transmla.targets.engines import LLAMA_CPP, engine_verdicts
from transmla.targets.gguf import ARCHITECTURE, gguf_settings, gguf_tensors
from transmla.targets.padding import write_padded
from transmla.targets.stock import expected_tensors, flat_rotary

TARGETS = ("gguf", "vllm")


@dataclass(frozen=True)
class ExportReport(Shown):
    """What `export` has written.

    path:             the file or folder
    to:               "gguf" or "vllm"
    format:           the GGUF type, as "q8_0", or the padded geometry, as "512+64"
    num_bytes:        size of the weights
    values_per_token: values in the cache per token and layer, before and after; padding increases them
    quantiser:        the program that computed the GGUF types, or None if transmla did
    kept:             tensors whose rows are too small for that type, and the type that they have instead
    """

    path: Path
    to: str
    format: str
    num_bytes: int
    values_per_token: tuple[int, int]
    quantiser: str | None
    kept: dict[str, str] = field(default_factory=dict)

    def show(self, console: Console) -> None:
        from transmla.targets.show_export import show_export

        show_export(self, console)


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str = "gguf",
    type: str | None = None,
    size: str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the converted folder `model` in another form to `out`; `model` is not changed.

    to:       "gguf" writes one file, OUT.gguf, for llama.cpp and other programs that read GGUF. "vllm" writes a folder
              padded with zeros to a geometry that GPU kernels of vLLM and SGLang support: the same function with a
              larger cache
    type:     of the weights in a GGUF file: f32, f16, bf16 (default) or q8_0; also q6_k, q5_k_m, q4_k_m and others if
              llama.cpp's quantiser is on the PATH or installed as the Python package llama_cpp
    size:     geometry of a padded folder, "512+64" or "256+64"; by default the smallest that is large enough
    progress: called as progress(stage, done, total, remark)

    Raises `SourceError` for a folder that cannot be read, `UnsupportedError` for another model, one with biases in its
    attention, a tokenizer that
    llama.cpp does not support or a missing quantiser, `GeometryError` if no kernel is large enough, `DestinationError`
    if `out` exists or cannot be written, and `VerificationError` if the written file is wrong.
    """
    if (to == "gguf" and size is not None) or (to == "vllm" and type is not None):
        raise UnsupportedError(
            f"--{'size' if to == 'gguf' else 'type'} cannot be combined with --to {to}",
            where="--to",
            why="--size is for padded folders (--to vllm), and --type is for GGUF files (--to gguf)",
            remedy="leave the option out, or choose the other target",
        )
    gguf_type = type or "bf16"
    if to not in TARGETS or gguf_type not in GGUF_TYPES:
        raise UnsupportedError(
            f"cannot export to {to!r} with type {gguf_type!r}",
            where="--to / --type",
            why=f"the targets are {', '.join(TARGETS)}; the types are {', '.join(GGUF_TYPES)}",
            remedy="choose one of these",
        )
    source, target = open_converted(Path(model)), named_path(out)
    if source.config.get("attention_bias"):
        raise UnsupportedError(
            "this model has biases in its attention",
            where=source.config_where,
            why="llama.cpp's deepseek2 has no place for them, and the deepseek_v3 of vLLM and SGLang drops them",
            remedy="run the folder as it is with transformers, MLX-LM or vLLM's --model-impl transformers, or convert "
            "the source with --lossy, which does without biases",
        )
    update = progress or silent
    return _to_gguf(source, target, gguf_type, update) if to == "gguf" else _to_vllm(source, target, size, update)


def open_converted(folder: Path) -> Source:
    """The opened folder, if it has the form that `transmla convert` writes and all tensors; its config has the rotary
    settings in the spelling that it was written with, even if transformers has saved it in its own since.

    Raises `UnsupportedError` for a folder of another form, and `SourceError` for one that cannot be read or lacks
    tensors.
    """
    source = open_source(folder)
    if source.config.get("model_type") == "transmla":
        raise UnsupportedError(
            "this folder cannot be exported",
            where=source.config_where,
            why="it has the form of its source's own class, because deepseek_v3 cannot express the model",
            remedy="run it with transformers (trust_remote_code=True) or, with transmla installed, in vLLM; "
            "`transmla plan SRC` names the obstacles",
        )
    if source.config.get("model_type") == UnfoldedConfig.model_type:
        raise UnsupportedError(
            "this is not a converted folder, but its form for training",
            where=source.config_where,
            why=f"model_type is {UnfoldedConfig.model_type!r}; a converted folder has the stock form",
            remedy=f"make that of it: transmla fold {shlex.quote(str(folder))} OUT2",
        )
    if source.config.get("model_type") != "deepseek_v3" or not source.config.get("latent_norm_folded"):
        raise UnsupportedError(
            "this is not a converted folder",
            where=source.config_where,
            why=f"model_type is {source.config.get('model_type')!r} and latent_norm_folded is "
            f"{source.config.get('latent_norm_folded', False)!r}; a converted folder has 'deepseek_v3' and True",
            remedy="pass a folder that `transmla convert` has written",
        )
    with understood(source.config_where):
        source.config = flat_rotary(source.config)
        source.require(expected_tensors(source.config))
    return source


def _to_gguf(source: Source, out: Path, gguf_type: str, progress: Progress) -> ExportReport:
    check_gguf_destination(out)
    config = source.config
    with understood(source.config_where):
        verdict = next(verdict for verdict in engine_verdicts(config) if verdict.engine == LLAMA_CPP)
        settings, tensors = gguf_settings(config, _name_of(source.path)), list(gguf_tensors(config))
    for finding in verdict.findings:
        raise UnsupportedError(
            "llama.cpp would not run this model",
            where=source.config_where,
            why=finding.why,
            remedy=finding.remedy,
        )
    quantiser = find_quantiser(gguf_type)
    vocab = read_vocab(source.path, config["vocab_size"], tokenizer(source))
    kept = write_gguf(
        source, out, ARCHITECTURE, settings, vocab, tensors, gguf_type, quantiser,
        lambda done, total, remark: progress("write", done, total, remark),
    )  # fmt: skip
    values = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    quantiser_name = quantiser.name if quantiser is not None else None
    return ExportReport(out, "gguf", gguf_type, out.stat().st_size, (values, values), quantiser_name, kept)


def _name_of(folder: Path) -> str:
    """What the model is called: as its source, by whose name llama.cpp knows oddities of tokens (those of Phi-3)."""
    here = folder.resolve().name
    try:
        name = Path(read_provenance(folder)["source"]["name"]).name
    except (SourceError, KeyError, TypeError):
        return here
    return here if name.lower() in here.lower() else f"{name} ({here})"


def _to_vllm(source: Source, out: Path, size: str | None, progress: Progress) -> ExportReport:
    old, new = write_padded(source, out, size, progress)
    num_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    values = (old.rank + old.rope, new.rank + new.rope)
    return ExportReport(out, "vllm", f"{new.rank}+{new.rope}", num_bytes, values, None)
