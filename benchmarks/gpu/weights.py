"""What a model has learned, small enough to be brought back: the tensors that its source does not have, in bfloat16.

Of the unfolded form, in which everything but the attention is the source's own.

    python benchmarks/gpu/weights.py pack FOLDER SOURCE OUT [--mebibytes 15]
    python benchmarks/gpu/weights.py unpack PARTS SOURCE FOLDER

FOLDER: a converted folder;  SOURCE: its source, a folder or GGUF, on both machines. `pack` writes weights-1, weights-2
... and the other files of FOLDER in one archive; `unpack` makes the unfolded FOLDER of them, for `transmla fold`.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from transmla.model.loading import load_any
from transmla.progress import silent
from transmla.targets.fold import unfold

MEBI = 2**20
# of a file that is compressed at once
PIECE = 4 * MEBI


def rest_of(source: str) -> dict[str, torch.Tensor]:
    """The source's tensors by name, float32; the head of a source without one is its embedding."""
    tensors: dict[str, torch.Tensor] = load_any(source, dtype=torch.float32).state_dict()
    return tensors


def squeezed(piece: bytes) -> bytes:
    return lzma.compress(piece, preset=1)


def pack(folder: Path, source: str, out: Path, limit: int) -> None:
    """Upper bytes of all numbers, which hardly differ, then lower ones, which do not shrink."""
    tensors: dict[str, torch.Tensor] = {}
    out.mkdir(parents=True, exist_ok=True)
    unfolded = out.with_name(f"{out.name}-unfolded")
    shutil.rmtree(unfolded, ignore_errors=True)  # of an earlier call
    folder = unfold(folder, unfolded, dtype="float32", progress=silent)
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    rest = rest_of(source)
    listed, halves = [], []
    for name, tensor in tensors.items():
        own = rest.get(name)
        if own is not None and own.shape == tensor.shape and float((own - tensor).norm()) < 1e-6 * float(own.norm()):
            listed.append([name, None])
            continue
        listed.append([name, list(tensor.shape)])
        halves.append(tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().reshape(-1))
    whole = np.concatenate(halves).view(np.uint8).reshape(-1, 2)
    plain = [np.ascontiguousarray(whole[:, place]).tobytes() for place in (1, 0)]
    pieces = [half[start : start + PIECE] for half in plain for start in range(0, len(half), PIECE)]
    with ThreadPoolExecutor() as pool:  # compressing holds no lock, and a process with a GPU is not to be forked
        small = list(pool.map(squeezed, pieces))
    with tarfile.open(out / "folder.tar.xz", "w:xz") as archive:
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
                archive.add(file, file.name)
        header = json.dumps({"tensors": listed, "sizes": [len(one) for one in small]}).encode()
        entry = tarfile.TarInfo("weights.json")
        entry.size = len(header)
        archive.addfile(entry, io.BytesIO(header))
    joined = b"".join(small)
    for number, start in enumerate(range(0, len(joined), limit), start=1):
        (out / f"weights-{number}").write_bytes(joined[start : start + limit])


def unpack(parts: Path, source: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(parts / "folder.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    header = json.loads((folder / "weights.json").read_text("utf-8"))
    (folder / "weights.json").unlink()
    files = sorted(parts.glob("weights-*"), key=lambda file: int(file.name.rpartition("-")[2]))
    joined = b"".join(file.read_bytes() for file in files)
    ends = np.cumsum(header["sizes"])
    plain = b"".join(lzma.decompress(joined[end - size : end]) for size, end in zip(header["sizes"], ends, strict=True))
    upper, lower = np.frombuffer(plain, np.uint8).reshape(2, -1)
    numbers = torch.from_numpy(np.stack((lower, upper), 1).reshape(-1).copy()).view(torch.bfloat16)
    rest = rest_of(source)
    tensors, place = {}, 0
    for name, shape in header["tensors"]:
        if shape is None:
            tensors[name] = rest[name].to(torch.bfloat16).clone()
            continue
        size = int(np.prod(shape))
        tensors[name] = numbers[place : place + size].reshape(shape).clone()
        place += size
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pack", "unpack"))
    parser.add_argument("given", type=Path)
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("--mebibytes", type=float, default=15)
    args = parser.parse_args()
    if args.command == "pack":
        pack(args.given, args.source, args.target, int(args.mebibytes * MEBI))
    else:
        unpack(args.given, args.source, args.target)


if __name__ == "__main__":
    main()
