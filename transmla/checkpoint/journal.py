"""What an unfinished conversion has finished already: DST.partial/journal, one file per step.

A step is written under another name, forced to the disk and renamed, so it is there whole or not at all, also after
kill -9. The folder goes when the conversion is done.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from transmla.checkpoint.destination import disk_errors, journal_of, sync
from transmla.errors import DestinationError

_SETTINGS = "settings.json"


class Journal:
    """Steps by name, each a few tensors and a few numbers."""

    def __init__(self, destination: Path, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        """Go on with the journal of `destination`, or begin one.

        settings: all that the steps depend on; a journal of other settings is refused, or with `restart` deleted
        """
        self.folder = journal_of(destination)
        self._settings = json.dumps(settings, indent=2, sort_keys=True)
        self._put_off: list[Callable[[], None]] = []
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        path = self.folder / _SETTINGS
        if path.is_file() and (found := path.read_text("utf-8")) != self._settings:
            raise self._in_the_way(f"it differs in {', '.join(_differences(json.loads(found), dict(settings)))}")
        if not path.is_file() and any(self.folder.glob("*.safetensors")):
            raise self._in_the_way(f"{_SETTINGS}, which says what it was made with, is missing", settings="unknown")

    def begin(self) -> Path:
        """The folder, made now; for steps that keep files of their own there."""
        path = self.folder / _SETTINGS
        if not path.is_file():
            with disk_errors(self.folder):
                self.folder.mkdir(exist_ok=True)
                temporary = path.with_suffix(".writing")
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
        temporary = path.with_suffix(".writing")
        self.begin()
        with disk_errors(path):
            kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(kept, temporary, metadata={"values": json.dumps(dict(values or {}))})
            sync(temporary)
            os.replace(temporary, path)
            sync(self.folder)

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, values) of a step, or None if it was not finished."""
        values = self.values(name)
        if values is None:
            return None
        with safe_open(self._path(name), framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}, values  # noqa: SIM118

    def values(self, name: str) -> dict[str, Any] | None:
        """The values of a step alone, or None if it was not finished."""
        if name not in self:
            return None
        with safe_open(self._path(name), framework="pt") as file:
            values: dict[str, Any] = json.loads(file.metadata()["values"])
            return values

    def drop(self, name: str) -> None:
        """Forget a step, or all whose names `name` stands for, with * for anything."""
        for path in self.folder.glob(f"{name}.safetensors"):
            path.unlink(missing_ok=True)

    def _in_the_way(self, why: str, settings: str = "other") -> DestinationError:
        finish = "finish it with its own settings, " if settings == "other" else ""
        return DestinationError(
            f"an unfinished conversion with {settings} settings is in the way",
            where=str(self.folder),
            why=why,
            remedy=f"{finish}choose another destination, or delete it with --restart",
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != json.loads(json.dumps(wanted.get(key)))
    ]
