"""What `transmla eval` measures: a suite in TOML, each key overridable by an option."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transmla.settings import installed, read_toml, replaced

GATES = ("perplexity", "tasks", "needles", "loops")


@dataclass(frozen=True)
class Suite:
    """One evaluation. Whatever is empty, false or zero is left out.

    texts:     files, dataset ids, shipped texts; windows of `length` tokens each, the first `windows` of a text
    begin:     the begin token takes the place of each window's first token, so that the same tokens are scored
    agreement: KL and agreement of the first choice with the source, on the first text
    quantised: bits per value of packed caches that are measured beside the model's own, on the first text: two kinds of
               the source's, those of the model
    coded_source: with `quantised`: also the source's cache transform coded with so many bits, of which all that is
               stored counts, from a calibration of its own
    positions: windows over the whole context, for perplexity by position, on the first text
    tasks:     of lm-eval;  limit: documents of each, 0 for all;  include_path: folder of more task files
    needles:   context lengths of RULER's needle test;  samples: needles per length
    smoke:     greedy continuations of a few prompts
    generation: tokens that are written behind each of the prompts that ship, greedily and sampled: repetition, length,
               end of text, and how much of it the source accepts
    gates:     smallest recovery that passes: "perplexity" on every text, "tasks" and "needles" each, "loops" of the
               share of four-token runs in greedy text that did not occur before
    """

    texts: tuple[str, ...] = ("wikitext-valid",)
    windows: int = 16
    length: int = 0
    begin: bool = False
    agreement: bool = False
    quantised: tuple[float, ...] = ()
    coded_source: bool = False
    positions: int = 0
    tasks: tuple[str, ...] = ()
    limit: int = 0
    include_path: str = ""
    needles: tuple[int, ...] = ()
    samples: int = 20
    smoke: bool = False
    generation: int = 0
    gates: dict[str, float] = field(default_factory=dict)

    def with_overrides(self, **given: Any) -> Suite:
        """A copy with the values that are not None, checked like those of a file."""
        return _checked(self, {key: value for key, value in given.items() if value is not None}, "the options")

    def plain(self) -> dict[str, Any]:
        """All values, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def load_suite(name: str) -> Suite:
    """The suite of that installed name or in that TOML file; `RecipeError` if it cannot be read or used."""
    path = _installed().get(name, Path(name))
    return _checked(Suite(), read_toml(path, "suite", list_suites()), str(path))


def list_suites() -> list[str]:
    """Names of the installed suites."""
    return list(_installed())


def _installed() -> dict[str, Path]:
    return installed("transmla.suites", checkout="eval/suites")


def _checked(suite: Suite, values: dict[str, Any], where: str) -> Suite:
    return replaced(suite, values, kind="suite", where=where, objection=_objection)


def _objection(key: str, value: Any) -> str | None:
    if key == "gates":
        if unknown := [name for name in value if name not in GATES]:
            return f"there is no gate {unknown[0]!r}; gates are {', '.join(GATES)}"
        if not all(0 < share <= 2 for share in value.values()):
            return "a gate is a share of the source, like 0.95"
    if key == "quantised" and not all(0.5 <= bits <= 8 for bits in value):
        return "bits are 2, 3, 4 or 8, and for coded caches numbers from 0.5 to 8, like 2.5"
    if key == "generation" and value < 0:
        return "generation is a number of tokens"
    if key == "windows" and value < 1:
        return "perplexity needs at least one window"
    if key == "texts" and not value:
        return "perplexity needs at least one text"
    return None
