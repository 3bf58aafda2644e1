"""The command line: help, errors with their exit codes, and that each command is the documented Python call."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

import transmla
from transmla.cli import main


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260k through the command line, with the smallest recipe."""
    target = tmp_path_factory.mktemp("cli") / "mla"
    result = run("convert", "smoke", target, "-q")
    assert result.exit_code == 0, result.output
    for word in ("-50.0%", "8-bit", "4-bit", "held-out", "verified", "peak memory", "1.2 MiB"):
        assert word in result.stdout
    return target


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, transmla.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", list(main.commands))
def test_every_option_is_explained(command: str) -> None:
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{command} {parameter.name} has no help text"
            shown = parameter.show_default or "[default:" in parameter.help
            assert shown or parameter.is_flag, f"{command} {parameter.name} does not show its default"
    assert "Exit codes" in run(command, "--help").output


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("plan", "./nothing-here"), 3, ["where:", "why:", "fix:"]),
        (("plan", "stories260k", "--rope", "3"), 6, ["--rope 2"]),
        (("plan", "stories260k", "--latent", "65"), 6, ["--latent 64"]),
        (("plan", "stories260k", "--recipe", "nothing.toml"), 10, ["stories260k"]),
        (("convert", "stories260k", "--calibration", "nothing"), 7, ["self", "wikitext"]),
        (("convert", "stories260k", "--calibration", "tinystories-valid"), 7, ["validation"]),
        (("convert", "stories260k", "--theta", "fast"), 2, ["--theta"]),
        (("plan", "stories260k", "--latent", "1.5"), 2, ["--latent", "neither an integer nor auto"]),
        (("plan", "stories260k", "--latent", "auto", "--budget", "little"), 2, ["--budget", "not a number"]),
        (("plan", "stories260k", "--latent", "auto"), 10, ["belong together", "--budget 2%"]),
        (("convert", "stories260k", "--latent", "auto", "--budget", "-2%"), 10, ["budget must be positive"]),
        (("eval", "stories260k", "--length", "2000000"), 7, ["too short"]),
        (("generate", "stories260k", "hello", "--chat"), 1, ["chat template"]),
    ],
)
def test_errors_have_their_exit_code(
    args: tuple[str, ...], code: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == code, result.output
    assert all(word in result.output for word in words), result.output
    assert list(tmp_path.iterdir()) == []


def test_existing_destination_is_refused_before_anything_is_read(converted: Path) -> None:
    before = sorted((file.name, file.stat().st_mtime_ns) for file in converted.iterdir())
    result = run("convert", "smoke", converted)
    assert result.exit_code == 8
    assert str(converted) in result.output
    assert sorted((file.name, file.stat().st_mtime_ns) for file in converted.iterdir()) == before


def test_plan_prints_the_same_numbers_in_both_forms() -> None:
    plan = transmla.plan("stories260k")
    assert json.loads(run("plan", "stories260k", "--json").stdout) == plan.summary()
    text = run("plan", "stories260k").stdout
    for row in plan.cache:
        assert f"{row.bytes_per_token:,.0f}" in text
    for verdict in plan.engines:
        assert verdict.engine in text


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("convert", "stories260k", "--dry-run")
    assert result.exit_code == 0
    assert "would write stories260k-mla-24-8" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_eval_is_the_python_call(converted: Path) -> None:
    given = {"windows": 3, "length": 64, "dtype": "float32"}
    options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    printed = json.loads(run("eval", converted, "--against", "stories260k", "--json", "-", "-q", *options).stdout)
    report = transmla.evaluate(converted, "stories260k", **given)  # type: ignore[arg-type]
    assert printed == report.plain() | {"made": printed["made"]}
    assert list(printed["model"]["texts"]) == ["tinystories-valid"], "the recipe's text is the default"
    # 5 layers x (24 + 8) and x 64 values of 4 bytes
    assert printed["model"]["cache_bytes_per_token"] == 640
    assert printed["source"]["cache_bytes_per_token"] == 1280
    table = run("eval", converted, "--against", "stories260k", "-q", *options).stdout
    assert f"{report.perplexity.value:.3f} ± {report.perplexity.standard_error:.3f}" in table
    assert "8-bit cache" in table and " 340 " in table


def test_generate_streams_the_models_own_text(converted: Path) -> None:
    result = run("generate", converted, "Once upon a time", "--max-new-tokens", "12", "--temperature", "0")
    assert result.exit_code == 0
    pieces = "".join(transmla.generate(converted, "Once upon a time", max_new_tokens=12, temperature=0))
    assert result.stdout == "Once upon a time" + pieces + "\n"
    assert len(pieces) > 5


def test_out_of_memory_is_said_in_words(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("transmla.evaluation.evaluate.evaluate", full)
    result = run("eval", converted)
    assert result.exit_code == 1 and "out of memory" in result.stderr and "--device cpu" in result.stderr

    def wrong(*_: object, **__: object) -> None:
        raise RuntimeError("shapes of memory and batch size differ")

    monkeypatch.setattr("transmla.evaluation.evaluate.evaluate", wrong)
    assert isinstance(run("eval", converted).exception, RuntimeError)
