"""Try a wheel where nothing is installed but what it asks for: python .ci/clean_environment.py WHEEL

A new environment gets the wheel and, as links to what is installed here already, the distributions that the wheel's
requirements lead to, without any extra. There the main job has to run, and what an extra is missing for has to name it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

# (arguments, exit code, words of the output); the folder is the one that they run in
JOBS = (
    (["--version"], 0, ""),
    (["plan", "stories260k"], 0, "MLA 24+8"),
    (["convert", "stories260k", "out", "--tokens", "8192", "--quiet"], 0, "verified"),
    (["doctor", "out"], 0, "llama.cpp"),
    (["eval", "out", "--windows", "2", "--quiet"], 0, "stories260k"),
    (["bench", "out", "--context", "8", "--steps", "1", "--repeats", "1", "--quiet"], 0, "decode"),
    (["export", "out", "out.gguf", "--quiet"], 0, "bf16"),
    (["generate", "out", "Once upon a time", "--max-new-tokens", "8"], 0, "Once upon a time"),
    (["eval", "out", "--tasks", "piqa", "--quiet"], 4, "pip install 'transmla[eval]'"),
    (["heal", "out", "--quiet"], 4, "pip install 'transmla[heal]'"),
    (["report", "out.json"], 4, "pip install 'transmla[report]'"),
    (["convert", "stories260k", "--calibration", "rows.jsonl"], 4, "pip install 'transmla[data]'"),
)


def wanted(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """Distributions that these lead to, by name; of what is installed here."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        one, extra = waiting.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if one.marker and not one.marker.evaluate({"extra": extra}):
            continue
        if name in found and not one.extras:
            continue
        try:
            found[name] = metadata.distribution(one.name)
        except metadata.PackageNotFoundError:
            continue
        for text in found[name].requires or ():
            waiting += [(Requirement(text), part) for part in ("", *one.extras)]
    return found


def main() -> None:
    wheel = Path(sys.argv[1]).resolve()
    (own,) = metadata.Distribution.discover(path=[str(wheel)])
    found = wanted(own.requires or [])
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        (packages,) = environment.glob("lib/python*/site-packages")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
        size = 0
        for distribution in found.values():
            for file in distribution.files or ():
                path = Path(str(distribution.locate_file(file)))
                size += path.stat().st_size if path.is_file() else 0
                top = file.parts[0]
                if top not in ("..", "__pycache__") and not (packages / top).exists():
                    (packages / top).symlink_to(distribution.locate_file(top))
        work = Path(folder) / "work"
        work.mkdir()
        (work / "rows.jsonl").write_text('{"text": "words"}\n')
        for arguments, code, words in JOBS:
            command = [str(environment / "bin" / "transmla"), *arguments]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            output = done.stdout + done.stderr
            assert done.returncode == code and words in output, f"{arguments}: {done.returncode}\n{output}"
        print(f"{wheel.name}: {len(found)} packages, {size / 2**20:,.0f} MiB, {len(JOBS)} commands")


if __name__ == "__main__":
    main()
