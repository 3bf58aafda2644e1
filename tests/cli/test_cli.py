"""The command line: help, errors with their exit codes, and that each command is the documented Python call."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer

import transmla
from transmla.checkpoint.resolve import resolve
from transmla.cli import main
from transmla.cli.frame import source_of


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
        (("plan", "stories260k", "--latent", "auto", "--budget", "2"), 2, ["did you mean 2%?"]),
        (("convert", "stories260k", "--latent", "auto", "--budget", "1.5"), 2, ["did you mean 1.5%?"]),
        (("plan", "stories260k", "--latent", "auto"), 10, ["belong together", "--budget 2%"]),
        (("convert", "stories260k", "--latent", "auto", "--budget", "-2%"), 10, ["budget must be positive"]),
        (("eval", "stories260k", "--length", "2000000"), 10, ["was made for 512 tokens", "--length 512"]),
        (("eval", "stories260k", "--limit", "3"), 2, ["--limit", "--tasks"]),
        (("generate", "stories260k", "hello", "--chat"), 1, ["chat template"]),
        (("generate", "stories260k", "hello", "--temperature", "nan"), 2, ["--temperature", "is not a number"]),
        (("generate", "stories260k", "hello", "--top-p", "nan"), 2, ["--top-p", "is not a number"]),
        (("convert", "stories260k", "--calibration", ""), 10, ["calibration names a text"]),
        (("convert", "stories260k", "--calibration", "./nothing.txt"), 7, ["no such file", "check the path"]),
        (("convert", "stories260k", "--window", "5000"), 10, ["5,000 tokens", "--window 512"]),
        (("plan", "stories260k", "--json", "./folder/"), 8, ["name of a folder"]),
        (("report", "nothing.json", "--out", "no folder/page.html"), 8, ["mkdir -p '", "no folder'"]),
        (("report", "nothing.json", "--out", "."), 8, ["it is a folder", "name of a file"]),
        (("plan", "x" * 300), 3, ["not found"]),
        (("doctor", "x" * 300), 3, ["not found"]),
        (("eval", "x" * 300), 3, ["not found"]),
        (("eval", "~nobody-of-this-name/x"), 3, ["no such folder"]),
        (("convert", "stories260k", "x" * 250), 8, ["File name too long"]),
        (("convert", "stories260k", "--calibration", "~nobody-of-this-name/x.txt"), 7, ["no such file"]),
        # a dry run checks what the work would stop at
        (("convert", "stories260k", "--dry-run", "--calibration", "wikitxt"), 7, ["no text 'wikitxt'"]),
        (("convert", "stories260k", "--dry-run", "--device", "cuda:99"), 1, ["cuda:99 cannot be used"]),
        (("convert", "stories260k", "stories260k"), 8, ["has the name of a source", "stories260k-mla"]),
        (("export", "stories260k", "out.gguf"), 3, ["name of a source", "transmla convert stories260k"]),
        (("eval", "nothing-of-this-name"), 3, ["the model was not found"]),
        (("eval", "stories260k", "--gate", "foo=1"), 2, ["no gate 'foo'", "loops"]),
        (("eval", "stories260k", "--quantised", "5,2.5"), 10, ["no cache has so many bits", "--coded-source"]),
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


def test_a_text_that_is_too_short_has_its_exit_code(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time")
    result = run("eval", "stories260k", "--text", short)
    assert result.exit_code == 7 and "too short" in result.output, result.output


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


def test_plan_is_of_the_form_that_is_asked_for() -> None:
    for asked in ("deepseek_v3", "transmla"):
        assert json.loads(run("plan", "stories260k", "--format", asked, "--json").stdout)["format"] == asked
    refused = run("plan", "stories260k", "--lossy")
    assert refused.exit_code == 10 and "has no biases" in refused.output


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("convert", "stories260k", "--dry-run")
    assert result.exit_code == 0
    assert "would write stories260k-mla-24-8" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_generate_has_no_prompt_in_front_of_it() -> None:
    result = run("generate", "nothing-of-this-name", "Once upon a time")
    assert (result.exit_code, result.stdout) == (3, "") and "not found" in result.stderr


def test_verify_says_who_reads_a_file(tmp_path: Path) -> None:
    (tmp_path / "a b.gguf").write_bytes(b"GGUF")
    result = run("verify", tmp_path / "a b.gguf")
    assert result.exit_code == 4 and "verify checks folders" in result.output
    assert f"transmla doctor '{tmp_path / 'a b.gguf'}'" in result.output


@pytest.mark.parametrize("budget", ["2%", "0.02"])
def test_the_budget_is_named_before_the_work(budget: str) -> None:
    for command in (("plan", "stories260k"), ("convert", "stories260k", "--dry-run")):
        shown = run(*command, "--latent", "auto", "--budget", budget).stdout
        assert re.search(r"increase of perplexity +at most 2\.0%", shown), shown


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


def test_nobody_reads_on(converted: Path) -> None:
    """As behind `| head -1`: the thread that generates ends before the process, which it would abort otherwise."""
    command = [sys.executable, "-m", "transmla", "generate", str(converted), "Once", "--max-new-tokens", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.read(6)
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1

    pieces = transmla.generate(converted, "Once", max_new_tokens=400)
    next(pieces)
    pieces.close()
    assert not any("(work)" in thread.name for thread in threading.enumerate())


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


@pytest.mark.parametrize("command", [None, *main.commands])
def test_help_fits_80_columns(command: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*([command] if command else []), "--help")
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= 80
    assert command or "..." not in result.stdout.replace("[ARGS]...", ""), "no sentence is cut off"
    assert command is None or "\nExamples:\n  " in result.stdout


def test_commands_are_in_order_of_use() -> None:
    text = run("--help").stdout
    places = [text.index(f"\n  {name} ") for name in ("plan", "convert", "heal", "eval", "doctor", "unfold", "recipes")]
    assert places == sorted(places)


def test_options_stand_under_headings() -> None:
    text = run("convert", "--help").stdout
    assert text.index("Size of the cache:") < text.index("--latent") < text.index("Calibration text:")
    assert text.index("--tokens") < text.index("Machine:") < text.index("--device")


def test_too_few_tokens_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("convert", "stories260k", "--tokens", "100")
    assert result.exit_code == 7 and "--tokens 1024" in result.output and list(tmp_path.iterdir()) == []
    mixed = run("plan", "stories260k", "--recipe", "smoke")
    assert mixed.exit_code == 0


def test_json_means_the_same_everywhere(converted: Path, tmp_path: Path) -> None:
    file = tmp_path / "made.json"
    given = {
        "plan": ["stories260k"], "doctor": [converted], "recipes": [], "families": [],
        "convert": ["stories260k", tmp_path / "out", "--dry-run"], "export": [converted, tmp_path / "m.gguf"],
        "eval": [converted, "--windows", "2", "--length", "32", "-q"],
        "bench": [converted, "--context", "8", "--steps", "1", "--repeats", "1", "-q"],
    }  # fmt: skip
    for command, arguments in given.items():
        alone = run(command, *arguments, "--json")
        assert alone.exit_code == 0 and json.loads(alone.stdout), command
        (tmp_path / "m.gguf").unlink(missing_ok=True)
        beside = run(command, *arguments, "--json", file)
        assert beside.exit_code == 0 and type(json.loads(file.read_text())) is type(json.loads(alone.stdout)), command
        assert beside.stdout and not beside.stdout.startswith(("{", "[")), command


def test_a_json_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, words in (("nowhere/a.json", "mkdir -p"), ("file/a.json", "no folder"), ("", "it is a folder")):
        result = run("convert", "smoke", tmp_path / "out", "-q", "--json", tmp_path / name)
        assert result.exit_code == 8 and words in result.stderr and not (tmp_path / "out").exists()


def test_json_goes_into_a_pipe_by_its_name(converted: Path) -> None:
    command = [sys.executable, "-m", "transmla", "doctor", str(converted), "--json", "/dev/stderr"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stderr)["form"] == "folder" and not done.stdout.startswith("{")


def test_an_evaluation_keeps_nothing_beside_a_device(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, kept = transmla.evaluate, []

    def evaluate(*args: Any, **given: Any) -> Any:
        kept.append(given["kept"])
        return measure(*args, **given)

    monkeypatch.setattr("transmla.evaluation.evaluate.evaluate", evaluate)
    options = ["--windows", "2", "--length", "32", "-q", "--against", "none", "--json", os.devnull]
    assert run("eval", converted, *options).exit_code == 0 and kept == [None]


def test_the_source_is_found_in_the_provenance(converted: Path, tmp_path: Path) -> None:
    given = ("--windows", "2", "--length", "32", "-q", "--json")
    found = run("eval", converted, *given)
    assert "against stories260k" in found.stderr
    assert json.loads(found.stdout)["source"]["name"] == "stories260k"
    # a folder is looked for beside the result as well, wherever the command runs
    here = tmp_path / "here"
    shutil.copytree(converted, here)
    shutil.copytree(str(resources.files("transmla.data") / "stories260k"), tmp_path / "my-model")
    for name in ("my-model", "./elsewhere/my-model"):
        content = json.loads((here / "transmla.json").read_text())
        content["source"] |= {"name": name, "revision": None}
        (here / "transmla.json").write_text(json.dumps(content))
        assert Path(source_of(str(here), None) or "") == tmp_path / "my-model"
    alone = run("eval", converted, "--against", "none", *given)
    assert json.loads(alone.stdout)["source"] is None
    moved = tmp_path / "moved"
    shutil.copytree(converted, moved)
    provenance = json.loads((moved / "transmla.json").read_text())
    provenance["source"]["name"] = "./was-here"
    (moved / "transmla.json").write_text(json.dumps(provenance))
    result = run("eval", moved, *given)
    assert "was-here, is not here" in result.stderr and json.loads(result.stdout)["source"] is None


def test_doctor_on_a_file_and_on_a_source(converted: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    transmla.export(converted, file, type="q8_0")
    found = transmla.doctor(file)
    assert (found.form, found.geometry, found.values_per_token, found.dtype) == ("gguf", "24+8", 32, "q8_0")
    assert [verdict.engine for verdict in found.engines if verdict.accepts] == ["llama.cpp"]
    source = transmla.doctor("stories260k")
    assert (source.form, source.engines) == ("source", transmla.plan("stories260k").engines)
    assert "not converted" in run("doctor", "stories260k").stdout
    assert run("doctor", tmp_path / "none").exit_code == 3
    assert run("doctor", tmp_path / "none.gguf").exit_code == 3


def test_names_with_brackets_are_shown_as_they_are(converted: Path, tmp_path: Path) -> None:
    """They are no markup."""
    model, source = tmp_path / "m[red]", tmp_path / "s[red]"
    shutil.copytree(converted, model)
    shutil.copytree(resolve("stories260k").path, source)
    quick = ("--against", "none", "--text", "tinystories-valid", "--windows", 1, "--length", 64, "-q")
    for words in (("doctor", model), ("plan", source), ("eval", model, *quick)):
        result = run(*words)
        assert result.exit_code == 0 and Path(str(words[1])).name in result.stdout, result.output
    result = run("convert", "stories260k", tmp_path / "out[red]", "--dry-run")
    assert "out[red]" in result.stdout.replace("\n", "")


def test_prompts_keep_their_spacing(converted: Path) -> None:
    for prompt in ("Once upon", "Once upon a time,"):
        pieces = transmla.generate(converted, prompt, max_new_tokens=8, temperature=0)
        assert next(pieces).startswith(" "), "a word of its own"


def test_reports_print_as_their_tables(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for command, report in (("plan", transmla.plan("stories260k")), ("doctor", transmla.doctor(converted))):
        name = "stories260k" if command == "plan" else converted
        printed = [line.rstrip() for line in run(command, name).stdout.splitlines()]
        assert str(report).splitlines() == printed
        assert "<pre" in report._repr_html_() and "llama.cpp" in report._repr_html_()
    assert "Plan(" in repr(transmla.plan("stories260k"))


def test_no_word_is_broken_at_80_columns(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for args in (
        ("plan", "llama"), ("doctor", converted), ("recipes",), ("families",),
        ("eval", converted, "-q", "--windows", "2", "--length", "32", "--quantised", "8,4"),
        ("bench", converted, "-q", "--context", "8,64", "--steps", "1", "--repeats", "1"),
    ):  # fmt: skip
        if args[0] == "plan":
            args = ("plan", "stories260k")
        seen = {}
        for columns in (80, 200):
            monkeypatch.setenv("COLUMNS", str(columns))
            seen[columns] = run(*args).stdout
        assert max(len(line.rstrip()) for line in seen[80].splitlines()) <= 80
        # numbers are measured anew
        broken = {word for word in seen[80].split() if word.isalpha()} - set(re.findall(r"\w+", seen[200]))
        assert broken <= {"fix", "time", "to", "the", "first", "token", "and", "floor", "in", "a", "wider", "window",
                          "or", "with"}, broken  # fmt: skip


def test_a_step_wrecks_the_folded_form_and_trains_the_unfolded_one(converted: Path, tmp_path: Path) -> None:
    """What README, card and docs warn of: the stock class says nothing."""
    transmla.unfold(converted, tmp_path / "train")
    text = (resources.files("transmla.data") / "stories.txt").read_text("utf-8")[:4000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(converted)(text).input_ids[:512]).view(2, 256)

    def step(model: Any) -> tuple[float, float]:
        before = model(ids, labels=ids).loss
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        before.backward()
        optimizer.step()
        with torch.no_grad():
            return float(before), float(model(ids, labels=ids).loss)

    before, after = step(AutoModelForCausalLM.from_pretrained(converted))
    assert after > before + 1
    same, better = step(transmla.load(tmp_path / "train"))
    assert same == pytest.approx(before, rel=1e-3) and better < same


def test_the_package_says_what_it_has() -> None:
    assert transmla.__version__ == metadata.version("transmla")
    assert set(transmla.__all__) <= set(dir(transmla))
    assert all(getattr(transmla, name) is not None for name in transmla.__all__)


def test_options_that_messages_name_exist() -> None:
    """Of this program; the others belong to other programs."""
    known = {name for command in main.commands.values() for parameter in command.params for name in parameter.opts}
    others = {
        "--merge",
        "--model-impl",
        "--always",
        "--exclude",
        "--abbrev",
        "--dirty",
        "--version",
        "--help",
        "--num_processes",
        "--model-path",
        "--model",
        "--prompt",
        "--kv-cache-dtype",
        "--attention-backend",
        "--max-model-len",
        "--tensor-parallel-size",
    }
    for path in sorted(Path(transmla.__file__).parent.rglob("*.py")):
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", path.read_text("utf-8")))
        assert named <= known | others, f"{path.name}: {named - known - others}"
    assert "--context" in run("bench", "x", "--context", "0").stderr


def test_tasks_say_nothing_of_their_own(converted: Path, tmp_path: Path) -> None:
    """stderr of a process: other libraries write there, and git where there is no repository."""
    rows = [{"query": "Once upon a", "choices": [" time", " fish"], "gold": 0}] * 2
    (tmp_path / "tiny.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(f"""task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "tiny.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}]
""")
    command = [sys.executable, "-m", "transmla", "eval", str(converted), "--against", "none", "--windows", "1"]
    options = ["--length", "16", "--dtype", "float32", "--tasks", "tiny_choices", "--include-path", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(Path(transmla.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([*command, *options], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "tiny_choices" in found.stdout, found.stderr
    said = [line for line in found.stderr.splitlines() if line]
    assert all(line.startswith(("tinystories-valid mla", "tasks mla: tiny_choices")) for line in said), said
