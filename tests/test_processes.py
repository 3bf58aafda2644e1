"""Two processes on one conversion give what one gives."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import MakeSource
from tests.maths.weights import relative
from transmla.conversion import levels, run
from transmla.conversion.flow import convert as convert_here
from transmla.errors import TransmlaError
from transmla.model.loading import load
from transmla.processes import ALONE, Processes

# in nats: gradients are summed in another order, and Adam divides small numbers by small numbers
TOLERANCE = 1e-3

PROGRAM = """
import json, sys
import torch
from transmla.conversion import levels, run
from transmla.conversion.flow import convert
from transmla.conversion.levels import Descent, Refinement
torch.set_num_threads(1)
run.narrow_dtype = lambda device: None  # rounding to bfloat16 would hide what is tested
levels.LEAST_PER_FEATURE = 1  # so that the closed form sees ten of the sixteen windows
refinement = Refinement(Descent(4.0, 2, 3e-3), closed_form_tokens=640)
report = convert(
    sys.argv[1], sys.argv[2], latent=12, rope=8, theta="auto" if sys.argv[6:] else 10000.0, calibration=sys.argv[3],
    tokens=1024, window=64,
    refinement=refinement, block_layers=int(sys.argv[4]), restart=sys.argv[5] == "restart",
)
print(json.dumps(vars(report.heldout)))
"""


Alone = Callable[..., dict[str, Any]]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Alone:
    """alone(folder, *arguments): run PROGRAM in this process; what it reports."""

    def convert(folder: Path, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(run, "narrow_dtype", run.narrow_dtype)  # which is then put back
        monkeypatch.setattr(levels, "LEAST_PER_FEATURE", levels.LEAST_PER_FEATURE)
        monkeypatch.setattr(sys, "argv", ["", arguments[0], str(folder), *arguments[1:]])
        exec(PROGRAM, {})
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return convert


def started(arguments: list[str], port: int) -> list[str]:
    """Run Python in two processes, as launchers start them; the last line of each."""
    running = []
    for rank in range(2):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
        running.append(
            subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    return [output.splitlines()[-1] for output in outputs]


def convert(folder: Path, *arguments: str, port: int) -> list[dict[str, Any]]:
    """What PROGRAM reports in each of two processes."""
    lines = started(["-c", PROGRAM, arguments[0], str(folder), *arguments[1:]], port)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("block_layers", [3, 2])
def test_two_processes_convert_like_one(
    lively: MakeSource, text_file: Path, tmp_path: Path, free_port: int, alone: Alone, block_layers: int
) -> None:
    arguments = (str(lively()), str(text_file), str(block_layers), "")
    one = alone(tmp_path / "one", *arguments)
    both = convert(tmp_path / "two", *arguments, port=free_port)
    assert both[0] == both[1]
    assert both[0]["converted"] == pytest.approx(one["converted"], abs=TOLERANCE)
    assert both[0]["source"] == pytest.approx(one["source"], abs=1e-6)
    first, second = (logits(tmp_path / name) for name in ("one", "two"))
    assert relative(second, first) < 10 * TOLERANCE
    computed = json.loads((tmp_path / "two" / "transmla.json").read_text("utf-8"))["computed"]
    assert computed["processes"] == 2


def test_two_processes_convert_the_own_form_like_one(
    lively: MakeSource, text_file: Path, tmp_path: Path, free_port: int, alone: Alone
) -> None:
    """Norms on queries and keys, windows, and frequencies that every layer chooses for itself."""
    arguments = (str(lively(model_type="gemma3_text", layers=2)), str(text_file), "2", "", "auto")
    one = alone(tmp_path / "one", *arguments)
    both = convert(tmp_path / "two", *arguments, port=free_port)
    assert both[0] == both[1]
    assert both[0]["converted"] == pytest.approx(one["converted"], abs=TOLERANCE)
    first, second = (json.loads((tmp_path / name / "config.json").read_text("utf-8")) for name in ("one", "two"))
    assert first["model_type"] == second["model_type"] == "transmla"
    assert torch.allclose(torch.tensor(second["latent_inv_freq"]), torch.tensor(first["latent_inv_freq"]), rtol=1e-4)
    assert relative(logits(tmp_path / "two"), logits(tmp_path / "one")) < 10 * TOLERANCE


def test_two_processes_start_again(lively: MakeSource, text_file: Path, tmp_path: Path, free_port: int) -> None:
    """--restart: what process 0 deletes, no other process has read before."""
    source = str(lively(layers=1))

    def stop(at: str, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_here(source, tmp_path / "two", latent=8, refine="off", calibration=str(text_file), progress=stop)
    arguments = (source, str(text_file), "1", "restart")
    both = convert(tmp_path / "two", *arguments, port=free_port)
    assert both[0] == both[1] and (tmp_path / "two").is_dir()


def test_groups_are_left_before_the_interpreter_ends(free_port: int) -> None:
    """Threads of theirs that still run then abort it now and then."""
    program = """
import atexit, torch
from transmla.processes import Processes
atexit.register(lambda: print(torch.distributed.is_initialized()))
Processes.current("cpu").wait()
assert torch.distributed.is_initialized()
"""
    assert started(["-c", program], free_port) == ["False", "False"]


def test_tensors_come_from_process_0(free_port: int) -> None:
    """Of every dtype and shape, and not as one object."""
    program = """
import torch
from transmla.processes import Processes
processes = Processes.current("cpu")
kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.bool)
sent = {f"{kind}": (torch.arange(6).reshape(2, 3) % 2 + 1).to(kind) for kind in kinds}
sent |= {"number": torch.tensor(3.5, dtype=torch.float64), "empty": torch.empty(0, 4)}
found = processes.tensors_from_first(sent if processes.first else {"other": torch.ones(1)})
assert list(found) == list(sent)
assert all(torch.equal(found[name], sent[name]) and found[name].dtype == sent[name].dtype for name in sent)
print(len(found))
"""
    assert started(["-c", program], free_port) == ["9", "9"]


def test_layers_of_a_sharded_source_are_whole_one_at_a_time(free_port: int) -> None:
    """Whatever comes before or behind a layer: its weights are in parts again as soon as it has been used."""
    program = """
import torch
from types import SimpleNamespace
from torch.distributed.tensor import DTensor
from transmla.healing.prepare import _shard
from transmla.processes import Processes
Processes.current("cpu").wait()
layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2)).requires_grad_(False)
_shard(SimpleNamespace(get_decoder=lambda: SimpleNamespace(layers=layers)))
seen = [isinstance(weight, DTensor) for weight in layers.parameters()]
with torch.no_grad():
    for _ in range(2):
        x = torch.ones(1, 8)
        for layer in layers:
            x = layer(x)
        seen += [isinstance(weight, DTensor) for weight in layers.parameters()]
print(all(seen), len(seen))
"""
    assert started(["-c", program], free_port) == ["True 12"] * 2


def logits(folder: Path) -> torch.Tensor:
    """The weights themselves may differ: a latent has no preferred basis."""
    model = load(folder)
    with torch.no_grad():
        output: torch.Tensor = model(torch.arange(3, 60)[None]).logits
    return output


def test_windows_are_dealt_out() -> None:
    dealt = [Processes(rank, 3).mine(8) for rank in range(3)]
    assert dealt == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert ALONE.mine(3) == [0, 1, 2] and ALONE.first and not Processes(1, 2).first


def test_alone_there_is_nothing_to_wait_for() -> None:
    total = torch.ones(2)
    ALONE.sum_([total])
    ALONE.wait()
    assert torch.equal(total, torch.ones(2)) and ALONE.from_first("x") == "x"
    assert ALONE.tensors_from_first({"x": total})["x"] is total
    assert ALONE.gather({2: "b", 1: "a"}) == {1: "a", 2: "b"}


def test_several_processes_do_not_share_one_gpu() -> None:
    with pytest.raises(TransmlaError, match="cannot share one GPU") as caught:
        Processes(1, 2).device("cuda:1")
    assert caught.value.where == "--device cuda:1" and "--device cuda," in caught.value.remedy
    assert Processes(1, 2).device("cpu") == torch.device("cpu")
