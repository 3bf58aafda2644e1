"""transmla.json: what a converted checkpoint was made from, how, and with what loss."""

import os
import platform
import subprocess
from collections.abc import Container
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmla.checkpoint.resolve import local
from transmla.checkpoint.store import parsed_json
from transmla.errors import SourceError

if TYPE_CHECKING:
    from transmla.checkpoint.write import CheckpointWriter

FILE_NAME = "transmla.json"
FORMAT = 1
MOST_BYTES = 2**28


def versions() -> dict[str, str]:
    """Versions of this program and of what computes with it; nothing that identifies a machine."""
    return {
        "transmla": _version("transmla", missing="source"),
        **{name: _version(name, missing="missing") for name in ("torch", "transformers", "safetensors")},
        "python": platform.python_version(),
    }


def computing_versions() -> dict[str, str]:
    """Those on which the last bit of a result depends: an unfinished run goes on with the same ones."""
    return {name: version for name, version in versions().items() if name in ("transmla", "torch", "transformers")}


def portable(value: Any, keep: Container[str] = ()) -> Any:
    """Plain values without absolute paths, in keys too: what is written says nothing of the machine or its user.

    A path in the home folder becomes ~/..., any other its last part; a mix of texts is one of paths. Keys that would be
    called alike are counted: valid.txt, valid.txt (2).
    keep: keys under which there are no paths, but texts
    """
    if isinstance(value, dict):
        found: dict[Any, Any] = {}
        for key, inner in value.items():
            found[_unlike(portable(key), found)] = inner if key in keep else portable(inner, keep)
        return found
    if isinstance(value, list | tuple):
        return [portable(inner, keep) for inner in value]
    return portable_name(value) if isinstance(value, str) else value


def portable_name(name: str) -> str:
    """One name of a model or text, or a mix of them, likewise."""
    if "\n" in name or not any(part.startswith("/") for part in name.split("+")):
        return name
    return "+".join(_portable(part) if part.startswith("/") else part for part in name.split("+"))


def _unlike(key: Any, others: Container[Any]) -> Any:
    number, found = 1, key
    while found in others:
        number += 1
        found = f"{key} ({number})"
    return found


def _portable(name: str) -> str:
    home = os.path.expanduser("~")
    if name.startswith(home + "/") and home != "/":
        return "~" + name.removeprefix(home)
    return Path(name).name


def named_source(folder: Path) -> str:
    """The source that the provenance file of a converted folder names, as a path if one of that name lies beside the
    folder; errors of `read_provenance`."""
    try:
        name = str(read_provenance(folder)["source"]["name"])
    except (KeyError, TypeError) as error:
        remedy = "name the source with --source, or copy transmla.json of the folder that it was trained from"
        raise _unreadable(folder / FILE_NAME, "it does not say what the folder was made from", remedy) from error
    beside = folder.absolute().parent / Path(name).name
    is_path = "/" not in name or name.startswith(("./", "../", "~"))
    if is_path and not Path(name).expanduser().exists() and beside.exists():
        return str(beside)
    return name


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
    """Write transmla.json, one section for each keyword, without absolute paths.

    Its section `files` has the SHA-256 of every file that is there by now, for `transmla verify`.
    """
    files = {name: found for name, found in writer.file_hashes().items() if name != FILE_NAME}
    content = {"format": FORMAT, **sections, "files": files}
    writer.write_json(FILE_NAME, portable(content))


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of transmla.json; `SourceError` if the folder was not made by this program."""
    path = (local(str(folder)) or folder) / FILE_NAME
    try:
        content = parsed_json(path.read_bytes(), MOST_BYTES)
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
