"""Every operation on files counted, so that one of them can fail, or be the last one of a process.

`python -m tests.conversion.faults FOLDER ACTION:SCENARIO:FIRST:STEP ...` tries operations of scenarios, one after the
other, and prints one line of JSON for each; a kill takes a copy of the process, made by fork.

action:   an error (full, broken, denied), kill, or random: FIRST kills at any moment
scenario: convert, stream (the same, its weights written tensor by tensor), export, unfold, heal
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# of the interpreter; os.rename is os.replace, too
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.listdir", "os.scandir"}
# what changes nothing: a kill there is the same as one at the next operation
READING = ("open", "map", "os.listdir", "os.scandir")
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "denied": errno.EACCES}


class Operations:
    """Counts operations below a folder; number `at` (from 1) does what `happen` does with its name and path."""

    def __init__(self, root: Path, at: int = 0, happen: Callable[[str, str], None] | None = None) -> None:
        self.root, self.at, self.happen = str(root), at, happen
        self.count = 0
        self.seen: list[str] = []

    def __call__(self, name: str, path: str) -> None:
        if not path.startswith(self.root):
            return
        self.count += 1
        self.seen.append(f"{name} {path.removeprefix(self.root)}")
        if self.count == self.at and self.happen is not None:
            self.happen(name, path)


_active: Operations | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _active is None or event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
        return
    path = os.fspath(arguments[0])
    writes = event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # as shutil.rmtree does it
        path = os.path.join(_of_descriptor(arguments[1]), path)
    _active("write" if writes else event, os.path.abspath(path))


def _told(name: str, function: Any, path_of: Callable[..., str]) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _active is not None:
            _active(name, path_of(*args))
        return function(*args, **kwargs)

    return wrapped


def _of_descriptor(descriptor: Any, *_: Any) -> str:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    return os.readlink(f"/proc/self/fd/{number}")


def install() -> None:
    """Watch this process, for ever: audit hooks cannot be removed. Beside them: fsync, flock, and safetensors' own."""
    from transmla.checkpoint import journal, safetensors_file, streamed, write

    sys.addaudithook(_audit)
    os.fsync = _told("fsync", os.fsync, _of_descriptor)
    fcntl.flock = _told("flock", fcntl.flock, _of_descriptor)
    for module in (journal, write):
        module.save_file = _told("save", module.save_file, lambda _, path: str(path))
    for name in ("add", "finish"):
        told = _told("stream", getattr(streamed.StreamedFile, name), lambda file, *_: str(file.path))
        setattr(streamed.StreamedFile, name, told)
    for module in (journal, safetensors_file):
        module.safe_open = _told("map", module.safe_open, lambda path: str(path))


@contextlib.contextmanager
def watching(operations: Operations) -> Iterator[Operations]:
    """Nothing else of this process may use files meanwhile."""
    global _active
    _active = operations
    try:
        yield operations
    finally:
        _active = None


def points_of(seen: list[str], kind: str) -> list[int]:
    """Numbers of the operations to try: the first of equal ones in a row; for kills only those that change files."""
    new = [number for number, name in enumerate(seen, start=1) if number < 2 or name != seen[number - 2]]
    return [number for number in new if kind != "kill" or not seen[number - 1].startswith(READING)]


def fail(number: int) -> Callable[[str, str], None]:
    """Raise the error of the operating system with this number, once."""

    def happen(name: str, path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return happen


def die(name: str, path: str) -> None:
    """End the process in the middle of the operation: what is being written is empty, or half of what it should be."""
    global _active
    _active = None
    if name in ("write", "save"):
        with open(path, "wb") as file:
            file.write(b"\\x10\\0\\0\\0\\0\\0\\0\\0{" if name == "save" else b"")
    os.kill(os.getpid(), signal.SIGKILL)


def digest(path: Path) -> str:
    """Names and contents of a folder's files, or the content of a file."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        found.update(file.name.encode() + (file.read_bytes() if file.is_file() else b""))
    return found.hexdigest()


class Scenario:
    """A command on a source of its own, as short as it gets, and what it writes."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.source, self.out = folder / "source", folder / "work" / ("out.gguf" if kind == "export" else "out")
        self.text = folder / "source" / "text.txt"

    def prepare(self) -> None:
        """The inputs, which no fault is to happen to."""
        import transmla
        from transmla.checkpoint import write

        if self.kind == "stream":
            write.BUFFER_BYTES = 0
        data = Path(transmla.__file__).parent / "data"
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if not self.source.exists():
            shutil.copytree(data / "stories260k", self.source)
            self.text.write_text((data / "tinystories-valid.txt").read_text("utf-8")[:3000], encoding="utf-8")
            if self.kind not in ("convert", "stream"):
                self._convert(self.folder / "converted")

    def _convert(self, out: Path) -> None:
        import transmla

        transmla.convert(
            str(self.source), out, latent=8, rope=4, theta=10000.0, refine="off", calibration=str(self.text),
            tokens=128, window=32, context=32,
        )  # fmt: skip

    def run(self) -> None:
        """The command."""
        import transmla

        if self.kind in ("convert", "stream"):
            self._convert(self.out)
        elif self.kind == "export":
            transmla.export(self.folder / "converted", self.out, type="q8_0")
        elif self.kind == "unfold":
            transmla.unfold(self.folder / "converted", self.out)
        else:
            transmla.heal(
                self.folder / "converted", self.out, source=str(self.source), data=str(self.text), tokens=256,
                window=32, batch=2, heldout=2, evaluations=2, rate=2e-2, precision="float32",
            )  # fmt: skip

    def clear(self) -> None:
        """Whatever a run has left."""
        shutil.rmtree(self.out.parent)
        self.out.parent.mkdir()

    def left(self) -> list[str]:
        """What lies where the command writes."""
        return sorted(path.name for path in self.out.parent.iterdir())

    def again(self, expected: str) -> str:
        """The same command once more, which must end well: what it did, and what is wrong, if anything is."""
        from transmla.errors import DestinationError

        try:
            self.run()
            did = "resumed"
        except DestinationError as error:
            did = "was complete"
            if "exists already" not in str(error):
                return f"refused: {error}"
        if self.left() != [self.out.name]:
            return f"left {self.left()}"
        return did if digest(self.out) == expected else "other content"


def injected(scenario: Scenario, point: int, kind: str, expected: str) -> dict[str, Any]:
    """One operation fails; then the command runs again."""
    from transmla.errors import TransmlaError

    scenario.clear()
    result = "done"
    with watching(Operations(scenario.folder, point, fail(ERRORS[kind]))):
        try:
            scenario.run()
        except TransmlaError as error:
            result = f"{type(error).__name__} {error.exit_code}"
        except BaseException as error:
            result = f"traceback {type(error).__name__}: {error}"
    if (
        scenario.out.exists()
        and digest(scenario.out) != expected
        and not (scenario.out / ".transmla-complete").exists()
    ):
        result = "a wrong result under the final name"
    return {"result": result, "again": scenario.again(expected)}


def killed(scenario: Scenario, point: int, seconds: float, expected: str) -> dict[str, Any]:
    """The process dies at an operation, or with point 0 after so many seconds; then the command runs again."""
    scenario.clear()
    child = os.fork()
    if child == 0:
        with watching(Operations(scenario.folder, point, die)):
            scenario.run()
        os._exit(0)
    if not point:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    result = "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    loads = not scenario.out.exists() or (scenario.out / ".transmla-complete").exists()
    if not loads and digest(scenario.out) != expected:
        result = "a wrong result under the final name"
    return {"result": result, "left": scenario.left(), "again": scenario.again(expected)}


def main(folder: str, *wanted: str) -> None:
    """wanted: as above; FIRST and STEP are those of a slice of the operations"""
    import warnings

    warnings.simplefilter("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    install()
    for one in wanted:
        action, kind, first, step = one.split(":")
        scenario = Scenario(kind, Path(folder) / kind)
        scenario.prepare()
        scenario.clear()
        scenario.run()  # what is imported or cached now is no operation of the next run
        scenario.clear()
        started = time.monotonic()
        with watching(Operations(scenario.folder)) as operations:
            scenario.run()
        seconds, expected = time.monotonic() - started, digest(scenario.out)
        points = points_of(operations.seen, action)
        heading = {"action": action, "scenario": kind, "operations": operations.count, "points": len(points)}
        print(json.dumps(heading), flush=True)
        if action == "random":
            moments = random.Random(0)
            for _ in range(int(first)):
                print(json.dumps(killed(scenario, 0, moments.uniform(0, seconds), expected)), flush=True)
            continue
        for point in points[int(first) :: int(step)]:
            if action == "kill":
                found = killed(scenario, point, 0.0, expected)
            else:
                found = injected(scenario, point, action, expected)
            print(json.dumps(found | {"at": operations.seen[point - 1]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
