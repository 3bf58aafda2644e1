"""Where text comes from: what ships with the package, files, tables and datasets.

wikitext         an excerpt of WikiText-2 train
synthetic        what a small model answers to requests of many kinds: stories, code, letters, lists. Beside wikitext
                 it keeps a conversion from forgetting all that is not an encyclopedia
continued        how the same model continues pieces of WikiText-2 train, without these pieces
code             modules of Python's standard library
maths            worked problems of school mathematics, made by rules (maths.py); with a chat template, as chats
stories          what stories260k, the model that ships with the package, writes by itself
wikitext-valid, tinystories-valid   for evaluation only
FILE             .txt as it is; .jsonl, .json, .parquet, .csv row by row
DATASET          hub id, optionally OWNER/NAME:CONFIG@SPLIT; its train split if none is named, streamed
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from transmla.checkpoint.resolve import local, looks_like_path
from transmla.errors import DataError
from transmla.extras import needs
from transmla.text import maths

TEXT_COLUMN = "text"
# suffix of a table -> its format, as `datasets` calls it
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# name -> file in transmla/data
SHIPPED = {
    "wikitext": "wikitext2-train-excerpt.txt", "synthetic": "synthetic.txt", "continued": "continued.txt",
    "code": "code.txt", "stories": "stories.txt",
}  # fmt: skip
SHIPPED_VALIDATION = {"wikitext-valid": "wikitext2-valid-excerpt.txt", "tinystories-valid": "tinystories-valid.txt"}
# characters read per token asked for: enough for any language and tokenizer worth calibrating with
CHARACTERS_PER_TOKEN = 12


def read_text(name: str, max_characters: int, *, evaluation: bool = False) -> str:
    """Text of a file, a dataset or a shipped excerpt, at most `max_characters`; raises `DataError`.

    evaluation: the text is only measured on, so the shipped validation texts may be read
    """
    check_name(name, evaluation=evaluation)
    if name == maths.NAME:
        return maths.text(max_characters)
    if shipped := (SHIPPED | SHIPPED_VALIDATION).get(name):
        return (resources.files("transmla.data") / shipped).read_text("utf-8")[:max_characters]
    path = local(name)
    if path is not None and path.suffix.lower() not in TABLES:
        return _read_plain(path, max_characters)
    return _read_column(name, max_characters)


def dataset_of(name: str) -> tuple[str, str, str]:
    """Dataset, configuration and split of OWNER/NAME:CONFIG@SPLIT, each of the last two "" where it is not there."""
    whole = name.partition(":")[0]
    found = re.fullmatch(r"(.*)@(\w+(?:\.\w+)*)", name)
    is_folder = "@" in whole and local(whole) is not None  # which may have such a name itself
    name, split = (found[1], found[2]) if found and not is_folder else (name, "")
    dataset, _, config = name.partition(":")
    return dataset, config, split


def check_name(name: str, *, evaluation: bool = False) -> None:
    """`DataError` for what names no text; nothing is read, and no dataset looked for. evaluation: see `read_text`"""
    if name in SHIPPED_VALIDATION and not evaluation:
        raise DataError(
            f"{name} is a validation text",
            where=name,
            why="what a model was calibrated on cannot be used to measure it",
            remedy="calibrate with another text, for example wikitext or self",
        )
    if name == maths.NAME or name in SHIPPED or name in SHIPPED_VALIDATION:
        return
    path, dataset = local(name), dataset_of(name)[0]
    if (path is not None and path.is_file()) or (path is None and "/" in name and not looks_like_path(dataset)):
        return
    if path is None and "/" in name:
        raise _no_such_file(name)
    known = (maths.NAME, *SHIPPED, *(SHIPPED_VALIDATION if evaluation else ("self",)))
    raise DataError(
        f"no text {name!r}",
        where=name,
        why=f"it is neither a file, nor a dataset id (owner/name), nor one of: {', '.join(known)}",
        remedy="pass a file (.txt, .jsonl, .parquet, .csv), a dataset id or one of these names",
    )


def _no_such_file(name: str) -> DataError:
    return DataError("the text was not found", where=name, why="no such file", remedy="check the path")


def is_table(name: str) -> bool:
    """Whether `name` is read row by row: a table file, or anything that looks like a dataset id."""
    path = local(name)
    if path is not None and path.is_file():
        return path.suffix.lower() in TABLES
    return "/" in name


def place_of(name: str) -> Path | None:
    """The file or the folder of a dataset that `name` means; None for shipped texts and those of the hub."""
    path = local(name)
    if path is not None and path.is_file():
        return path
    folder = local(dataset_of(name)[0])
    return folder if folder is not None and is_table(name) and folder.is_dir() else None


def rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a table file, or of a split of a dataset, train by default, streamed; raises `DataError`."""
    path, (dataset, config, split) = local(name), dataset_of(name)
    if path is None and local(dataset) is None and looks_like_path(dataset):
        raise _no_such_file(name)
    needs("data", "text from a table or a dataset")
    import datasets

    try:
        if path is not None and path.is_file():
            kind = TABLES[path.suffix.lower()]
            # pandas takes the texts "NA" and "None" for empty cells
            plain = {"keep_default_na": False} if kind == "csv" else {}
            files = glob.escape(str(path))
            found = datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **plain)
        else:
            found = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        yield from found
    except Exception as error:  # datasets raises whatever its readers raise
        raise DataError(
            f"cannot read the dataset {name}",
            where=name,
            why=f"{type(error).__name__}: {error}",
            remedy="check the name and the connection; of a dataset without a split train, name one: OWNER/NAME@SPLIT; "
            "files are .txt, .jsonl, .parquet or .csv",
        ) from error


def _read_column(name: str, max_characters: int) -> str:
    texts, length = [], 0
    for row in rows(name):
        if TEXT_COLUMN in row and row[TEXT_COLUMN] is None:  # an empty cell
            continue
        if not isinstance(row.get(TEXT_COLUMN), str):
            raise DataError(
                f"cannot read the dataset {name}",
                where=name,
                why=f"it has no column `{TEXT_COLUMN}` of strings, but: {', '.join(sorted(row))}",
                remedy=f"use data with a `{TEXT_COLUMN}` column",
            )
        texts.append(row[TEXT_COLUMN])
        length += len(texts[-1]) + 2
        if length > max_characters:
            break
    return "\n\n".join(texts)[:max_characters]


def _read_plain(path: Path, max_characters: int) -> str:
    try:
        # editors of Windows begin a file with a mark that is no text
        with path.open(encoding="utf-8-sig") as file:
            return file.read(max_characters)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "cannot read the text file",
            where=str(path),
            why=str(error),
            remedy="pass a readable UTF-8 text file",
        ) from error
