"""The campaign for a GPU (benchmarks/gpu): what it runs when, what is carried, and its tables. Nothing heavy is run."""

import importlib
import json
import random
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """module(name) of benchmarks/gpu, whose names are ordinary words: forgotten after the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = [path.stem for path in FOLDER.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_the_plan(module: Any) -> None:
    plan = module("plan")
    names = [stage.name for stage in plan.STAGES]
    assert len(set(names)) == len(names) and names[0] == "environment"
    for place, stage in enumerate(plan.STAGES):
        assert stage.least <= stage.estimate <= stage.limit <= 600
        assert stage.after is None or stage.after in names[:place]
    schema = json.loads((FOLDER / "results.schema.json").read_text("utf-8"))
    assert schema["properties"]["stages"]["propertyNames"]["enum"] == names
    assert set(module("stages")._STAGES) == set(module("report")._SECTIONS) == set(names)


def test_what_is_not_started(module: Any) -> None:
    plan = module("plan")
    heal = plan.BY_NAME["heal"]
    assert plan.refusal(heal, 400.0, True, {"convert-96-32"}) is None
    assert "not there" in plan.refusal(heal, 400.0, False, {"convert-96-32"})
    assert "convert-96-32" in plan.refusal(heal, 400.0, True, set())
    assert "s are left" in plan.refusal(heal, heal.least + plan.RESERVE - 1, True, {"convert-96-32"})
    assert plan.allowed(heal, 1000.0) == heal.limit and plan.allowed(heal, 100.0) == 100.0 - plan.RESERVE


@pytest.mark.parametrize("seconds", [120.0, 300.0, 360.0])
def test_healing_fits_into_its_time(module: Any, seconds: float) -> None:
    """By the numbers of the visit in benchmarks/gpu/README.md: 58,100 tokens a second, 51 s besides for 8.06M."""
    tokens = module("plan").healing_tokens(seconds, 58_100)
    assert 0.6 * seconds < 45 + tokens * (1 / 58_100 + 3.2e-6) < seconds


def test_what_heal_reads_of_heal_rate(module: Any, tmp_path: Path) -> None:
    """The best of each way; a way that failed or was left out says nothing."""
    stages, rates = module("stages"), module("rates")
    rows: list[dict[str, Any]] = [
        {"way": name, "windows": windows, "train": train, "compiled": list(compiled)}
        for name, windows, train, compiled in rates.WAYS
    ]
    found = {"plain": [90e3, 100e3], "both": [130e3, 110e3]}
    for row in rows:
        if row["train"] == "attention" and row["compiled"] != ["loss"]:
            row["tokens_per_second"] = found["both" if row["compiled"] else "plain"].pop(0)
        else:
            row["tokens_per_second"] = 1e6  # of no use to heal
    assert not any(found.values())
    (tmp_path / "stages").mkdir()

    def fastest() -> tuple[bool, float]:
        record = json.dumps({"status": "done", "result": {"rows": rows}})
        (tmp_path / "stages" / "heal-rate.json").write_text(record, encoding="utf-8")
        answer: tuple[bool, float] = stages._fastest(SimpleNamespace(out=tmp_path))
        return answer

    assert fastest() == (True, 130e3)
    rows[0] = {**rows[0], "failed": "out of memory"}
    del rows[0]["tokens_per_second"]
    assert fastest() == (True, 130e3)
    for row in rows:
        if row["compiled"]:
            row.pop("tokens_per_second")
    assert fastest() == (False, 100e3)
    rows.clear()
    assert fastest() == stages._fastest(SimpleNamespace(out=tmp_path / "none")) == (False, 55e3)


def test_the_time_is_dealt_out(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that fails costs only itself; what is done is not run again; nothing runs past the end."""
    campaign, clock, started = module("campaign"), [0.0], []
    monkeypatch.setattr(campaign.time, "monotonic", lambda: clock[0])

    def run_stage(stage: Any, args: Namespace, seconds: float) -> dict[str, Any]:
        started.append(stage.name)
        clock[0] += min(stage.estimate, seconds)
        return {"status": "failed" if stage.name == "tests" else "done", "seconds": 1.0, "estimate": stage.estimate}

    monkeypatch.setattr(campaign, "run_stage", run_stage)
    args = Namespace(minutes=5.5, only=None, again=False, source=None, tiny=False, device="cuda", out=tmp_path)
    campaign.run(args)
    first = [stage.name for stage in campaign.STAGES if not stage.source]
    assert started == [name for name in first if name != "graphs"] and clock[0] <= 330
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))
    jsonschema.validate(found, json.loads((FOLDER / "results.schema.json").read_text("utf-8")))
    assert found["stages"]["tests"]["status"] == "failed" and found["stages"]["heal"]["status"] == "skipped"
    # with the model there, and time
    args.source, args.minutes = "smollm2", 30.0
    started.clear()
    campaign.run(args)
    assert started == ["tests", *(stage.name for stage in campaign.STAGES if stage.source or stage.name == "graphs")]


def test_a_stage_is_ended_at_its_limit(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has found until then is kept."""
    campaign = module("campaign")
    found = str(tmp_path / "stages" / "heal.found.json")
    (tmp_path / "campaign.py").write_text(
        "import json, pathlib, time\n"
        f"pathlib.Path({found!r}).write_text(json.dumps({{'result': {{'a': 1}}}}))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(campaign, "HERE", tmp_path)
    args = Namespace(out=tmp_path, device="cpu", tiny=True, source=None, data=None, refine="off")
    record = campaign.run_stage(campaign.BY_NAME["heal"], args, 3.0)
    assert record["status"] == "out of time" and record["result"] == {"a": 1}


def test_parts_are_small_enough_and_whole(module: Any, tmp_path: Path) -> None:
    pack, draw = module("pack"), random.Random(0)
    source = tmp_path / "source"
    source.mkdir()
    sizes = {"model.whl": 2500, "a.whl": 700, "text.txt.xz": 900, "empty": 0, "revision.txt": 13}
    for name, size in sizes.items():
        (source / name).write_bytes(draw.randbytes(size))
    assert pack.split(source, tmp_path, 1000) == 5
    parts = sorted(tmp_path.glob("part-*"))
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= 1000 for part in parts)
    assert {"1-of-1.a.whl", "1-of-1.revision.txt"} <= {file.name for file in parts[0].iterdir()}
    assert pack.join(tmp_path, tmp_path / "joined") == []
    for name in sizes:
        assert (tmp_path / "joined" / name).read_bytes() == (source / name).read_bytes()
    next(parts[-1].iterdir()).unlink()
    assert pack.join(tmp_path, tmp_path / "less") == ["model.whl"]
    assert not (tmp_path / "less" / "model.whl").exists() and (tmp_path / "less" / "a.whl").exists()


def test_bytes_and_multiply_adds(module: Any) -> None:
    """Of the 8B shape at 4 layers: by hand."""
    plan, stages = module("plan"), module("stages")
    gqa = SimpleNamespace(num_hidden_layers=4, num_key_value_heads=8, head_dim=128)
    mla = SimpleNamespace(
        num_hidden_layers=4, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
        num_attention_heads=32, vocab_size=10, hidden_size=7, tie_word_embeddings=False,
    )  # fmt: skip
    assert plan.cache_bytes(gqa, 16, 65536) == 16 * 65536 * 4 * 2048 * 2
    assert plan.cache_bytes(mla, 16, 65536) == 16 * 65536 * 4 * 576 * 2
    assert plan.expanded_bytes(mla, 1, 100) == 100 * 32 * (192 + 128 + 256) * 2
    assert stages.prefill_cost(mla, 1140, 2, 10) == 2 * (1000 * 10 + 70 + 4 * 32 * 320 * 50)


def test_a_conversion_of_more_layers(module: Any) -> None:
    found = module("plan").extrapolated({"tokens": 5.0, "convert layers": 6.0, "verify": 1.0}, 2, 32)
    assert found == {"tokens": 5.0, "convert layers": 96.0, "verify": 16.0}


def test_pages_become_text(module: Any) -> None:
    page = "<html><head><title>x</title></head><body><p>One &amp; two</p><script>no()</script><pre>a\n  b</pre></body>"
    assert module("text").plain(page) == "One & two\n\na\n  b\n"


def test_tables_of_the_dry_run(module: Any) -> None:
    file = FOLDER.parent / "results" / "gpu" / "dry-run.json"
    content = json.loads(file.read_text("utf-8"))
    assert content["tiny"] and content["device"] == "cpu"
    text = module("report").markdown(content)
    assert "dry run" in text and "32 layers, s (extrapolated)" in text
    rate = content["stages"]["heal-rate"]["result"]["rows"][0]
    assert f"| x{1 / rate['of_floor']:.1f} |" in text and rate["of_floor"] < 1
    # every stage that was done has a section
    assert text.count("### ") == sum("result" in record for record in content["stages"].values())
    content["stages"]["heal"]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError):
        module("report").markdown(content)
