"""Where there is no GPU, the tests with a device run on a pretended one as well, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
HERE = "TRANSMLA_TEST_PRETENDED"
pretended = pytest.mark.skipif(HERE not in os.environ, reason=f"{HERE} makes the device")


@pytest.mark.skipif(HERE in os.environ, reason="this is the process")
def test_everything_is_where_it_has_to_be() -> None:
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this release of torch has no devices that are written in Python")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "pretended", "tests"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {HERE: "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 40, done.stdout[-1000:]


@pretended
def test_the_pretended_device_is_strict() -> None:
    from tests.pretended import NAME, Pretended

    with Pretended():
        there, here = torch.ones(2, 3, device=NAME), torch.ones(2, 3)
        assert there.device.type == (there + 1).device.type == there.T.device.type == NAME and here.device.type == "cpu"
        assert (
            torch.equal((there * torch.tensor(2.0)).cpu(), 2 * here)
            and there[torch.tensor([0, 1])].tolist() == [[1] * 3] * 2
        )
        there[0].add_(here.to(NAME)[0])
        assert there.tolist() == [[2] * 3, [1] * 3] and here.copy_(there).sum() == 9
        linear = torch.nn.Linear(3, 1).to(NAME)
        linear(there).sum().backward()
        assert linear.weight.grad is not None and linear.weight.grad.tolist() == [[3.0] * 3]
        for mixed in (
            lambda: there + here, lambda: there @ here.T, lambda: torch.cat([there, here]), lambda: linear(here),
            lambda: here[torch.tensor([0], device=NAME)], lambda: there.copy_(here).mul_(here),
            lambda: torch.rand(2, generator=torch.Generator(), device=NAME),
            lambda: torch.nn.functional.embedding(torch.tensor(0), there),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="expected"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
