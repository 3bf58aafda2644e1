"""Write what the documents take from the program: the reference of commands and calls, tables, the frontier.

    python docs/tools/reference.py

cli.md and python.md are written whole. In README.md and docs/, what stands between `<!-- NAME -->` and `<!-- end -->`
is replaced where NAME is one of `BLOCKS`. tests/test_documents.py says when this has to be run again. Blocks with the
output of commands are those of benchmarks/tour.py.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import click
from times import read_times, time_of

import transmla
from tests.families import sparse_source
from transmla.cli import SECTIONS, main
from transmla.cli.help import Command
from transmla.conversion.needs import layer_values
from transmla.conversion.plan import Plan
from transmla.evaluation.results import FrontierRow, frontier_rows, read_published, read_results
from transmla.recipe import Healing, Recipe, find_recipe, load_recipe

RESULTS = ROOT / "eval" / "results"
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))

# cache, as frontier_rows names it -> how people read it
CACHES = {
    "source, as stored": "source, bf16",
    "source, KIVI 4 bits": "source, 4 bits (KIVI)",
    "source, KIVI 2 bits": "source, 2 bits (KIVI)",
    "source, KVTC-like 1 bits": "source, transform coded to 1 bit",
    "smollm2-160-32-full-packed, as stored": "**converted, 160 + 32** (half), `--refine full`",
    "smollm2-160-32-full-packed, int4": "**converted, 160 + 32**, its latent at 4 bits (`int4`)",
    "smollm2-160-32-full-coded, coded2": "**converted, 160 + 32**, prepared and coded to 2 bits",
    "smollm2-96-32-fast, as stored": "**converted, 96 + 32** (a third), `--refine fast`",
    "smollm2-96-32-full, as stored": "**converted, 96 + 32**, `--refine full`",
    "smollm2-32-16-full, as stored": "**converted, 32 + 16** (an eighth), `--refine full`",
    "TransMLA (FreqFold 4), 96+32, no training": "TransMLA's conversion, 96 + 32, without training",
}
ON_GPU = "**converted, 96 + 32**, `fast`, healed on 8M tokens (GPU)"
# what the picture says at a point
LABELS = {
    "source, as stored": "source, bf16",
    "source, KIVI 8 bits": "KIVI, 8 bits",
    "source, KIVI 4 bits": "KIVI, 4 bits",
    "source, KIVI 3 bits": "KIVI, 3 bits",
    "source, KIVI 2 bits": "KIVI, 2 bits",
    "source, rotated 2 bits": "rotated, 2 bits",
    "source, KVTC-like 2 bits": "transform coded, 2 bits",
    "source, KVTC-like 1 bits": "transform coded, 1 bit",
    "source, KVTC-like 0.75 bits": "transform coded, 0.75 bits",
    "smollm2-160-32-full-packed, as stored": "160+32",
    "smollm2-160-32-full-packed, int8": "160+32, int8",
    "smollm2-160-32-full-packed, int4": "160+32, int4",
    "smollm2-160-32-full-packed, int2": "160+32, int2",
    "smollm2-160-32-full-coded, coded3.3": "160+32, coded3.3",
    "smollm2-160-32-full-coded, coded2": "160+32, coded2",
    "smollm2-160-32-full-coded, coded1": "160+32, coded1",
    "smollm2-96-32-full, as stored": "96+32",
}
TEXTS = {
    "160 + 32, `fast`": "smollm2-160-32-fast", "160 + 32, `full`": "smollm2-160-32-full-packed",
    "96 + 32, `fast`": "smollm2-96-32-fast", "96 + 32, `full`": "smollm2-96-32-full",
    "32 + 16, `fast`": "smollm2-32-16-fast", "32 + 16, `full`": "smollm2-32-16-full",
    "32 + 16, healed on 0.3M tokens": "smollm2-32-16-healed",
}  # fmt: skip
# recipes of the table of sizes; their times are in benchmarks/results/times.json
SIZES = ("smollm2-135m", "llama-3.2-1b", "llama-3-8b", "llama-3.1-70b")


def frontier() -> list[FrontierRow]:
    """Every measured cache of SmolLM2, and the published ones."""
    results = read_results(sorted(path for path in RESULTS.glob("smollm2-*.json") if _is_result(path)))
    return frontier_rows(results, read_published(ROOT / "benchmarks" / "results" / "published.json"))


def _is_result(path: Path) -> bool:
    return "bench" not in path.stem and "long" not in path.stem


def results_table() -> str:
    rows = {row.name: row for row in frontier()}
    healed = json.loads((ROOT / "benchmarks/results/gpu/smollm2-96-32.json").read_text("utf-8"))["quality healed"]
    found = healed["result"]["wikitext2-valid.raw"]
    lines = {}
    for name, label in CACHES.items():
        row = rows[name]
        error = f" ± {row.ratio_error:.3f}" if row.ratio_error > 0 else ""
        value = "1" if row.group == "source" else f"{row.ratio:.3f}{error}"
        lines[label] = (row.bytes_per_token, f"| {label} | {row.bytes_per_token:,.0f} | {value} |")
    size = rows["smollm2-96-32-fast, as stored"].bytes_per_token
    text = f"| {ON_GPU} | {size:,.0f} | {found['ratio']:.3f} ± {found['standard_error']:.3f} |"
    lines[ON_GPU] = (size, text)
    ordered = sorted(lines.values(), key=lambda line: -line[0])
    head = ["| cache | bytes per token | perplexity, times the source |", "|---|---:|---:|"]
    return "\n".join([*head, *(line for _, line in ordered)])


def texts_table() -> str:
    head = ["| | WikiText-2 | C4 | TinyStories | Python code |", "|---|---:|---:|---:|---:|"]
    texts = ("wikitext2-valid.raw", "c4-sample.jsonl", "tinystories-valid.txt", "stdlib-code.txt")
    lines = []
    for label, name in TEXTS.items():
        compared = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["comparison"]["texts"]
        cells = (f"{compared[text]['ratio']:.3f} ± {compared[text]['standard_error']:.3f}" for text in texts)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*head, *lines])


def tasks_table() -> str:
    content = json.loads((RESULTS / "smollm2-160-32-full.json").read_text("utf-8"))
    source = {(row["task"], row["metric"]): row["value"] for row in content["source"]["tasks"]}
    head = ["| task | metric | source | converted | difference |", "|---|---|---:|---:|---:|"]
    lines = []
    for row in content["comparison"]["tasks"]:
        if row["standard_error"] is None:
            continue
        key = (row["task"], row["metric"])
        value = source[key] + row["difference"]
        name = row["task"].removeprefix("local_")
        error = f"{row['difference']:+.2f} ± {row['standard_error']:.2f}"
        lines.append(f"| {name} | {row['metric']} | {source[key]:.2f} | {value:.2f} | {error} |")
    return "\n".join([*head, *lines])


def sizes_table() -> str:
    head = ["| model | cached values | memory | disk | time |", "|---|---:|---:|---:|---|"]
    lines, plans = [], {name: _planned(name) for name in SIZES}
    works = {
        name: float(layer_values(found.source, found.family) * found.recipe.num_tokens) for name, found in plans.items()
    }
    layers = {name: found.gqa.num_hidden_layers for name, found in plans.items()}
    for name, found in plans.items():
        size = f"{found.mla.kv_lora_rank}+{found.mla.qk_rope_head_dim}"
        values = f"{found.gqa.cache_values():,} -> {found.mla.cache_values()} ({size})"
        needs = " | ".join(f"{value / 2**30:,.1f} GiB" for value in (found.memory_bytes, found.disk_bytes))
        time = time_of(name, works, layers, read_times())
        lines.append(f"| {name} | {values} | {needs} | {time} |")
    return "\n".join([*head, *lines])


def _planned(recipe: str) -> Plan:
    path = find_recipe(recipe)
    assert path is not None
    model = load_recipe(path).model
    assert model is not None
    with tempfile.TemporaryDirectory() as folder:
        return transmla.plan(str(sparse_source(Path(folder) / "model", model.config)), recipe=recipe)


def tensor_parallel_table() -> str:
    """What a rank caches: key/value heads are split, or copied where there are fewer than ranks."""
    head = ["| source | values | 512+64 | TP 2 | TP 4 | TP 8 |", "|---|---:|---:|---:|---:|---:|"]
    lines = []
    for label, heads in (("Llama-3-8B, 8 KV heads of 128", 8), ("Llama-2-7B, 32 KV heads of 128", 32)):
        values = 2 * heads * 128
        ranks = " | ".join(f"{values // min(heads, number):,} -> 576" for number in (2, 4, 8))
        lines.append(f"| {label} | {values:,} | 576 | {ranks} |")
    return "\n".join([*head, *lines])


BLOCKS: dict[str, Callable[[], str]] = {
    "results": results_table,
    "texts": texts_table,
    "tasks": tasks_table,
    "sizes": sizes_table,
    "tensor-parallel": tensor_parallel_table,
}


def cli_reference() -> str:
    """docs/cli.md"""
    parts = [
        "# Commands\n",
        "Written by `docs/tools/reference.py` from the program's own help. `transmla COMMAND --help` says the same; "
        "[completion](quickstart.md#install), [exit codes](faq.md#how-do-i-script-it).\n",
    ]
    for heading, names in SECTIONS.items():
        known = [name for name in names if name in main.commands]
        parts.append(f"| {heading} | |\n|---|---|")
        parts += [f"| [`{name}`](#{name}) | {_first(main.commands[name])} |" for name in known]
        parts.append("")
    for names in SECTIONS.values():
        parts += [_command(name, main.commands[name]) for name in names if name in main.commands]
    return "\n".join(parts).rstrip() + "\n"


def _first(command: click.Command) -> str:
    return command.get_short_help_str(500)


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"transmla {name}")
    lines = [f"## {name}\n", f"```text\n{' '.join(command.get_usage(context).split())}\n```\n"]
    lines += [f"{_escaped(' '.join(part.split()))}\n" for part in inspect.cleandoc(command.help or "").split("\n\n")]
    groups = command.groups(context) if isinstance(command, Command) else {"Options": command.get_params(context)}
    for heading, parameters in groups.items():
        records = (parameter.get_help_record(context) for parameter in parameters)
        rows = [record for record in records if record is not None and "--help" not in record[0]]
        if rows:
            lines.append(f"| {heading} | |\n|---|---|")
            lines += [f"| `{option.replace('|', '¦')}` | {_escaped(text)} |" for option, text in rows]
            lines.append("")
    if isinstance(command, Command) and command.examples:
        lines.append("```bash\n" + "\n".join(command.examples) + "\n```\n")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def python_reference() -> str:
    """docs/python.md"""
    parts = [
        "# Python\n",
        "Written by `docs/tools/reference.py` from the docstrings. Everything is in `transmla` and is imported on "
        "first use; errors are those of `transmla.errors`, and reports print as the tables of the command line.\n",
        "```python\n" + _example() + "\n```\n",
    ]
    for name in (name for name in transmla.__all__ if not name.startswith("_")):
        parts.append(_documented(name, getattr(transmla, name), level=2))
    parts.append(
        "# Settings\n\nWhat `settings` and `overrides` of the calls above take, and what the tables of a recipe hold. "
        "Names in capitals are constants of `transmla.recipe`.\n"
    )
    parts += [_settings(Recipe, "convert, plan"), _settings(Healing, "heal")]
    parts.append("# Reports\n")
    for report in _reports():
        parts.append(_documented(report.__name__, report, level=2))
    parts.append("# Errors\n")
    parts.append(f"```text\n{inspect.cleandoc(__import__('transmla.errors', fromlist=['x']).__doc__)}\n```\n")
    return "\n".join(parts).rstrip() + "\n"


def _example() -> str:
    doc = inspect.cleandoc(transmla.__doc__ or "")
    return inspect.cleandoc("\n".join(line for line in doc.splitlines() if line.startswith("    ")))


def _reports() -> list[type]:
    from transmla.conversion.flow import ConversionReport
    from transmla.conversion.listing import FamilyRow, RecipeRow
    from transmla.conversion.plan import Plan
    from transmla.evaluation.evaluate import EvaluationReport
    from transmla.evaluation.speed import BenchReport
    from transmla.healing.flow import HealReport
    from transmla.targets.doctor import Diagnosis
    from transmla.targets.export import ExportReport
    from transmla.targets.quantise import QuantiseReport
    from transmla.targets.verify import Check, Verified

    return [
        Plan, ConversionReport, EvaluationReport, BenchReport, HealReport, Diagnosis, ExportReport, QuantiseReport,
        Verified, Check, FamilyRow, RecipeRow,
    ]  # fmt: skip


def _settings(thing: type, calls: str) -> str:
    """The fields of a dataclass with the comments that explain them, without those that only files have."""
    lines = inspect.getsource(thing).splitlines()
    fields = [line.strip() for line in lines if re.match(r"    [a-z_]+: .+ = ", line)]
    shown = [line for line in fields if line.partition(":")[0] not in ("state", "model", "heal")]
    head = f"## {thing.__name__} ({', '.join(f'`{call}`' for call in calls.split(', '))})\n"
    return f"{head}\n```python\n{chr(10).join(shown)}\n```\n"


def _documented(name: str, thing: Any, level: int) -> str:
    lines = [f"{'#' * level} {name}\n"]
    if inspect.isclass(thing):
        known = [key for key, _ in _fields(thing)]
        fields = "\n".join(f"{key}: {kind}" for key, kind in _fields(thing))
        lines.append(f"```python\n{fields}\n```\n")
    else:
        known = list(inspect.signature(thing).parameters)
        lines.append(f"```python\n{_signature(name, thing)}\n```\n")
    lines += list(_paragraphs(inspect.cleandoc(thing.__doc__ or ""), known))
    return "\n".join(lines)


def _fields(thing: type) -> Iterator[tuple[str, str]]:
    for key, kind in inspect.get_annotations(thing).items():
        yield key, str(kind)


def _signature(name: str, thing: Any) -> str:
    parameters = []
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        parameters.append(_parameter(parameter))
    inner = "".join(f"\n    {parameter}," for parameter in parameters)
    returned = inspect.signature(thing).return_annotation
    return f"transmla.{name}({inner}{chr(10) if inner else ''}) -> {returned}"


def _parameter(parameter: inspect.Parameter) -> str:
    """As it is written in the source, where annotations are words and defaults are values."""
    kind, default = parameter.annotation, parameter.default
    words = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    bare = str(parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty))
    return f"{bare}: {words}" + ("" if default is inspect.Parameter.empty else f" = {default!r}")


def _paragraphs(doc: str, known: list[str]) -> Iterator[str]:
    """Prose as it is; `name: words`, with what is indented below, as a list.

    known: what may be explained behind a semicolon, so that `default: ...` stays a part of the sentence
    """
    items: list[str] = []
    name = "|".join(known)
    for paragraph in doc.split("\n\n"):
        for line in paragraph.splitlines():
            pairs = re.split(rf";  ?(?=(?:{name})(?:, (?:{name}))*: )", line)
            for number, pair in enumerate(pairs):
                named = (
                    re.match(r"([a-z_]\w*(?:, [a-z_]\w*)*):\s+(\S.*)", pair)
                    if number or pair == pair.lstrip()
                    else None
                )
                if named:
                    names = ", ".join(f"`{name}`" for name in named[1].split(", "))
                    items.append(f"- {names}: {named[2]}")
                elif line.startswith("  ") and items:
                    items[-1] += " " + pair.strip()
                else:
                    items.append(pair.strip())
        yield _listed(items) + "\n"
        items = []


def _listed(items: list[str]) -> str:
    """Lines of prose run on; a list has empty lines around it."""
    text = ""
    was_item = False
    for item in items:
        is_item = item.startswith("- ")
        gap = "" if not text else "\n\n" if is_item != was_item else "\n"
        text += gap + item
        was_item = is_item
    return text


def filled(page: str) -> str:
    """A page with its blocks as they should be."""
    for name, make in BLOCKS.items():
        if f"<!-- {name} -->" in page:
            block = f"<!-- {name} -->\n{_made(name, make)}\n<!-- end -->"
            pattern = re.compile(rf"<!-- {name} -->.*?<!-- end -->", re.DOTALL)
            page = pattern.sub(lambda _, new=block: new, page)
    return page


_KEPT: dict[str, str] = {}


def _made(name: str, make: Callable[[], str]) -> str:
    if name not in _KEPT:
        _KEPT[name] = make()
    return _KEPT[name]


def draw_frontier(out: Path) -> None:
    """docs/frontier.png: the caches of `LABELS`, named."""
    from transmla.evaluation.report import plots

    rows = [row for row in frontier() if row.name in LABELS]
    figure = plots.frontier(rows, LABELS)
    figure.savefig(out, dpi=150, facecolor="white")


def write() -> None:
    (DOCS / "cli.md").write_text(cli_reference(), encoding="utf-8")
    (DOCS / "python.md").write_text(python_reference(), encoding="utf-8")
    for page in PAGES:
        text = page.read_text("utf-8")
        page.write_text(filled(text), encoding="utf-8")
    draw_frontier(DOCS / "frontier.png")


if __name__ == "__main__":
    write()
