"""The page: holds every number, needs no network, and is the same for the same results."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import transmla
from transmla.cli import main
from transmla.errors import DataError, DestinationError, UnsupportedError
from transmla.evaluation.report.plots import frontier
from transmla.evaluation.results import frontier_rows, frontier_table, read_results

TEXT = "texts/a <b>.txt"


def model(name: str, nats: list[float], size: float, **others: Any) -> dict[str, Any]:
    text = {"nats": nats, "num_tokens": 300, "length": 100}
    return {"name": name, "converted": False, "cache_bytes_per_token": size, "texts": {TEXT: text}} | others


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """What `eval` writes, by hand; the source's name would be markup if it were not escaped."""
    task = {"task": "piqa", "metric": "acc", "higher_is_better": True, "values": []}
    content = {
        "format": 1,
        "made": {"date": "2026-11-22", "dtype": "bfloat16", "device": "cpu", "length": 100, "versions": {"torch": "2"}},
        "suite": {},
        "source": model(
            "<source>", [2.0, 2.2], 640.0,
            quantised=[{"bits": 4, "bytes_per_token": 200.0, "nats": [2.01, 2.22]}],
            positions={"edges": [0, 512, 1024], "nats": [[2.0, 1.9]]},
            tasks=[task | {"value": 0.7, "standard_error": 0.01}],
        ),
        "model": model(
            "mla", [2.1, 2.31], 320.0,
            quantised=[{"bits": 4, "cache": "int4", "bytes_per_token": 100.0, "nats": [2.15, 2.35]}, None],
            positions={"edges": [0, 512, 1024], "nats": [[2.1, 2.2]]},
            tasks=[task | {"value": 0.6, "standard_error": None}],
            layers=[{"stream_loss_heldout": error, "latent_loss": 10 * error} for error in (0.01, 0.02)],
            smoke={"num_empty": 0, "repeated": 0.25, "continuations": [
                {"prompt": "Once", "text": " upon & a time", "num_tokens": 4, "repeated": 0.25}]},
        ),
        "comparison": {
            "texts": {TEXT: {"ratio": 1.111, "standard_error": 0.0022}},
            "agreement": {
                "kl": {"value": 0.0512, "standard_error": 0.001}, "top1": {"value": 0.9, "standard_error": 0.01},
            },
            "tasks": [{"task": "piqa", "metric": "acc", "recovery": 0.857, "difference": -0.1, "standard_error": None}],
        },
        "gates": [
            {"name": "perplexity", "wanted": 0.9, "found": 0.9, "passed": True},
            {"name": "piqa", "wanted": 0.9, "found": None, "passed": False},
        ],
        "skipped": [{"model": "mla", "part": "needles", "why": "no wonderwords"}],
    }  # fmt: skip
    path = tmp_path / "mla-24-8.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def timing(tmp_path: Path) -> Path:
    """What `bench` writes, by hand; the last context did not fit."""
    rows = [
        {
            "model": name, "batch": 1, "context": context, "first_token_seconds": 0.25,
            "prefill_tokens_per_second": 2048.0, "tokens_per_second": 21.5 * ratio, "slowest": 20.0 * ratio,
            "fastest": 22.0 * ratio, "speed_ratio": ratio, "cache_bytes_per_token": 640.0, "floor_seconds": 0.01,
            "of_floor": 4.5, "peak_bytes": None, "failed": None,
        }
        for context in (512, 2048) for name, ratio in (("source", 1.0), ("mla", 1.5))
    ]  # fmt: skip
    failed = dict.fromkeys(rows[0]) | {"model": "mla", "batch": 1, "context": 8192, "failed": "out of memory"}
    setting = {"dtype": "bfloat16", "device": "cpu", "device_name": "cpu", "threads": 2, "steps": 4, "repeats": 3}
    content = {
        "rows": [*rows, failed], "rates": {"multiply_adds": 2e11, "bytes": 2.0**31}, "notes": [],
        "setting": setting | {"versions": {}},
    }  # fmt: skip
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(content))
    return path


class Page(HTMLParser):
    """Tags in order, their attributes, and the text that is shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_every_number_is_on_the_page(result: Path, timing: Path, tmp_path: Path) -> None:
    out = transmla.report([result, timing], tmp_path / "page.html", pictures=tmp_path / "pictures")
    page = Page(out.read_text("utf-8"))
    assert page.open == []
    for shown in (
        "-50.0%", "×1.111", "1.1110 ± 0.0022", "0.0512", "90.0%", "source, 4 bits, simulated", "mla-24-8, int4",
        "85.7%", "-0.1000 ± ?", "512-1,024", "upon & a time", "no wonderwords", "passed", "missed", "a <b>.txt",
        "2026-11-22", "32.2 (30.0-33.0)", "1.50", "2,048", "out of memory", "200 G/s", "2.0 GiB/s",
    ):  # fmt: skip
        assert shown in page.shown, shown
    drawn = ("frontier", "positions", "recovery", "speed", "spectrum", "layers")
    names = {f"{name}.{ending}" for name in drawn for ending in ("png", "svg")}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names


def test_what_a_budget_holds_is_on_the_page(result: Path, timing: Path, tmp_path: Path) -> None:
    content = json.loads(timing.read_text())
    held = {
        "model": "mla", "cache": "latent-int4", "context": 4096, "texts": 77, "tokens": 77 * 4096,
        "bytes_per_text": 654321, "tokens_per_second": 12.5, "slowest": 11.5, "fastest": 13.5, "speed_ratio": 1.75,
        "remark": None,
    }  # fmt: skip
    counted = held | dict.fromkeys(("tokens_per_second", "slowest", "fastest", "speed_ratio")) | {"remark": "counted"}
    timing.write_text(json.dumps(content | {"rows": [], "budget": {"bytes": 3 * 2**29, "rows": [held, counted]}}))
    page = Page(transmla.report([result, timing], tmp_path / "page.html").read_text("utf-8"))
    for shown in ("1.5 GiB of caches", "latent-int4", "77", "654,321", "12.5 (11.5-13.5)", "1.75", "counted"):
        assert shown in page.shown, shown
    assert "times the roofline" not in page.shown


def test_the_page_stands_alone_and_is_reproducible(result: Path, timing: Path, tmp_path: Path) -> None:
    first, second = (
        transmla.report([result, timing], tmp_path / name).read_text("utf-8") for name in ("a.html", "b.html")
    )
    assert first == second
    links = [value for key, value in Page(first).attributes if key in ("src", "href", "xlink:href")]
    assert all(value and value.startswith("#") for value in links)
    assert "<script" not in first and "@import" not in first and "url(http" not in first
    assert "prefers-color-scheme: dark" in first and 'lang="en"' in first and "@media print" in first
    assert len(re.findall("aria-label=", first)) == 6 and str(tmp_path) not in first


def test_the_page_is_the_golden_one(result: Path, timing: Path, tmp_path: Path) -> None:
    """Apart from the drawings, which change with every matplotlib. `TRANSMLA_GOLDEN=1 pytest` writes it anew."""
    page = transmla.report([result, timing], tmp_path / "page.html").read_text("utf-8")
    found = re.sub(r"<svg.*?</svg>", "<svg></svg>", page, flags=re.DOTALL)
    golden = Path(__file__).parent / "golden" / "report.html"
    if os.environ.get("TRANSMLA_GOLDEN"):
        golden.write_text(found, encoding="utf-8")
    assert found == golden.read_text("utf-8")


def test_frontier_rows(result: Path) -> None:
    rows = frontier_rows(read_results([result]), [{"name": "other", "bytes_per_token": 320.0, "ratio": 3.0}])
    assert [(row.name, row.group) for row in rows] == [
        ("source, as stored", "source"), ("mla-24-8, as stored", "converted"), ("other", "published"),
        ("source, 4 bits, simulated", "source, quantised"), ("mla-24-8, int4", "converted, quantised"),
    ]  # fmt: skip
    assert rows[1].ratio == pytest.approx(2.718281828**0.105, rel=1e-6)
    assert "| other | 320 | 24.50 | 3.0000 |" in frontier_table(rows)


def test_sources_are_kept_apart(result: Path, tmp_path: Path) -> None:
    """Each ratio is to its own source, no row replaces another, no line joins what is not comparable."""
    paths = [result]
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    given = (
        ("again", "<source>", 320.0, [2.2, 2.4]), ("a/other", "big", 80.0, [2.5, 2.6]),
        ("b/other", "<source>", 200.0, [2.7, 2.8]), ("c/other", "<source>", 100.0, [2.9, 3.0]),
    )  # fmt: skip
    for name, source, size, nats in given:
        content = json.loads(result.read_text())
        content["source"]["name"] = source
        content["model"] |= model("m", nats, size, quantised=[])
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    rows = frontier_rows(read_results(paths))
    stored = [(row.name, row.source) for row in rows if "stored" in row.name]
    assert sorted(stored) == [
        ("<source>, as stored", "<source>"), ("a/other, as stored (big)", "big"),
        ("again, as stored (<source>)", "<source>"), ("b/other, as stored (<source>)", "<source>"),
        ("big, as stored", "big"), ("c/other, as stored (<source>)", "<source>"),
        ("mla-24-8, as stored (<source>)", "<source>"),
    ]  # fmt: skip
    (axes,) = frontier(rows).axes
    joined = [list(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_linestyle() == "-"]
    converted = {row.name: (row.bytes_per_token, row.ratio) for row in rows if row.group == "converted"}
    assert [converted[f"{name}, as stored (<source>)"] for name in ("mla-24-8", "b/other", "c/other")] in joined
    assert [converted["a/other, as stored (big)"]] in joined
    # there is a better one of that size
    assert not any(converted["again, as stored (<source>)"] in line for line in joined)
    drawn = [(bars[0].get_color(), bars[0].get_marker()) for bars in axes.containers]
    assert len(set(drawn)) == len(drawn) == 7
    published = [{"name": "elsewhere", "bytes_per_token": 100.0, "ratio": 3.0}]
    assert "| elsewhere | 100 | - | 3.0000 |" in frontier_table(frontier_rows(read_results(paths), published))


def test_positions_of_another_context_are_not_compared(result: Path, tmp_path: Path) -> None:
    content = json.loads(result.read_text())
    content["source"]["positions"] = {"edges": [0, 512], "nats": [[2.0]]}
    result.write_text(json.dumps(content))
    page = Page(transmla.report([result], tmp_path / "page.html").read_text("utf-8"))
    assert "512-1,024" in page.shown and "times the source, by position" not in page.shown


def test_timings_alone_are_no_report(timing: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to report"):
        transmla.report([timing], tmp_path / "page.html")
    content = json.loads(timing.read_text())
    del content["rows"][0]["failed"]
    timing.write_text(json.dumps(content))
    with pytest.raises(DataError, match="not a result file"):
        transmla.report([timing], tmp_path / "page.html")


def test_what_is_no_result(tmp_path: Path, result: Path) -> None:
    for content in ("{", "[]", '{"format": 0}'):
        path = tmp_path / "other.json"
        path.write_text(content)
        with pytest.raises(DataError, match="not a result file"):
            transmla.report([result, path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    for content in ("{", '[{"name": "a"}]', "7", '[{"name": "a", "bytes_per_token": "b", "ratio": 1}]'):
        path.write_text(content)
        with pytest.raises(DataError, match="published rows"):
            transmla.report([result], tmp_path / "page.html", published=path)
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(DataError, match="nothing to report"):
        transmla.report([], tmp_path / "page.html")


def test_a_folder_for_pictures_that_cannot_be_one(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything is drawn or written."""
    monkeypatch.setattr("transmla.evaluation.report.page._figures", lambda *_: pytest.fail("drawn"))
    for folder in (result, result / "below"):
        with pytest.raises(DestinationError, match=f"{result.name} is no folder"):
            transmla.report([result], tmp_path / "page.html", pictures=folder)
    assert not (tmp_path / "page.html").exists()


def test_what_is_not_installed_is_named(result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transmla.extras.find_spec", lambda module: None if module == "matplotlib" else module)
    with pytest.raises(UnsupportedError, match=r"pip install 'transmla\[report\]'"):
        transmla.report([result], tmp_path / "page.html")
    # whose files are read where [eval] is installed, which has no figures
    assert read_results([result])


def test_command_line(result: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["report", str(result), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "page.html")
    assert CliRunner().invoke(main, ["report", str(tmp_path / "none.json")]).exit_code == 7
