"""What a GGUF file says of itself: architecture, sizes of the cache, types of its weights. No tensor is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transmla.checkpoint.gguf.read import open_gguf
from transmla.errors import SourceError

# a key of this program's own, which llama.cpp does not read
BIASES_LEFT_OUT = "transmla.biases_left_out"


@dataclass(frozen=True)
class GgufDescription:
    """What `describe_gguf` found.

    kv_lora_rank:    None without latent attention;  rope: rotary values that are cached;  types: the commonest
    biases_left_out: the file was made of a folder that was converted with --lossy
    """

    architecture: str
    kv_lora_rank: int | None
    rope: int
    types: str
    biases_left_out: bool


def describe_gguf(path: Path) -> GgufDescription:
    """Raises `SourceError` for files that cannot be read."""
    if not path.is_file():
        raise SourceError("the GGUF file was not found", where=str(path), why="no such file", remedy="check the path")
    reader = open_gguf(path)

    def value(key: str) -> object:
        found = reader.get_field(key)
        return None if found is None else found.contents()

    architecture = str(value("general.architecture"))
    rank, rope = value(f"{architecture}.attention.kv_lora_rank"), value(f"{architecture}.rope.dimension_count")
    weights = Counter(tensor.tensor_type.name.lower() for tensor in reader.tensors if len(tensor.shape) > 1)
    return GgufDescription(
        architecture,
        int(rank) if isinstance(rank, int) else None,
        int(rope) if isinstance(rope, int) else 0,
        weights.most_common(1)[0][0] if weights else "no weights",
        value(BIASES_LEFT_OUT) is True,
    )
