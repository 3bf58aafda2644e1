"""`transmla eval`: perplexity of a model and its source on the same windows, and cache bytes per token."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transmla.calibrate.tokens import CHARACTERS_PER_TOKEN, read_text
from transmla.checkpoint.provenance import FILE_NAME, read_provenance
from transmla.evaluation.cache import measured_bytes_per_token
from transmla.evaluation.perplexity import Perplexity, Ratio, perplexity, ratio, text_windows
from transmla.loading import load_any, load_tokenizer
from transmla.planning import CACHE_BITS
from transmla.recipe import Recipe


@dataclass(frozen=True)
class ModelResult:
    """One model: its perplexity and the bytes that each token adds to its cache, measured, all layers."""

    name: str
    perplexity: Perplexity
    cache_bytes_per_token: float


@dataclass(frozen=True)
class EvaluationReport:
    """source and ratio are None without `against`. quantised_source: name -> cache bytes per token (arithmetic)."""

    model: ModelResult
    source: ModelResult | None
    ratio: Ratio | None
    quantised_source: dict[str, float]
    text: str
    length: int
    dtype: str
    device: str


def evaluate(
    model: str | Path,
    against: str | Path | None = None,
    *,
    text: str | None = None,
    windows: int = 16,
    length: int | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Callable[[str, int, int, str], None] | None = None,
) -> EvaluationReport:
    """Perplexity of a model, and of its source on the same windows.

    model:   converted folder, or anything that `transmla.convert` takes as a source
    against: the source, or any other model with the same tokenizer
    text:    file, dataset id or shipped text; default: the text of the recipe the model was made with, else
             "wikitext-valid". No special tokens are added, the first token of a window is not scored
    windows: the first so many windows of the text;  length: tokens per window, default 1024 or the context
    dtype:   to compute and cache in, "auto" for the stored one;  device: where
    Raises SourceError, DataError, VerificationError (NaN).
    """
    report = progress or (lambda *_: None)
    name = text or _default_text(Path(model))
    tokenizer = load_tokenizer(model)
    limit = int(getattr(tokenizer, "model_max_length", 1024))
    length = length or min(1024, limit)
    ids = tokenizer(
        read_text(name, windows * length * CHARACTERS_PER_TOKEN, evaluation=True),
        add_special_tokens=False,
        verbose=False,
    ).input_ids
    ids_NT = text_windows(ids, length, windows, name)

    def measure(which: str | Path) -> ModelResult:
        loaded = load_any(which, dtype=dtype, device=device)
        found = perplexity(loaded, ids_NT, progress=lambda done, total: report(f"evaluate {which}", done, total, ""))
        result = ModelResult(str(which), found, measured_bytes_per_token(loaded))
        del loaded
        gc.collect()
        return result

    measured = measure(model)
    if against is None:
        return EvaluationReport(measured, None, None, {}, name, length, dtype, device)
    source = measure(against)
    return EvaluationReport(
        measured,
        source,
        ratio(measured.perplexity, source.perplexity),
        _quantised(source, dtype),
        name,
        length,
        dtype,
        device,
    )


def summary(report: EvaluationReport) -> dict[str, Any]:
    """The report as plain numbers, for JSON."""

    def row(result: ModelResult) -> dict[str, Any]:
        return {
            "name": result.name,
            "perplexity": result.perplexity.value,
            "standard_error": result.perplexity.standard_error,
            "nats": result.perplexity.nats,
            "tokens": result.perplexity.num_tokens,
            "cache_bytes_per_token": result.cache_bytes_per_token,
        }

    return {
        "model": row(report.model),
        "source": row(report.source) if report.source else None,
        "ratio": {"value": report.ratio.value, "standard_error": report.ratio.standard_error} if report.ratio else None,
        "quantised_source_cache_bytes_per_token": report.quantised_source,
        "text": report.text,
        "length": report.length,
        "dtype": report.dtype,
        "device": report.device,
    }


def _default_text(model: Path) -> str:
    if (model / FILE_NAME).is_file():
        recipe: dict[str, Any] = read_provenance(model).get("recipe", {})
        return str(recipe.get("evaluation", Recipe().evaluation))
    return Recipe().evaluation


def _quantised(source: ModelResult, dtype: str) -> dict[str, float]:
    stored_bits = 32.0 if dtype == "float32" else 16.0
    per_bit = source.cache_bytes_per_token / stored_bits
    return {f"source, {name} cache": per_bit * bits for name, bits in CACHE_BITS.items() if bits < 16}
