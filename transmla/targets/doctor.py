"""`transmla doctor`: which engines take a folder, from its own config, tensors and tokenizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.gguf.vocab import read_vocab
from transmla.checkpoint.read import Source, open_source
from transmla.errors import TransmlaError, UnsupportedError
from transmla.targets.engines import LLAMA_CPP, OWN, REFUSES, WRONG, EngineVerdict, Finding, engine_verdicts
from transmla.targets.stock import MODELING_FILE, expected_tensors


@dataclass(frozen=True)
class Diagnosis:
    """model: its path;  geometry: "96+32";  values_per_token: cached, per layer;  one verdict per engine"""

    model: Path
    geometry: str
    values_per_token: int
    dtype: str
    engines: tuple[EngineVerdict, ...]

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"model": str(self.model), "engines": [verdict.summary() for verdict in self.engines]}


def doctor(model: str | Path) -> Diagnosis:
    """What every engine would do with the folder `model`: run it, refuse it, or compute something else.

    Reads config.json, headers of the weights and the tokenizer. For any multi-head latent attention checkpoint of
    model_type deepseek_v3, converted by this program or not. Raises `SourceError` for folders that cannot be read or
    lack tensors, `UnsupportedError` for other models (of which `transmla.plan` knows what they could become).
    """
    source = open_source(Path(model))
    config = source.config
    if config.get("model_type") != "deepseek_v3" or not config.get("kv_lora_rank"):
        raise UnsupportedError(
            "this is not a deepseek_v3 model",
            where=source.config_where,
            why=f"model_type is {config.get('model_type')!r}",
            remedy="`transmla plan SRC` says what engines would make of it once it is converted; an unfolded model is "
            "folded first: transmla fold",
        )
    if config.get("latent_norm_folded"):
        source.require(expected_tensors(config))
    verdicts = tuple(_with_folder(verdict, source) for verdict in engine_verdicts(config))
    geometry = f"{config['kv_lora_rank']}+{config['qk_rope_head_dim']}"
    values = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    stored = next(iter(source.tensors.values())).dtype
    return Diagnosis(source.path, geometry, values, stored, verdicts)


def _with_folder(verdict: EngineVerdict, source: Source) -> EngineVerdict:
    """What the files beside config.json add to a verdict."""
    if verdict.engine == OWN and not (source.path / MODELING_FILE).is_file():
        why = f"{MODELING_FILE} is not in the folder, although auto_map names it: saved again from the stock class?"
        return _worse(verdict, Finding(REFUSES, why, "load it with transmla.load, and save it from there"))
    if verdict.engine == LLAMA_CPP:
        try:
            read_vocab(source.path, source.config["vocab_size"], tokenizer(source))
        except TransmlaError as error:
            return _worse(verdict, Finding(REFUSES, f"the tokenizer: {error.why}", error.remedy))
    return verdict


def _worse(verdict: EngineVerdict, finding: Finding) -> EngineVerdict:
    outcome = verdict.outcome if verdict.outcome == WRONG else finding.outcome
    return replace(verdict, outcome=outcome, findings=(*verdict.findings, finding))
