"""Calibration text -> windows of token ids. Many kinds of text, one result.

    self             sampled from the source model itself (needs the whole source in memory)
    wikitext         an excerpt of WikiText-2 train that ships with the package
    synthetic        what a small model answers to requests of many kinds, ships too: stories, code, letters, lists.
                     Beside wikitext it keeps a conversion from forgetting all that is not an encyclopedia
    continued        how the same model goes on where pieces of WikiText-2 train stop, without these; ships too
    code             modules of Python's standard library, ships too
    wikitext-valid, tinystories-valid   ship, too, but only to be evaluated on
    FILE             .txt as it is; .jsonl, .json, .parquet, .csv by their `text` column
    DATASET          hub id, optionally OWNER/NAME:CONFIG, its train split, streamed
    A:3+B            several of these, three tokens of A for one of B

Legend: N windows, T tokens per window.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.errors import DataError

TEXT_COLUMN = "text"
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# name -> file in transmla/data; validation texts are kept out of calibration
SHIPPED = {
    "wikitext": "wikitext2-train-excerpt.txt", "synthetic": "synthetic.txt", "continued": "continued.txt",
    "code": "code.txt",
}  # fmt: skip
SHIPPED_VALIDATION = {"wikitext-valid": "wikitext2-valid-excerpt.txt", "tinystories-valid": "tinystories-valid.txt"}
# characters read per token asked for: enough for any language and tokenizer worth calibrating with
CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True)
class CalibrationTokens:
    """ids_NT: int64 [N, T]; name: what it was made of; digest: sha256 of the ids, for the provenance file."""

    ids_NT: Tensor
    name: str
    digest: str


@dataclass(frozen=True)
class Part:
    """One text of a mix and how often it is drawn from."""

    name: str
    weight: float = 1.0


def parse_mix(text: str, where: str) -> tuple[Part, ...]:
    """ "A:3+B" -> parts; a weight is what stands behind the last colon, if that is a number; a dataset whose
    configuration is a number needs one: OWNER/NAME:2023:1.

    where: the option that it was given to, for the `DataError` about what is no mix
    """
    parts = []
    # a file may have a plus in its path
    for word in [text] if os.path.isfile(os.path.expanduser(text)) else text.split("+"):
        name, colon, weight = word.rpartition(":")
        parts.append(Part(name, float(weight)) if colon and _is_number(weight) else Part(word))
    if any(not 0 < part.weight < float("inf") or not part.name for part in parts):
        raise DataError(
            f"{text!r} is no mix of texts",
            where=where,
            why="every part has a name and a positive weight",
            remedy="write A+B or A:3+B:1",
        )
    return tuple(parts)


def needs_source(mix: str, sampled: int) -> bool:
    """Whether the source itself has to write calibration text, for which all of it is in memory."""
    return sampled > 0 or any(part.name == "self" for part in parse_mix(mix, "--calibration"))


def read_text(name: str, max_characters: int, *, evaluation: bool = False) -> str:
    """Text of a file, a dataset or a shipped excerpt, at most `max_characters`; raises `DataError`.

    evaluation: the text is only measured on, so the shipped validation texts may be read
    """
    path = Path(name).expanduser()
    if name in SHIPPED_VALIDATION and not evaluation:
        raise DataError(
            f"{name} is a validation text",
            where=name,
            why="what a model was calibrated on cannot be used to measure it",
            remedy="calibrate with another text, for example wikitext or self",
        )
    if shipped := (SHIPPED | SHIPPED_VALIDATION).get(name):
        return (resources.files("transmla.data") / shipped).read_text("utf-8")[:max_characters]
    if path.is_file() and path.suffix.lower() not in TABLES:
        return _read_plain(path, max_characters)
    if path.is_file() or ("/" in name and not path.is_dir()):
        return _read_table(name, path, max_characters)
    known = SHIPPED | SHIPPED_VALIDATION if evaluation else ("self", *SHIPPED)
    raise DataError(
        f"no text {name!r}",
        where=name,
        why=f"it is neither a file, nor a dataset id (owner/name), nor one of: {', '.join(known)}",
        remedy="pass a file (.txt, .jsonl, .parquet, .csv), a dataset id or one of these names",
    )


def windows(
    ids: list[int], num_tokens: int, window: int, *, name: str, prefix: list[int] | None = None
) -> CalibrationTokens:
    """Windows spread evenly over the text, at most `num_tokens` in all; raises `DataError`.

    At least two windows are needed: one to fit to and one held out.
    prefix: begin token of a tokenizer that adds one; every second window starts with it, since the model
            meets both the start and the middle of texts
    """
    wanted = max(2, num_tokens // window)
    available = len(ids) // window
    if available < 2:
        raise DataError(
            f"the text is too short: {len(ids):,} tokens",
            where=name,
            why=f"two windows of {window:,} tokens are the least that calibration and its held-out check need",
            remedy="use a longer text, or shorter windows (`window` in a recipe)",
        )
    starts = torch.linspace(0, available - 1, min(wanted, available)).long().tolist()
    ids_NT = torch.tensor([ids[start * window : (start + 1) * window] for start in starts])
    if prefix:
        ids_NT[::2, 0] = prefix[0]
    return _named(ids_NT, name)


def calibration_tokens(
    name: str, tokenizer: Any, num_tokens: int, window: int, *, sampler: Any = None
) -> CalibrationTokens:
    """Windows of token ids of the text called `name`; of several, "A:3+B", in turns, each with its share of the tokens.

    tokenizer: a transformers tokenizer; no special tokens are added
    sampler:   for "self", a call (num_windows, window) -> int64 [N, T]
    """
    parts = parse_mix(name, "--calibration")
    if len(parts) > 1:
        whole = sum(part.weight for part in parts)
        shares = [int(num_tokens * part.weight / whole) for part in parts]
        return _mixed(
            [
                calibration_tokens(part.name, tokenizer, share, window, sampler=sampler)
                for part, share in zip(parts, shares, strict=True)
            ],
            name,
        )
    name = parts[0].name
    if name == "self":
        ids_NT = sampler(max(2, num_tokens // window), window)
        return _named(ids_NT, name)
    text = read_text(name, max(num_tokens, 2 * window) * CHARACTERS_PER_TOKEN)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    prefix = tokenizer("", verbose=False).input_ids[:1]
    return windows(ids, num_tokens, window, name=name, prefix=prefix)


def _mixed(texts: list[CalibrationTokens], name: str | None = None) -> CalibrationTokens:
    """Windows of all texts, spread so that every stretch holds some of each; texts too short for their share give
    what they have. name: of them all; None: their own, A+B"""
    places = [
        ((number + 0.5) / len(text.ids_NT), text.ids_NT[number]) for text in texts for number in range(len(text.ids_NT))
    ]
    ids_NT = torch.stack([ids_T for _, ids_T in sorted(places, key=lambda pair: pair[0])])
    return _named(ids_NT, name or "+".join(text.name for text in texts))


def _named(ids_NT: Tensor, name: str) -> CalibrationTokens:
    return CalibrationTokens(ids_NT, name, hashlib.sha256(ids_NT.numpy().tobytes()).hexdigest())


def shuffled(text: CalibrationTokens, seed: int) -> CalibrationTokens:
    """The windows in random order, so that the first and the last of them are samples of the whole."""
    order = torch.randperm(len(text.ids_NT), generator=torch.Generator().manual_seed(seed))
    return _named(text.ids_NT[order], text.name)


def skipping_windows(num_windows: int, num_heldout: int, seed: int) -> Tensor:
    """Which windows skip positions, bool [N]: half of those that are fitted to, none that is held out.

    Random, because every second one would be every one of those that a step picks out in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    skipping_N = torch.rand(num_windows, generator=generator) < 0.5
    skipping_N[num_windows - num_heldout :] = False
    return skipping_N


def spread_positions(skipping_N: Tensor, window: int, context: int, seed: int) -> Tensor:
    """Positions of the tokens of all windows, int64 [N, T]: 0..T-1 but for the windows that skip some.

    A window that skips from somewhere in its middle to somewhere in the context shows distances that no window of
    its length has, at no cost (PoSE, 2309.10400, section 3). Lengths of gaps are uniform in their logarithm, from a
    quarter of the window to what is left of the context.
    """
    positions_NT = torch.arange(window).repeat(len(skipping_N), 1)
    if context <= window:
        return positions_NT
    generator = torch.Generator().manual_seed(seed)
    where, length = torch.rand(2, len(skipping_N), generator=generator, dtype=torch.float64)
    shortest, longest = max(1, min(window // 4, context - window)), context - window
    gap_N = (shortest * (longest / shortest) ** length).round().long()
    start_N = (window * (0.25 + 0.5 * where)).long().clamp_min(1)
    behind_NT = positions_NT >= start_N[:, None]
    return positions_NT + torch.where(skipping_N[:, None] & behind_NT, gap_N[:, None], 0)


def with_sampled(text: CalibrationTokens, sampled_NT: Tensor, num_heldout: int) -> CalibrationTokens:
    """Sampled windows among those of the text, spread evenly; the held-out ones stay the last, and real text."""
    fitted, heldout = text.ids_NT[:-num_heldout], text.ids_NT[-num_heldout:]
    mixed = _mixed([_named(fitted, text.name), _named(sampled_NT, f"{sampled_NT.numel():,} sampled tokens")])
    return _named(torch.cat([mixed.ids_NT, heldout]), mixed.name)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_plain(path: Path, max_characters: int) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(max_characters)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "cannot read the text file",
            where=str(path),
            why=str(error),
            remedy="pass a readable UTF-8 text file",
        ) from error


def _read_table(name: str, path: Path, max_characters: int) -> str:
    import datasets

    try:
        if path.is_file():
            rows = datasets.load_dataset(
                TABLES[path.suffix.lower()], data_files=str(path), split="train", streaming=True
            )
        else:
            dataset, _, config = name.partition(":")
            rows = datasets.load_dataset(dataset, config or None, split="train", streaming=True)
        texts, length = [], 0
        for row in rows:
            texts.append(row[TEXT_COLUMN])
            length += len(texts[-1]) + 2
            if length > max_characters:
                break
    except Exception as error:  # datasets raises whatever its readers raise
        raise DataError(
            f"cannot read the dataset {name}",
            where=name,
            why=f"{type(error).__name__}: {error}",
            remedy=f"check the name, the connection and that it has a `{TEXT_COLUMN}` column and a train split",
        ) from error
    return "\n\n".join(texts)[:max_characters]
