"""Cut a folder into parts that are small enough to be carried one by one, and put it together again.

    python benchmarks/gpu/pack.py split FOLDER PARTS [--mebibytes 54]
    python benchmarks/gpu/pack.py join PARTS FOLDER

PARTS gets part-1, part-2 ..., each a folder of pieces `NUMBER-OF-COUNT.NAME`. Small files come first, so that what is
needed first is in part 1. `join` writes the files of which all pieces are there, and says which are not complete.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

MEBI = 2**20


def cut(sizes: dict[str, int], limit: int) -> list[list[tuple[str, int, int]]]:
    """Parts of at most `limit` bytes: lists of (name, start, end), files from the smallest to the largest."""
    parts: list[list[tuple[str, int, int]]] = [[]]
    room = limit
    for name, size in sorted(sizes.items(), key=lambda item: (item[1], item[0])):
        start = 0
        while start < size or (start == size == 0):
            if room == 0:
                parts.append([])
                room = limit
            end = min(size, start + room)
            parts[-1].append((name, start, end))
            room -= end - start
            if end == size:
                break
            start = end
    return parts


def split(folder: Path, parts: Path, limit: int) -> int:
    """Write the parts, in place of those of an earlier call; returns how many."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    pieces = cut(sizes, limit)
    counts = {name: sum(one == name for part in pieces for one, *_ in part) for name in sizes}
    seen = dict.fromkeys(sizes, 0)
    for old in parts.glob("part-*"):
        shutil.rmtree(old)
    for number, part in enumerate(pieces, start=1):
        target = parts / f"part-{number}"
        target.mkdir(parents=True)
        for name, start, end in part:
            seen[name] += 1
            with (folder / name).open("rb") as file:
                file.seek(start)
                (target / f"{seen[name]}-of-{counts[name]}.{name}").write_bytes(file.read(end - start))
    return len(pieces)


def join(parts: Path, folder: Path) -> list[str]:
    """Write every file that is complete; returns the names of those that are not."""
    found: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for piece in parts.glob("part-*/*"):
        place, _, name = piece.name.partition(".")
        number, count = (int(word) for word in place.split("-of-"))
        found.setdefault(name, {})[number] = piece
        counts[name] = count
    folder.mkdir(parents=True, exist_ok=True)
    for name, pieces in found.items():
        if len(pieces) == counts[name]:
            with (folder / name).open("wb") as file:
                for number in sorted(pieces):
                    file.write(pieces[number].read_bytes())
    return sorted(name for name, pieces in found.items() if len(pieces) < counts[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("split", "join"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--mebibytes", type=float, default=54)
    args = parser.parse_args()
    if args.command == "split":
        print(f"{split(args.source, args.target, int(args.mebibytes * MEBI))} parts in {args.target}")
    elif missing := join(args.source, args.target):
        print("not complete yet:", ", ".join(missing))


if __name__ == "__main__":
    main()
