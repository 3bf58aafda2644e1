"""The documents say what the program does: links lead somewhere, commands exist, and what is written by a command is
what it would write now."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

import transmla
from transmla.cli import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [*sorted((ROOT / "benchmarks").rglob("*.md")), ROOT / "eval" / "results" / "README.md"]


def words(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "tools" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 160


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=words)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=words)
def test_commands_and_options_exist(page: Path) -> None:
    for line in re.findall(r"(?:^|`|\$ |&& |-m )(transmla [a-z]+ [^`\n#]*)", page.read_text("utf-8"), re.MULTILINE):
        given = shlex.split(line.replace("...", ""), comments=True)
        if given[1] not in main.commands:
            assert given[1] in ("is", "then"), line
            continue
        known = {name for parameter in main.commands[given[1]].params for name in parameter.opts} | {"--help"}
        for word in given[2:]:
            if word in (";", "then", "|", "&&"):
                break
            assert not word.startswith("--") or word in known, line


def test_the_reference_is_what_one_writes(reference: ModuleType) -> None:
    """Strings keep their quotes, only parameters are listed as such, and every call's settings and result are there."""

    def call(text: str = "gguf", *, count: "int | None" = None, **settings: object) -> None:
        """What it does.

        text:  of it;  count: how many; default: all of them
        """

    found = reference._documented("call", call, level=2)
    assert "    text: str = 'gguf',\n    *,\n    count: int | None = None,\n    **settings: object,\n" in found
    assert "- `text`: of it\n- `count`: how many; default: all of them" in found
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    for words in ("## Verified", "## QuantiseReport", "## FamilyRow", "## RecipeRow", "q_latent: int", "lora: int"):
        assert words in page, words


def test_pages_from_the_code_are_up_to_date(reference: ModuleType) -> None:
    """Otherwise: python docs/tools/reference.py"""
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == reference.cli_reference()
    assert (ROOT / "docs" / "python.md").read_text("utf-8") == reference.python_reference()


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- " in page.read_text("utf-8")], ids=words)
def test_tables_of_results_are_up_to_date(page: Path, reference: ModuleType) -> None:
    """Otherwise: python docs/tools/reference.py"""
    text = page.read_text("utf-8")
    assert reference.filled(text) == text
    shortened = re.sub(r"(<!-- (?:results|sizes|texts|tasks|tensor-parallel) -->\n).*\n", r"\1", text)
    assert shortened == text or reference.filled(shortened) == text, "a block that has changed is written again"


@pytest.mark.parametrize("command", ["plan stories260k", "doctor stories260k-mla-24-8"])
def test_what_is_printed_without_measuring(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise: python benchmarks/tour.py"""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    name, _, folder = command.partition(" ")
    if name == "doctor":
        transmla.convert("stories260k", folder, refine="off", tokens=2048, theta=1e4)
    lines = [line.rstrip() for line in CliRunner().invoke(main, command.split()).stdout.splitlines()]
    shown = [page for page in PAGES if f"<!-- {name} -->" in page.read_text("utf-8")]
    assert shown and len(lines) > 10
    for page in shown:
        block = page.read_text("utf-8").partition(f"<!-- {name} -->\n```text\n")[2].partition("\n```\n<!-- end -->")[0]
        assert block.splitlines() == [f"$ transmla {command}", *lines]


def test_times_that_nobody_measured_are_called_projected(reference: ModuleType) -> None:
    """Twice the layers take twice what grows with them; other shapes in proportion to what a layer costs."""
    times = {
        "whole": [{"recipe": "small", "machine": "2 CPU cores", "seconds": 615}],
        "layers": [
            {"recipe": "large", "machine": "GPU", "layers": 2, "spent": {"tokens": 100.0, "convert layers": 60.0}}
        ],
    }
    works, layers = {"small": 1.0, "large": 10.0, "huge": 100.0}, {"small": 2, "large": 4, "huge": 80}
    large = "about 4 min (GPU) projected from 2 layers; about 3.4 h (2 CPU cores) projected from small"
    assert reference.time_of("large", works, layers, times) == large
    huge = "about 6.7 h (GPU) projected from 2 layers of large; about 28 days (2 CPU cores) projected from small"
    assert reference.time_of("huge", works, layers, times) == huge
    small = "10 min (2 CPU cores); about 106 s (GPU) projected from 2 layers of large"
    assert reference.time_of("small", works, layers, times) == small
    measured = times | {"layers": [], "whole": [*times["whole"], {"recipe": "small", "machine": "GPU", "seconds": 56}]}
    large = "about 3.4 h (2 CPU cores), 19 min (GPU) projected from small"
    assert reference.time_of("large", works, layers, measured) == large
    assert reference.time_of("huge", works, layers, {"whole": [], "layers": []}) == "not measured"
