"""Run the commands that README.md and docs/ show and put their output into them.

    python benchmarks/tour.py [--smollm2 FOLDER --text VALID --calibration TRAIN] [--keep DIR]

A block between `<!-- NAME -->` and `<!-- end -->` is replaced by the commands of that name and what they printed.
Blocks of the 135M model are only replaced when its folder is given. Converted folders stay in DIR and are used again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

# block -> commands; those of the 135M model find it and its texts by these names in the folder that they run in
STORIES = {
    "plan": ["plan stories260k"],
    "convert": ["convert stories260k"],
    "eval": ["eval stories260k-mla-24-8 --against stories260k"],
    "heal": [
        "heal stories260k-mla-24-8",
        "eval stories260k-mla-24-8-healed --against stories260k --windows 64",
    ],
    "doctor": ["doctor stories260k-mla-24-8"],
    "export": ["export stories260k-mla-24-8 stories.gguf --type q8_0"],
    "generate": ['generate stories260k-mla-24-8 "Once upon a time" --max-new-tokens 60 --seed 1'],
    "stories-results": [
        "eval stories260k-mla-24-8 --against stories260k --windows 64",
        "convert stories260k --latent 10 --rope 6",
        "eval stories260k-mla-10-6 --against stories260k --windows 64",
    ],
}
MIX = "wikitext2-train-part.txt:2+synthetic+code"
SMOLLM2 = {
    "smollm2-results": [
        f"convert smollm2-135m smollm2-mla --latent 96 --rope 32 --calibration {MIX}",
        "eval smollm2-mla --against smollm2-135m --text wikitext2-valid.raw",
    ]
}
LINKS = {"smollm2": "smollm2-135m", "text": "wikitext2-valid.raw", "calibration": "wikitext2-train-part.txt"}


def run(command: str, folder: Path) -> str:
    """The command as a person would type it, and its standard output."""
    words = shlex.split(command)
    shown = f"$ transmla {command}\n"
    makes_folder = words[0] in ("convert", "heal")
    # options stand for a destination in the name of the log where none is given
    log = folder / ("-".join(word.strip("-") for word in words[1:] if "/" not in word) + ".log")
    if makes_folder and log.is_file():
        return shown + log.read_text()
    env = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    quiet = ["-q"] if words[0] in ("convert", "heal", "eval", "export") else []
    if words[0] == "export":
        (folder / words[2]).unlink(missing_ok=True)
    command_line = [sys.executable, "-m", "transmla", *words, *quiet]
    output = subprocess.run(command_line, check=True, capture_output=True, text=True, cwd=folder, env=env).stdout
    output = "\n".join(line.rstrip() for line in output.splitlines()) + "\n"
    if makes_folder:
        log.write_text(output)
    return shown + output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        for option, link in LINKS.items() if args.smollm2 else ():
            (folder / link).unlink(missing_ok=True)
            (folder / link).symlink_to(getattr(args, option).resolve())
        for block, commands in (STORIES | (SMOLLM2 if args.smollm2 else {})).items():
            text = "\n".join(run(command, folder.resolve()) for command in commands)
            pattern = re.compile(rf"<!-- {block} -->.*?<!-- end -->", re.DOTALL)
            filled = f"<!-- {block} -->\n```text\n{text.rstrip()}\n```\n<!-- end -->"
            for page in PAGES:
                page.write_text(pattern.sub(lambda _, new=filled: new, page.read_text()))


if __name__ == "__main__":
    main()
