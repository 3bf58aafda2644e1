"""`transmla verify`: whether a folder is still what was written, and computes something. Nothing is repaired."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.hashes import fresh_sha256
from transmla.checkpoint.provenance import read_provenance
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.store import first_few
from transmla.errors import TransmlaError, UnsupportedError
from transmla.model.loading import CONVERTED, load
from transmla.progress import Progress, silent
from transmla.tables import Shown
from transmla.targets.comparison import WITNESS_TOKENS, fault_of
from transmla.targets.own import MODEL_TYPE, own_tensors
from transmla.targets.stock import expected_tensors, flat_rotary

WEIGHT_ENDINGS = (".safetensors", ".bin")
_TEXT = "Once upon a time, there was a model."


@dataclass(frozen=True)
class Check:
    """One of the checks.

    passed: None where there is nothing to compare with;  found: in words
    """

    name: str
    passed: bool | None
    found: str


@dataclass(frozen=True)
class Verified(Shown):
    """What `verify` found: one check each of hashes, shapes, values, tokenizer and forward."""

    model: Path
    checks: tuple[Check, ...]

    def show(self, console: Console) -> None:
        from transmla.targets.show_verify import show_verified

        show_verified(self, console)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"model": self.model.name, "passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def verify(model: str | Path, *, progress: Progress | None = None) -> Verified:
    """Check a folder that `convert`, `heal`, `fold`, `unfold` or `export --to vllm` has written.

    hashes:    the SHA-256 of every file is the one that transmla.json names
    shapes:    the weight files hold the tensors that config.json calls for, and no others
    values:    none of them is NaN or infinite
    tokenizer: it loads, and its tokens have rows in the embeddings
    forward:   logits of a few tokens are finite, and no constant

    Returns what was found; a check that fails raises nothing, so that the others are made as well. Raises `SourceError`
    for a folder that cannot be read at all, and `UnsupportedError` for one that is not converted.
    """
    tell = progress or silent
    if Path(model).expanduser().is_file():
        raise UnsupportedError(
            "verify checks folders",
            where=str(model),
            why="it is a file",
            remedy="verify the folder that it was made from; of a GGUF file, "
            f"transmla doctor {shlex.quote(str(model))} says what runs it",
        )
    source = open_source(Path(model))
    kind = source.config.get("model_type")
    if source.format == "gguf" or kind not in CONVERTED or not source.config.get("kv_lora_rank"):
        raise UnsupportedError(
            "this is not a converted folder",
            where=source.config_where,
            why=f"model_type is {kind!r}" if source.format != "gguf" else "it is a GGUF file",
            remedy="pass a folder that transmla has written; of a GGUF file, verify the folder that it was made from",
        )
    checks = {
        "hashes": lambda: _hashes(source, tell),
        "shapes": lambda: _shapes(source),
        "values": lambda: _values(source, tell),
        "tokenizer": lambda: _tokenizer(source),
        "forward": lambda: _forward(source, tell),
    }
    return Verified(source.path, tuple(_checked(name, check) for name, check in checks.items()))


def _checked(name: str, check: Callable[[], tuple[bool | None, str]]) -> Check:
    try:
        return Check(name, *check())
    except TransmlaError as error:
        return Check(name, False, f"{error.what}: {error.why} ({error.where})")
    except Exception as error:  # whatever libraries make of a damaged folder: that is what is asked for
        return Check(name, False, (f"{type(error).__name__}: {error}".splitlines() or [""])[0])


def _hashes(source: Source, tell: Progress) -> tuple[bool | None, str]:
    written = read_provenance(source.path).get("files")
    if not isinstance(written, dict) or not written:
        return None, "transmla.json names no hashes: an earlier version wrote this folder"
    wrong = []
    for number, (name, wanted) in enumerate(written.items()):
        tell("hash", number, len(written), name)
        path = source.path / Path(name).name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif fresh_sha256(path) != wanted:
            wrong.append(f"{name} has changed")
    weights = {path.name for path in source.path.iterdir() if path.suffix in WEIGHT_ENDINGS}
    wrong += [f"{name} is not of this folder" for name in sorted(weights - set(written))]
    return not wrong, first_few(wrong) if wrong else f"{len(written)} files are what was written"


def _shapes(source: Source) -> tuple[bool | None, str]:
    own = source.config["model_type"] == MODEL_TYPE
    expected = own_tensors(source.config) if own else expected_tensors(flat_rotary(source.config))
    source.require(expected)
    others = sorted(set(source.tensors) - set(expected))
    return not others, f"unexpected: {first_few(others)}" if others else f"{len(expected)} tensors"


def _values(source: Source, tell: Progress) -> tuple[bool | None, str]:
    wrong = []
    for number, name in enumerate(source.tensors):
        tell("read", number, len(source.tensors), name)
        try:
            source.read(name)
        except TransmlaError as error:
            wrong.append(f"{name}: {error.why}")
    return not wrong, first_few(wrong) if wrong else f"{len(source.tensors)} tensors are finite"


def _tokenizer(source: Source) -> tuple[bool | None, str]:
    words = tokenizer(source)
    rows = int(source.config.get("text_config", source.config)["vocab_size"])
    ids = words(_TEXT, add_special_tokens=False).input_ids
    if not ids or max(ids) >= rows:
        return False, f"it makes {ids[:8]} of a text, and the embeddings have {rows:,} rows"
    return True, f"{len(words):,} tokens"


@torch.no_grad()
def _forward(source: Source, tell: Progress) -> tuple[bool | None, str]:
    tell("forward", 0, 1, "")
    model = load(source.path)
    rows = int(source.config.get("text_config", source.config)["vocab_size"])
    context = int(source.config.get("text_config", source.config)["max_position_embeddings"])
    ids_1T = torch.arange(min(WITNESS_TOKENS, context))[None] * 7 % rows
    fault = fault_of(model(ids_1T, use_cache=False).logits[0])
    tell("forward", 1, 1, "")
    return not fault, f"the logits are {fault}" if fault else f"logits of {ids_1T.shape[1]} tokens are finite"
