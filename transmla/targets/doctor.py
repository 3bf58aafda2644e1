"""`transmla doctor`: which engines run a folder, judged by its config, tensors and tokenizer."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.gguf.describe import describe_gguf
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.resolve import local
from transmla.checkpoint.store import understood
from transmla.errors import TransmlaError, UnsupportedError
from transmla.tables import Shown
from transmla.targets.engines import (
    ENGINES,
    EVIDENCE,
    LLAMA_CPP,
    OWN,
    OWN_MODEL_TYPE,
    REFUSES,
    RUNS,
    UNFOLDED_MODEL_TYPE,
    WRONG,
    EngineVerdict,
    Finding,
    engine_verdicts,
)
from transmla.targets.gguf import ARCHITECTURE
from transmla.targets.stock import MODELING_FILE, expected_tensors


@dataclass(frozen=True)
class Diagnosis(Shown):
    """What `doctor` found out about a folder.

    model:            path of the folder
    geometry:         kv_lora_rank and qk_rope_head_dim, as "96+32"
    values_per_token: values in the cache per token and layer
    dtype:            of the first tensor in the folder
    engines:          one verdict per engine
    form:             "folder", or "gguf"; "source": it is not converted, and this is what `transmla convert` would
                      write with the defaults
    notes:            what the model lacks in every engine
    """

    model: Path
    geometry: str
    values_per_token: int
    dtype: str
    engines: tuple[EngineVerdict, ...]
    form: str = "folder"
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The diagnosis as plain values, for JSON."""
        return asdict(self) | {"model": str(self.model), "engines": [verdict.summary() for verdict in self.engines]}

    def show(self, console: Console) -> None:
        from transmla.targets.show_doctor import show_diagnosis

        show_diagnosis(self, console)


_LEFT_OUT = "converted with --lossy: what the biases of the source add is read from the input, approximately"


def doctor(model: str | Path) -> Diagnosis:
    """What each engine would do with the folder `model`: run it, refuse it, or compute something else.

    Works on GGUF files that `transmla export` has written, on any checkpoint of model_type deepseek_v3 with latent
    attention, whether or not transmla has written it, and on folders in the form of their source's own class.
    Reads config.json, the headers of the weight files and the tokenizer.

    Raises `SourceError` for folders that cannot be read or lack tensors, and `UnsupportedError` for other models;
    `transmla.plan` says what these could be converted to.
    """
    path = local(str(model)) or Path(model)
    if path.suffix.lower() == ".gguf":
        return _of_gguf(path)
    source = open_source(path)
    config = source.config
    if config.get("model_type") == UNFOLDED_MODEL_TYPE:
        raise UnsupportedError(
            "this is not a converted folder, but its form for training",
            where=source.config_where,
            why=f"no engine runs model_type {UNFOLDED_MODEL_TYPE!r}",
            remedy=f"make a converted folder of it: transmla fold {shlex.quote(str(path))} OUT2",
        )
    if config.get("model_type") not in ("deepseek_v3", OWN_MODEL_TYPE) or not config.get("kv_lora_rank"):
        raise UnsupportedError(
            "this is not a converted model",
            where=source.config_where,
            why=f"model_type is {config.get('model_type')!r}",
            remedy="use `transmla plan` for a source that is not converted yet",
        )
    with understood(source.config_where):
        if config["model_type"] == OWN_MODEL_TYPE:
            from transmla.targets.own import own_tensors

            source.require(own_tensors(config))
        elif config.get("latent_norm_folded"):
            source.require(expected_tensors(config))
        verdicts = tuple(_with_folder(verdict, source) for verdict in engine_verdicts(config))
        geometry = f"{config['kv_lora_rank']}+{config['qk_rope_head_dim']}"
        values = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    stored = next(iter(source.tensors.values())).dtype
    notes = (_LEFT_OUT,) if config.get("biases_left_out") else ()
    return Diagnosis(source.path, geometry, values, stored, verdicts, notes=notes)


def _of_gguf(path: Path) -> Diagnosis:
    """Of a file with latent attention: llama.cpp runs it, and whatever else reads GGUF of this architecture."""
    described = describe_gguf(path)
    if described.architecture != ARCHITECTURE or described.kv_lora_rank is None:
        raise UnsupportedError(
            "this is not a converted model",
            where=str(path),
            why=f"its architecture is {described.architecture!r}",
            remedy="use `transmla plan` for a source that is not converted yet",
        )
    values = described.kv_lora_rank + described.rope
    other = Finding(REFUSES, "it does not read this GGUF file", "give it the folder that the file was exported from")
    verdicts = (
        EngineVerdict(
            engine, RUNS if engine == LLAMA_CPP else REFUSES, EVIDENCE[engine], note,
            () if engine == LLAMA_CPP else (other,),
        )
        for engine, note in ENGINES.items()
    )  # fmt: skip
    geometry = f"{described.kv_lora_rank}+{described.rope}"
    notes = (_LEFT_OUT,) if described.biases_left_out else ()
    return Diagnosis(path, geometry, values, described.types, tuple(verdicts), "gguf", notes)


def _with_folder(verdict: EngineVerdict, source: Source) -> EngineVerdict:
    """The verdict with what the files beside config.json add to it."""
    if verdict.engine == OWN and not (source.path / MODELING_FILE).is_file():
        why = f"auto_map names {MODELING_FILE}, which is missing; the model may have been saved from the stock class"
        return _worse(verdict, Finding(REFUSES, why, "load the folder with transmla.load and save it again"))
    if verdict.engine == LLAMA_CPP and verdict.accepts:
        from transmla.checkpoint.gguf.vocab import read_vocab

        try:
            read_vocab(source.path, source.config["vocab_size"], tokenizer(source))
        except TransmlaError as error:
            return _worse(verdict, Finding(REFUSES, f"it cannot read the tokenizer: {error.why}", error.remedy))
    return verdict


def _worse(verdict: EngineVerdict, finding: Finding) -> EngineVerdict:
    """The verdict with one more finding."""
    outcome = verdict.outcome if verdict.outcome == WRONG else finding.outcome
    return replace(verdict, outcome=outcome, findings=(*verdict.findings, finding))
