"""transmla.json: what a converted checkpoint was made from, how, and with what loss."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmla.errors import SourceError

if TYPE_CHECKING:
    from transmla.checkpoint.write import CheckpointWriter

FILE_NAME = "transmla.json"
FORMAT = 1


def file_hashes(paths: Iterable[Path]) -> dict[str, str]:
    """File name -> SHA-256, read in pieces."""
    hashes = {}
    for path in paths:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def versions() -> dict[str, str]:
    """Versions of this program and of what computes with it; nothing that identifies a machine."""
    return {
        "transmla": _version("transmla", missing="source"),
        **{name: _version(name, missing="missing") for name in ("torch", "transformers", "safetensors")},
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """Of the work tree that this program runs from, with "+" if files were changed; None for an installed package."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return found or None


def write_provenance(writer: "CheckpointWriter", **sections: Any) -> None:
    """Write transmla.json, one section for each keyword."""
    writer.write_json(FILE_NAME, {"format": FORMAT, **sections})


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of transmla.json; `SourceError` if the folder was not made by this program."""
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "pass a folder that transmla has written"
        raise _unreadable(path, error.strerror or str(error), remedy) from error
    except ValueError as error:
        raise _unreadable(path, f"not JSON: {error}", "convert the model again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise _unreadable(path, f"its format is {found!r}, this version reads {FORMAT}", "use a newer transmla")
    return dict(content)


def _version(package: str, missing: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return missing


def _unreadable(path: Path, why: str, remedy: str) -> SourceError:
    return SourceError("the provenance file cannot be read", where=str(path), why=why, remedy=remedy)
