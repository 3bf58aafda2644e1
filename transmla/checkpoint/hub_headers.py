"""Headers of safetensors files that stay on the hub: enough for a plan, a few kilobytes instead of gigabytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import get_safetensors_metadata

from transmla.checkpoint.fp8 import Fp8Store, block_size
from transmla.checkpoint.read import Source, read_config
from transmla.checkpoint.resolve import ResolvedSource
from transmla.checkpoint.safetensors_file import STORED_DTYPES
from transmla.checkpoint.store import TensorInfo, WeightStore
from transmla.errors import SourceError

if TYPE_CHECKING:
    import torch


class UnreadHeadersError(SourceError):
    """The headers cannot be had from the hub; of weights that are not safetensors, only a download can tell."""


class HubStore:
    """Names, shapes and dtypes only; reading a tensor is an error of ours."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    def view(self, name: str) -> torch.Tensor:
        raise ValueError(f"{name} has not been downloaded: this checkpoint was opened for its headers")

    def view_rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        return self.view(name)

    def files(self) -> list[Path]:
        return []


def open_on_hub(resolved: ResolvedSource) -> Source:
    """A source whose config is in the local cache and whose weights are not.

    Raises `UnreadHeadersError` if headers cannot be had.
    """
    path = resolved.path / "config.json"
    config = read_config(path)
    try:
        found = get_safetensors_metadata(resolved.name, revision=resolved.revision)
    except Exception as error:  # whatever a network can do, of several libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreadHeadersError(
            "the headers of the model cannot be read",
            where=resolved.name,
            why=reason,
            remedy="`transmla convert` downloads the weights, also those that are not safetensors; or pass a folder",
        ) from error
    tensors = {
        name: TensorInfo(
            tuple(info.shape),
            STORED_DTYPES.get(info.dtype, (str(info.dtype).lower(), None))[0],
            info.data_offsets[1] - info.data_offsets[0],
            file,
        )
        for file, metadata in found.files_metadata.items()
        for name, info in metadata.tensors.items()
    }
    store: WeightStore = HubStore(tensors)
    if (block := block_size(config)) is not None:
        store = Fp8Store(store, block)
    return Source(resolved.path, "safetensors", config, str(path), store)
