"""What an unfinished run, a conversion or a healing, has finished already: DST.partial/journal, one file per step.

A step is written under another name, forced to the disk and renamed, so it is there whole or not at all, also after
kill -9; a checksum finds out what a failing disk has made of it. The folder goes when the run is done.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from transmla.checkpoint.destination import disk_errors, journal_of, remove_journal, sync
from transmla.errors import DestinationError

_SETTINGS = "settings.json"
_WRITING = ".writing"
# characters of a value that is shown in a message
_SHORT = 24


class Journal:
    """Steps by name, each a few tensors and a few numbers."""

    def __init__(self, destination: Path, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        """Go on with the journal of `destination`, or begin one.

        settings: all that the steps depend on; a journal of other settings is refused, or with `restart` deleted
        """
        self.folder = journal_of(destination)
        self._settings = json.dumps(settings, indent=2, sort_keys=True)
        self._put_off: list[Callable[[], None]] = []
        with disk_errors(self.folder):
            if restart:
                remove_journal(destination)
            found = self._found_settings()
        if found is not None and (differences := _differences(found, json.loads(self._settings))):
            raise self._in_the_way(f"it differs in {', '.join(differences)}")

    def _found_settings(self) -> dict[str, Any] | None:
        """What the steps that are there were made with, or None if there are none."""
        path = self.folder / _SETTINGS
        if path.is_file():
            try:
                return dict(json.loads(path.read_text("utf-8")))
            except (ValueError, TypeError):
                raise self._in_the_way(f"{_SETTINGS} is damaged", settings="unknown") from None
        # steps and the folders of a heal; what was being written when a run was killed is nothing
        if self.folder.is_dir() and any(entry.suffix != _WRITING for entry in self.folder.iterdir()):
            raise self._in_the_way(f"{_SETTINGS}, which says what it was made with, is missing", settings="unknown")
        return None

    def begin(self) -> Path:
        """The folder, made now; for steps that keep files of their own there."""
        path = self.folder / _SETTINGS
        if not path.is_file():
            with disk_errors(self.folder):
                self.folder.mkdir(exist_ok=True)
                temporary = path.with_suffix(_WRITING)
                temporary.write_text(self._settings, encoding="utf-8")
                sync(temporary)
                os.replace(temporary, path)
                sync(self.folder)
        return self.folder

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def save(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        values: Mapping[str, Any] | None = None,
        *,
        alone: bool = True,
    ) -> None:
        """Keep a step; one of the same name is replaced.

        values: whatever JSON can hold;  alone: False: not worth a folder, it is written when the next step is
        """
        if not alone:
            self._put_off.append(lambda: self.save(name, tensors, values))
            return
        put_off, self._put_off = self._put_off, []
        for save in put_off:
            save()
        path = self._path(name)
        temporary = path.with_suffix(_WRITING)
        self.begin()
        with disk_errors(path):
            kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            metadata = {"values": json.dumps(dict(values or {})), "checksum": _checksum(kept)}
            save_file(kept, temporary, metadata=metadata)
            sync(temporary)
            os.replace(temporary, path)
            sync(self.folder)

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, values) of a step, or None if it was not finished; `DestinationError` if it is damaged."""
        return self._read(name, tensors=True)

    def values(self, name: str) -> dict[str, Any] | None:
        """The values of a step alone, or None if it was not finished."""
        found = self._read(name, tensors=False)
        return None if found is None else found[1]

    def drop(self, name: str) -> None:
        """Forget a step, or all whose names `name` stands for, with * for anything."""
        with disk_errors(self.folder):
            for path in self.folder.glob(f"{name}.safetensors"):
                path.unlink(missing_ok=True)

    def _read(self, name: str, *, tensors: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        if name not in self:
            return None
        try:
            with safe_open(self._path(name), framework="pt") as file:
                metadata = file.metadata() or {}
                values: dict[str, Any] = json.loads(metadata["values"])
                found = {key: file.get_tensor(key).clone() for key in file.keys()} if tensors else {}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise self._damaged(name, f"{type(error).__name__}: {error}") from error
        if tensors and _checksum(found) != metadata.get("checksum"):
            raise self._damaged(name, "its content is not what was written")
        return found, values

    def _damaged(self, name: str, why: str) -> DestinationError:
        return DestinationError(
            "a finished step of an unfinished run is damaged",
            where=str(self._path(name)),
            why=why,
            remedy="check the disk; --restart begins anew, another destination leaves this one as it is",
        )

    def _in_the_way(self, why: str, settings: str = "other") -> DestinationError:
        finish = "finish it with its own settings, " if settings == "other" else ""
        return DestinationError(
            f"an unfinished run with {settings} settings is in the way",
            where=str(self.folder),
            why=why,
            remedy=f"{finish}choose another destination, or delete it with --restart",
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    found = 0
    for name in sorted(tensors):
        content: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        found = zlib.crc32(content, zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of the settings that differ; of a table, which of its entries; of short values, what they are."""
    differing = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differing += [f"{key}.{inner}" for inner in _differences(old, new)]
        elif old != new:
            values = [json.dumps(value) for value in (old, new)]
            short = None not in (old, new) and all(len(value) <= _SHORT for value in values)
            differing.append(f"{key} ({values[0]} then, {values[1]} now)" if short else key)
    return differing
