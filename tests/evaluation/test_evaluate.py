"""The whole evaluation on stories260k: suites, gates, going on after an interruption, what was left out."""

import functools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch

import transmla
from transmla.cli import main as command_line
from transmla.errors import DataError, RecipeError, UnsupportedError
from transmla.evaluation import measure as measure_module
from transmla.evaluation import tasks as tasks_module
from transmla.evaluation.agreement import agreement, predictions
from transmla.evaluation.compare import judged
from transmla.evaluation.smoke import PROMPTS, smoke
from transmla.evaluation.suite import Suite
from transmla.model.loading import load_any, load_tokenizer, open_model
from transmla.text.sources import read_text

from click.testing import CliRunner  # isort: skip

SETTINGS: dict[str, Any] = {
    "text": ["tinystories-valid", "wikitext-valid"], "windows": 3, "length": 64, "quantised": [8, 2], "positions": 1,
    "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "mla"
    transmla.convert("smoke", folder, refine="off")
    return folder


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two greedy texts of a few tokens, where a person wants to read eight."""
    monkeypatch.setattr(measure_module, "smoke", functools.partial(smoke, prompts=PROMPTS[:2], max_new_tokens=16))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("suite") / "mine.toml"
    path.write_text("agreement = true\nsmoke = true\ngeneration = 12\n[gates]\nperplexity = 0.5\n")
    return str(path)


def shape(value: Any, path: str = "") -> Iterator[str]:
    """Every path in a result with the type of what is there; elements of lists are alike, and so are texts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from shape(inner, f"{path}/{'TEXT' if path.endswith('/texts') else key}")
    elif isinstance(value, list) and value:
        for inner in value:
            yield from shape(inner, f"{path}[]")
    else:
        yield f"{path} {type(value).__name__}"


def test_all_parts_and_their_comparison(converted: Path, suite: str) -> None:
    report = transmla.evaluate(converted, "stories260k", suite=suite, **SETTINGS)
    plain = json.loads(json.dumps(report.plain(), allow_nan=False))
    schema = json.loads((Path(measure_module.__file__).parent / "results.schema.json").read_text())
    jsonschema.validate(plain, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plain | {"model": plain["model"] | {"nats": []}}, schema)
    golden = Path(__file__).parent / "golden" / "result.txt"
    assert re.fullmatch(r"[0-9a-f]{12}\+?", plain["made"].pop("commit") or "0" * 12)  # none where git is not
    if os.environ.get("TRANSMLA_GOLDEN"):
        golden.write_text("\n".join(sorted(set(shape(plain)))) + "\n", encoding="utf-8")
    assert sorted(set(shape(plain))) == golden.read_text("utf-8").splitlines()
    assert list(plain["model"]["texts"]) == SETTINGS["text"]
    assert plain["model"]["cache_bytes_per_token"] * 2 == plain["source"]["cache_bytes_per_token"]
    # five layers of 24 values in 8 or 2 bits and 8 in 8, four bytes for the grid of either
    sizes = [row["bytes_per_token"] for row in plain["model"]["quantised"]]
    assert sizes == [5 * (24 + 8 + 8), 5 * (6 + 8 + 8)]
    kinds = [row and row["cache"] for row in plain["source"]["quantised"]]
    assert kinds == ["KIVI 8 bits", "rotated 8 bits", "KIVI 2 bits", "rotated 2 bits"]
    own = report.perplexity.nats
    assert sum(plain["model"]["quantised"][0]["nats"]) / 3 == pytest.approx(own, abs=0.01)
    assert sum(plain["model"]["quantised"][1]["nats"]) / 3 > own + 0.002
    assert plain["model"]["positions"]["edges"] == [0, 512]
    agreed = plain["comparison"]["agreement"]
    assert 0 < agreed["kl"]["value"] < 1 and 0.5 < agreed["top1"]["value"] < 1
    pair = [load_any(name, dtype="float32") for name in (converted, "stories260k")]
    ids_NT = measure_module.windows_of(SETTINGS["text"][0], load_tokenizer(converted), 64, 3)
    own, base = (predictions(one, ids_NT) for one in pair)
    assert agreed["kl"]["value"] == pytest.approx(agreement(own, base).kl.value, rel=1e-4)
    assert agreed["kl"]["value"] != pytest.approx(agreement(base, own).kl.value, rel=1e-3)
    assert plain["comparison"]["acceptance"]["greedy"]["value"] < 0.99, "every model accepts its own likeliest tokens"
    assert plain["comparison"]["texts"]["tinystories-valid"]["ratio"] == pytest.approx(report.ratio.value)
    assert [gate["name"] for gate in plain["gates"]] == ["perplexity tinystories-valid", "perplexity wikitext-valid"]
    assert all(gate["passed"] == (gate["found"] >= 0.5) for gate in plain["gates"])
    assert plain["model"]["smoke"]["num_empty"] == 0 and plain["skipped"] == []


def test_an_evaluation_goes_on_where_it_was(
    converted: Path, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "results.json.partial"
    whole = transmla.evaluate(converted, "stories260k", suite=suite, **SETTINGS)
    measured: list[str] = []
    real = measure_module.perplexity

    def stopping(model: Any, *args: Any, **kwargs: Any) -> Any:
        measured.append(type(model).__name__)
        if len(measured) == 8:
            raise KeyboardInterrupt
        return real(model, *args, **kwargs)

    monkeypatch.setattr(measure_module, "perplexity", stopping)
    with pytest.raises(KeyboardInterrupt):
        transmla.evaluate(converted, "stories260k", suite=suite, kept=kept, **SETTINGS)
    assert kept.is_file()
    again = transmla.evaluate(converted, "stories260k", suite=suite, kept=kept, **SETTINGS)
    # six of the source and four of the model, none twice but the one that was interrupted
    assert len(measured) == 11
    assert again.plain() == whole.plain()


def test_the_source_is_taken_from_an_earlier_result(
    converted: Path, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"positions": None, "quantised": None}
    first = transmla.evaluate(converted, "stories260k", suite=suite, **settings)
    earlier = tmp_path / "first.json"
    earlier.write_text(json.dumps(first.plain()))
    measured: list[str] = []
    real = measure_module.perplexity
    monkeypatch.setattr(
        measure_module, "perplexity", lambda model, *args, **kwargs: (
            measured.append(type(model).__name__), real(model, *args, **kwargs))[1],
    )  # fmt: skip
    again = transmla.evaluate(converted, "stories260k", suite=suite, reuse=earlier, **settings)
    assert again.plain() == first.plain() and set(measured) == {"DeepseekV3ForCausalLM"}
    # of a task that has no error, JSON has null
    row = {"task": "wikitext", "metric": "word_perplexity", "value": 20.0, "standard_error": None, "values": []}
    row["higher_is_better"] = False
    content = first.plain()
    content["source"]["tasks"] = [row]
    earlier.write_text(json.dumps(content))
    again = transmla.evaluate(converted, "stories260k", suite=suite, reuse=earlier, **settings)
    assert again.source is not None and math.isnan(again.source["tasks"][0]["standard_error"])
    assert again.plain()["source"]["tasks"] == [row] and "word_perplexity" not in str(again)
    again.model["tasks"] = again.source["tasks"]
    assert "20.0000 ± ?" in str(again), str(again)
    with pytest.raises(RecipeError, match="another way"):
        transmla.evaluate(converted, "stories260k", suite=suite, reuse=earlier, **settings | {"windows": 2})
    with pytest.raises(DataError, match="not a result file"):
        transmla.evaluate(converted, "stories260k", suite=suite, reuse=tmp_path / "none.json", **settings)


def test_a_reused_source_was_measured_on_the_same_text(converted: Path, tmp_path: Path) -> None:
    """Texts of one name in two folders are two, and a file that has changed is another."""
    content = read_text("tinystories-valid", 9000, evaluation=True)
    texts = [tmp_path / folder / "valid.txt" for folder in ("a", "b")]
    for number, path in enumerate(texts):
        path.parent.mkdir()
        path.write_text(content[3000 * number :])
    given: dict[str, Any] = {"windows": 2, "length": 32, "dtype": "float32", "gates": {"perplexity": 0.5}}
    given["text"] = list(map(str, texts))
    first = transmla.evaluate(converted, "stories260k", **given)
    names = [f"perplexity {path}" for path in texts]
    assert [gate.name for gate in first.gates] == ["perplexity valid.txt"] * 2 and first.source is not None, names
    losses = [found["nats"] for found in first.source["texts"].values()]
    assert len(losses) == 2 and losses[0] != losses[1]
    earlier = tmp_path / "first.json"
    earlier.write_text(json.dumps(first.plain()))
    assert list(first.plain()["source"]["texts"]) == ["valid.txt", "valid.txt (2)"]
    again = transmla.evaluate(converted, "stories260k", reuse=earlier, **given)
    assert again.ratio == first.ratio and again.plain() == first.plain()
    # a text that the source was not measured on passes no gate
    content = first.plain()
    del content["source"]["texts"]["valid.txt (2)"]
    earlier.write_text(json.dumps(content))
    assert [gate.passed for gate in transmla.evaluate(converted, "stories260k", reuse=earlier, **given).gates] == [
        True,
        False,
    ]
    texts[0].write_text(read_text("wikitext-valid", 3000, evaluation=True))
    with pytest.raises(RecipeError, match="not be measured on the same tokens"):
        transmla.evaluate(converted, "stories260k", reuse=earlier, **given)


def test_a_text_that_changed_is_measured_anew(converted: Path, tmp_path: Path) -> None:
    text, kept = tmp_path / "mine.txt", tmp_path / "partial"
    content = read_text("tinystories-valid", 9000, evaluation=True)
    given: dict[str, Any] = {"text": str(text), "windows": 2, "length": 32, "dtype": "float32", "kept": kept}
    text.write_text(content)
    before = transmla.evaluate(converted, **given).perplexity
    text.write_text(content[3000:])
    assert transmla.evaluate(converted, **given).perplexity != before


def test_models_of_another_tokenizer_are_not_compared(converted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(open_model("stories260k").path, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(content))
    given: dict[str, Any] = {"windows": 2, "length": 32, "dtype": "float32", "text": "tinystories-valid"}
    with pytest.raises(RecipeError, match="the tokenizers of mla and other differ"):
        transmla.evaluate(converted, other, **given)
    transmla.evaluate(other, **given)


def test_windows_are_no_longer_than_the_context(converted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(converted, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings.pop("model_max_length")
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    given: dict[str, Any] = {"windows": 1, "dtype": "float32", "text": "tinystories-valid"}
    report = transmla.evaluate(other, "stories260k", **given)
    assert report.made["length"] == 512 and report.suite["length"] == 0
    with pytest.raises(RecipeError, match="was made for 512 tokens"):
        transmla.evaluate(other, length=513, **given)


def test_parts_of_other_settings_are_measured_anew(converted: Path, tmp_path: Path) -> None:
    kept = tmp_path / "partial"
    kept.write_text(json.dumps({"settings": {"suite": "another"}, "parts": {f"{converted} cache": 1.0}}))
    report = transmla.evaluate(converted, windows=2, length=32, dtype="float32", kept=kept)
    assert report.model["cache_bytes_per_token"] == 640


def test_what_cannot_be_measured_is_named(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short.txt"
    short.write_text(read_text("tinystories-valid", 6000, evaluation=True)[:6000])
    report = transmla.evaluate(converted, text=[str(short), "missing.txt"], windows=2, length=32, positions=999)
    assert {(one.part, one.model) for one in report.skipped} == {("text missing.txt", str(converted))}
    assert list(report.model["texts"]) == [str(short)]
    assert 0 < len(report.model["positions"]["nats"]) < 10, "as many windows as there are"
    # building lm-eval's own takes a quarter of a minute
    monkeypatch.setattr(tasks_module, "_indexed", lambda *_: SimpleNamespace(all_tasks=["piqa"]))
    with pytest.raises(DataError, match="no task 'pica'"):
        transmla.evaluate(converted, tasks=["pica"], windows=2, length=32)
    monkeypatch.setattr("transmla.extras.find_spec", lambda module: None if module == "nltk" else module)
    with pytest.raises(UnsupportedError, match="--needles needs packages that are not installed"):
        transmla.evaluate(converted, needles=[64], windows=2, length=32)
    with pytest.raises(DataError, match=r"no text 'missing.txt'"):
        transmla.evaluate(converted, text=["missing.txt"], windows=2, length=32)


def test_behind_the_begin_token(converted: Path, tmp_path: Path) -> None:
    """By default eval is what a plain loop gives on the raw text; with the option, the same tokens are scored."""
    settings = {"text": "tinystories-valid", "windows": 2, "length": 32, "dtype": "float32"}
    tokenizer, model = load_tokenizer("stories260k"), load_any("stories260k", dtype="float32")
    content = read_text("tinystories-valid", 2000, evaluation=True)
    raw_NT = torch.tensor(tokenizer(content, add_special_tokens=False).input_ids[:64]).view(2, 32)
    begun_NT = raw_NT.clone()
    begun_NT[:, 0] = tokenizer.bos_token_id
    found = {}
    for begin, ids_NT in ((False, raw_NT), (True, begun_NT)):
        with torch.no_grad():
            wanted = model(ids_NT, labels=ids_NT).loss
        report = transmla.evaluate(converted, "stories260k", begin=begin, **settings)
        assert report.source is not None
        assert sum(report.source["texts"]["tinystories-valid"]["nats"]) / 2 == pytest.approx(float(wanted), rel=1e-5)
        assert report.made["begin"] == [tokenizer.bos_token_id] * begin and report.suite["begin"] == begin
        found[begin] = report.source["texts"]["tinystories-valid"]["nats"]
    assert abs(found[True][1] - found[False][1]) > 1e-3
    assert transmla.evaluate(converted, **settings).suite["begin"] is False
    result = CliRunner().invoke(
        command_line, ["eval", "stories260k", "--begin", "--windows", "1", "--length", "16", "-q"]
    )
    assert "behind the begin token (1)" in result.output, result.output


def test_a_gate_of_a_suite_is_changed_alone(converted: Path, tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text("generation = 8\n[gates]\nperplexity = 1.9\nloops = 0.01\n")
    given: dict[str, Any] = {"text": "tinystories-valid", "windows": 2, "length": 32, "dtype": "float32"}
    report = transmla.evaluate(converted, "stories260k", suite=str(path), gates={"perplexity": 0.1}, **given)
    assert {gate.name: gate.wanted for gate in report.gates} == {"perplexity tinystories-valid": 0.1, "loops": 0.01}
    given |= {"suite": str(path), "generation": 0}  # nothing is written, so there is nothing to judge
    (gate,) = transmla.evaluate(converted, "stories260k", gates={"perplexity": 0.1}, **given).gates
    assert gate.name == "perplexity tinystories-valid"
    with pytest.raises(RecipeError, match="gate loops"):
        transmla.evaluate(converted, "stories260k", **given)


def test_a_gate_that_was_not_measured_is_missed(converted: Path, suite: str) -> None:
    given: dict[str, Any] = {"windows": 2, "length": 32, "dtype": "float32"}
    report = transmla.evaluate(
        converted, "stories260k", text=["tinystories-valid", "missing.txt"],
        gates={"perplexity": 0.1}, **given,
    )  # fmt: skip
    assert {gate.name: gate.passed for gate in report.gates} == {
        "perplexity tinystories-valid": True, "perplexity missing.txt": False,
    }  # fmt: skip
    gates = {"perplexity": 0.1, "needles": 0.5, "tasks": 0.5, "loops": 0.5}
    asked = Suite(texts=("tinystories-valid",), gates=gates, tasks=("piqa",), needles=(64,), generation=8)
    assert report.source is not None
    judgement = judged(asked, report.model, report.source, ())
    assert {gate.name: gate.passed for gate in judgement} == {
        "perplexity tinystories-valid": True, "needles 64": False, "tasks piqa": False, "loops": False,
    }  # fmt: skip
    for kind, option in (("needles", "--needles"), ("tasks", "--tasks"), ("loops", "--generation")):
        with pytest.raises(RecipeError, match=f"gate {kind}") as refused:
            transmla.evaluate(converted, "stories260k", gates={kind: 0.5}, **given)
        assert refused.value.remedy is not None and option in refused.value.remedy
    assert "perplexity missing.txt: not measured" in " ".join(str(report).split())
    alone = transmla.evaluate(converted, suite=suite, **given)
    assert alone.gates == () and [one.part for one in alone.skipped] == ["gates"]
    with pytest.raises(RecipeError, match="gates need a source"):
        transmla.evaluate(converted, gates={"perplexity": 0.5}, **given)


def test_folders_called_alike(converted: Path, tmp_path: Path) -> None:
    names = [tmp_path / "src" / "stories", tmp_path / "out" / "stories"]
    for name, folder in zip(names, (open_model("stories260k").path, converted), strict=True):
        shutil.copytree(folder, name)
    given = SETTINGS | {"windows": 2, "text": ["tinystories-valid"], "quantised": []}
    shown = str(transmla.evaluate(names[1], names[0], **given))
    assert len(re.findall(r"^stories \(source\)  ", shown, re.MULTILINE)) == 2
    assert len(re.findall(r"^stories   ", shown, re.MULTILINE)) == 2 and re.search(r"^ratio  ", shown, re.MULTILINE)
    shown = str(transmla.bench(names[1], names[0], contexts=[16], steps=2, repeats=1))
    assert shown.count("stories") == 2 and shown.count("(source)") == 1


def test_command_line(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    words = ["eval", str(converted), "--against", "stories260k", "--windows", "3", "--length", "64", "-q"]
    words += ["--text", "tinystories-valid", "--text", "wikitext-valid", "--quantised", "4", "--positions", "1"]
    done = CliRunner().invoke(command_line, [*words, "--json", str(out), "--gate", "perplexity=0.99"])
    assert done.exit_code == 5 and "gates missed" in done.stderr
    for shown in (
        "KIVI 4 bits",
        "int4 cache",
        "wikitext-valid",
        "perplexity by position",
        "ratio",
        "gate missed",
    ):
        assert shown in done.stdout
    assert json.loads(out.read_text())["format"] == 1 and [path.name for path in tmp_path.iterdir()] == ["results.json"]
    done = CliRunner().invoke(command_line, [*words, "--gate", "perplexity=0.1"])
    assert done.exit_code == 0 and "gate passed" in done.stdout
    for wrong, text in ((["--needles", "many"], "whole numbers"), (["--gate", "perplexity"], "share")):
        done = CliRunner().invoke(command_line, [*words, *wrong])
        assert done.exit_code != 0 and text in done.stderr
