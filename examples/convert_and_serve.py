"""Convert a model, export it for llama.cpp, serve it, and ask it something.

    python examples/convert_and_serve.py [SOURCE] [--out FOLDER] [--prompt TEXT]

Serving takes llama.cpp's `llama-server` on the PATH, or the Python package xllamacpp, which has the same server inside;
without either the script stops at the file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transmla


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="stories260k")
    parser.add_argument("--out", type=Path, default=Path("served"))
    parser.add_argument("--prompt", default="Once upon a time, a cat")
    parser.add_argument("--tokens", type=int, help="of calibration text")
    arguments = parser.parse_args()

    if not arguments.out.exists():
        print(transmla.convert(arguments.source, arguments.out, tokens=arguments.tokens))
    file = arguments.out.with_name(f"{arguments.out.name}.gguf")
    if not file.exists():
        print(transmla.export(arguments.out, file, type="q8_0"))
    with served(file) as address:
        if address is None:
            print(f"no llama-server and no xllamacpp here; elsewhere: llama-server -m {file}")
            return
        print(completion(address, arguments.prompt))


@contextmanager
def served(file: Path) -> Iterator[str | None]:
    """The address of a server of this file; None if there is no engine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    if (program := shutil.which("llama-server")) is not None:
        command = [program, "-m", str(file), "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield address
        finally:
            process.terminate()
            process.wait()
        return
    try:
        import xllamacpp
    except ImportError:
        yield None
        return
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.port = port
    server = xllamacpp.Server(parameters)
    yield server.listening_address
    del server


def completion(address: str, prompt: str, wait: float = 60.0) -> str:
    """One chat completion, as soon as the server has loaded the model; wait: seconds"""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 40, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(int(10 * wait)):
        try:
            with urllib.request.urlopen(request) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"])
        except (urllib.error.URLError, ConnectionError):  # not listening yet, or still loading
            time.sleep(0.1)
    raise TimeoutError(f"no answer from {address}")


if __name__ == "__main__":
    main()
