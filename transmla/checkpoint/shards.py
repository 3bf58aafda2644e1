"""The index file of a sharded checkpoint, the same for safetensors and .bin: tensor name -> shard."""

from collections.abc import Mapping
from pathlib import Path

from transmla.checkpoint.store import TensorInfo, first_few, parsed_json
from transmla.errors import SourceError

MOST_INDEX_BYTES = 2**27
# of one weight file that is written, unless another size is asked for
SHARD_BYTES = 4 * 2**30
# of it that are held before its file is begun; a smaller one is written at once
BUFFER_BYTES = 2**26


def shard_of_tensors(index: Path) -> dict[str, Path]:
    """Tensor name -> file, from `weight_map`. Every file exists and lies in the folder of the index."""
    try:
        weight_map = parsed_json(index.read_bytes(), MOST_INDEX_BYTES)["weight_map"]
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("weight_map must name one file for each tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _index_error(index, "is not a shard index", f"{type(error).__name__}: {error}") from error
    for name, shard in weight_map.items():
        # by name alone: the hub cache itself is made of links to files elsewhere
        if shard != Path(shard).name or "\\" in shard or shard in ("", ".", ".."):
            raise _index_error(index, "points outside its folder", f"tensor {name} is said to be in {shard!r}")
    missing = [shard for shard in sorted(set(weight_map.values())) if not _is_file(index.parent / shard)]
    if missing:
        raise _index_error(index, "names missing shards", f"not in the folder: {first_few(missing)}")
    return {name: index.parent / shard for name, shard in weight_map.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, links in a circle
        return False


def indexed_tensors(
    index: Path, where: Mapping[str, Path], in_shard: Mapping[Path, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors of the index as the headers of their shards describe them."""
    absent = [f"{name} in {shard.name}" for name, shard in where.items() if name not in in_shard[shard]]
    if absent:
        raise _index_error(index, "does not fit its shards", f"not found: {first_few(absent)}")
    return {name: in_shard[shard][name] for name, shard in where.items()}


def _index_error(index: Path, what: str, why: str) -> SourceError:
    return SourceError(
        f"the shard index {what}", where=str(index), why=why, remedy="download the whole checkpoint again"
    )
