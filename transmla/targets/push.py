"""`transmla push`: a converted folder to a model hub, without anything of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from transmla.checkpoint.companions import TEMPLATES, TOKENIZER_FILES
from transmla.checkpoint.destination import named_path
from transmla.checkpoint.provenance import FILE_NAME, read_provenance
from transmla.errors import DestinationError, SourceError, UnsupportedError

# what is part of a model; everything else stays here
_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json", "modeling_transmla.py",
    *TOKENIZER_FILES, "chat_template.jinja", "chat_template.json", "README.md", FILE_NAME, "healing.json",
    "healing.png", "LICENSE*", "NOTICE*",
)  # fmt: skip
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9-]{20,})")
# from where a path begins to where it ends: its last part says what is meant
_ABSOLUTE = re.compile(r"(?<![\w.:/~<])(?:~|\.{1,2})?/(?:[\w.@-]+/)+(?=[\w.@-])")
_CLEANED = ("README.md", FILE_NAME)


def push(
    model: str | Path,
    repository: str,
    *,
    private: bool = False,
    message: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload the converted folder `model` and return the address of the commit.

    repository: owner/name, or name for one of your own; it is created if it is not there
    private:    whether it is then a private one
    message:    of the commit
    endpoint:   of another hub than the usual one

    Only files of the model are uploaded, and README.md and transmla.json without paths of this machine. The access
    token is the one that `hf auth login` has stored.

    Raises `SourceError` if the folder was not written by transmla, `UnsupportedError` if one of its texts holds what
    looks like an access token, and `DestinationError` if the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.errors import HTTPError as ConnectionFailed  # type: ignore[attr-defined]

    folder = named_path(model)
    names = paths_in(read_provenance(folder))  # which refuses what is not ours
    operations = []
    for file in files_of(folder):
        content = without_paths(_text(file), names).encode() if file.name in _CLEANED else str(file)
        operations.append(CommitOperationAdd(path_in_repo=file.relative_to(folder).as_posix(), path_or_fileobj=content))
    api = HfApi(endpoint=endpoint, library_name="transmla", library_version=metadata.version("transmla"))
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(
            made.repo_id,
            operations,
            commit_message=message or f"Upload a model converted by transmla {metadata.version('transmla')}",
        )
    except LocalTokenNotFoundError as error:
        raise _refused(repository, "there is no access token on this machine", "log in with `hf auth login`") from error
    except HFValidationError as error:
        raise _refused(repository, str(error), "pass owner/name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = (
            "log in with `hf auth login`, with a token that may write there" if status in (401, 403) else "try again"
        )
        raise _refused(repository, (str(error).splitlines() or [""])[0], remedy) from error
    except (OSError, ConnectionFailed) as error:
        raise _refused(repository, f"{type(error).__name__}: {error}", "check the connection and try again") from error
    return str(done.commit_url)


def files_of(folder: Path) -> list[Path]:
    """What is uploaded; raises `UnsupportedError` for a text that holds what looks like an access token."""
    found = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _FILES)
    ] + sorted((folder / TEMPLATES).glob("*.jinja"))
    for file in found:
        if file.suffix in (".json", ".md", ".py", ".jinja", ".txt", "") and _TOKEN.search(
            _text(file, errors="replace")
        ):
            raise UnsupportedError(
                "this file holds what looks like an access token",
                where=str(file),
                why="what is uploaded can be read by others",
                remedy="take it out, and revoke the token if it was one",
            )
    return found


def without_paths(text: str, names: Iterable[str] = ()) -> str:
    """The text with the last part of every path of this machine in its place; addresses and owner/name stay.

    names: paths that are known to be in it, as they may have spaces
    """
    for name in names:
        text = text.replace(name, Path(name).name)
    return _ABSOLUTE.sub("", text)


def paths_in(values: Any) -> list[str]:
    """The paths in parsed JSON, also those in mixes of texts, longest first."""
    if isinstance(values, dict):
        found = [path for pair in values.items() for one in pair for path in paths_in(one)]
    elif isinstance(values, list):
        found = [path for one in values for path in paths_in(one)]
    else:
        found = [part for part in str(values).split("+") if re.match(r"(~|\.{1,2})?/.", part) and "\n" not in part]
    return sorted(set(found), key=lambda path: (-len(path), path))


def _text(file: Path, errors: str = "strict") -> str:
    try:
        return file.read_text(encoding="utf-8", errors=errors)
    except (OSError, ValueError) as error:
        raise SourceError(
            "a file of the model cannot be read",
            where=str(file),
            why=f"{type(error).__name__}: {error}",
            remedy="restore it, or convert again",
        ) from error


def _refused(repository: str, why: str, remedy: str) -> DestinationError:
    return DestinationError("the model could not be uploaded", where=repository, why=why, remedy=remedy)
