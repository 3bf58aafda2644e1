"""Plain text for healing and the texts that are measured on, as files in OUT. None of it belongs to this repository.

    python benchmarks/gpu/text.py OUT [--data DIR] [--megabytes 130]

docs.txt:       documentation of Debian packages (`apt-get download`, unpacked, HTML stripped), each under its own
                licence (usr/share/doc/PACKAGE/copyright)
modules.txt:    Python of other projects that are installed here, each under its own licence
stdlib-code.txt: argparse.py, tarfile.py and typing.py of the Python that runs this
from DIR:       wikitext2-valid.raw, tinystories-valid.txt and wikitext2-train-part.txt as they are, and the rows of
                c4-sample.jsonl as c4-sample.txt
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import typing
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import torch

PACKAGES = (
    "postgresql-doc-15", "perl-doc", "debian-handbook", "anarchism", "gimp-help-en", "linux-doc-6.1", "apache2-doc",
    "python3.11-doc", "sqlite3-doc", "debian-reference-en", "developers-reference", "debian-policy", "git-doc",
    "installation-guide-amd64", "vim-doc", "jargon-text", "libreoffice-help-en-us", "lilypond-doc-html", "kicad-doc-en",
    "octave-doc", "gnucash-docs", "r-doc-html", "erlang-doc", "aptitude-doc-en", "maxima-doc", "doc-debian",
    "exim4-doc-html", "nmap-common",
)  # fmt: skip
COPIED = ("wikitext2-valid.raw", "tinystories-valid.txt", "wikitext2-train-part.txt")
BLOCKS = ("p", "div", "li", "dt", "dd", "tr", "pre", "br", "h1", "h2", "h3", "h4", "h5", "h6", "title")
SILENT = ("script", "style", "nav", "head")
# names of translations that stand beside English pages
FOREIGN = re.compile(r"\.(?!en\b)[a-z]{2}(-[a-z]{2})?\.(html|utf8)|/(?!en)[a-z]{2}-[A-Z]{2}/|\.html\.(?!en)[a-z]{2}")


class Stripped(HTMLParser):
    """The words of a page; a block begins a new line."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in SILENT
        if tag in BLOCKS:
            self.words.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in SILENT and self._silent > 0
        if tag in BLOCKS:
            self.words.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.words.append(data)


def plain(page: str) -> str:
    """The text of an HTML page, without empty lines in a row."""
    parser = Stripped()
    parser.feed(page)
    parser.close()
    lines = [line.rstrip() for line in "".join(parser.words).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def pages(folder: Path) -> Iterator[str]:
    """Text of all documents below a folder, in the order of their names."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        name = file.name.removesuffix(".gz")
        kind = re.search(r"\.(html|htm|pod|txt|rst)(\.en)?$", name)
        if kind is None or FOREIGN.search(str(file.relative_to(folder))):
            continue
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = content.decode("utf-8", errors="ignore")
        text = plain(text) if kind[1].startswith("htm") else text
        if len(text) > 400:
            yield text


def documentation(out: Path, limit: int) -> None:
    """docs.txt: every package gets the same share, as far as it has that much."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            work = Path(folder) / package
            work.mkdir()
            done = subprocess.run(["apt-get", "download", package], cwd=work, capture_output=True, text=True)
            if done.returncode:
                print(f"left out: {package}: {done.stderr.strip().splitlines()[-1:]}")
                continue
            (archive,) = work.glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", str(archive), str(work / "x")], check=True)
            found[package] = "\n".join(pages(work / "x"))
            shutil.rmtree(work)
            print(f"{package}: {len(found[package]) / 1e6:.1f} MB", flush=True)
    left, parts = limit, []
    for number, text in enumerate(sorted(found.values(), key=len)):
        part = text[: left // (len(found) - number)]
        left -= len(part)
        parts += pieces(part)
    (out / "docs.txt").write_text("\n".join(shuffled(parts)), encoding="utf-8")


def pieces(text: str, length: int = 20_000) -> Iterator[str]:
    """Pieces of about so many characters that end with a line."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + length) + 1 or len(text)
        yield text[start:end]
        start = end


def shuffled(parts: list[str]) -> list[str]:
    """In an order that is always the same, so that whatever is read first is of all kinds."""
    random.Random(0).shuffle(parts)
    return parts


def modules(out: Path, limit: int) -> None:
    """modules.txt: Python of other projects, as they are installed where this runs, each under its own licence."""
    folder = Path(str(torch.__file__)).parents[1]
    names = ("transformers", "torch", "sympy", "networkx", "matplotlib", "rich", "click", "jinja2", "numpy", "pygments")
    texts = (
        path.read_text("utf-8", errors="ignore") for name in names for path in sorted((folder / name).rglob("*.py"))
    )
    parts = shuffled([text for text in texts if 2000 < len(text) < 200_000])
    (out / "modules.txt").write_text("\n".join(parts)[:limit], encoding="utf-8")


def measured(out: Path, data: Path | None) -> None:
    """The texts that are measured on, and WikiText-2 to train on."""
    modules = (argparse, tarfile, typing)
    code = "\n".join(Path(str(module.__file__)).read_text("utf-8") for module in modules)
    (out / "stdlib-code.txt").write_text(code, encoding="utf-8")
    if data is None:
        return
    for name in COPIED:
        if (data / name).is_file():
            shutil.copyfile(data / name, out / name)
    if (data / "c4-sample.jsonl").is_file():
        lines = (data / "c4-sample.jsonl").read_text("utf-8").splitlines()
        text = "\n\n".join(json.loads(line)["text"] for line in lines if line.strip())
        (out / "c4-sample.txt").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--megabytes", type=float, default=130)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    measured(args.out, args.data)
    modules(args.out, int(12e6))
    documentation(args.out, int(args.megabytes * 1e6))


if __name__ == "__main__":
    main()
