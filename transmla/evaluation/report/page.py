"""Result files as one page: no network, light and dark, readable on a phone and on paper."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transmla.checkpoint.destination import check_file, check_folder, disk_errors, write_whole
from transmla.errors import DataError
from transmla.evaluation.report import plots, sections
from transmla.evaluation.report.sections import Picture
from transmla.evaluation.results import Result, frontier_rows, read_published, read_results_and_timings
from transmla.extras import needs


def report(
    results: Sequence[str | Path],
    out: str | Path,
    *,
    pictures: str | Path | None = None,
    published: str | Path | None = None,
) -> Path:
    """Write the page `out` from files of `transmla eval --json` and `transmla bench --json`; returns its path.

    An existing page is replaced.
    pictures:  folder for a PNG and an SVG of every figure
    published: JSON file with rows of other methods for the frontier: name, bytes_per_token, ratio
    Raises `DataError` for other files, `DestinationError`.
    """
    needs("report", "a report")
    check_file(out)  # before the figures, which take a while
    if pictures is not None:
        check_folder(pictures)
    found, timings = read_results_and_timings([Path(path) for path in results])
    if not found:
        raise DataError(
            "nothing to report",
            where="RESULTS",
            why="no file of `transmla eval` was given",
            remedy="give at least one; files of `transmla bench` are shown beside it",
        )
    with plain_labels():
        _write(found, timings, published, Path(out), None if pictures is None else Path(pictures))
    return Path(out)


@contextlib.contextmanager
def plain_labels() -> Iterator[None]:
    """Names of models and files are no formulas, whatever characters they have."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def _write(
    found: list[Result], timings: list[Result], published: str | Path | None, out: Path, pictures: Path | None
) -> None:
    drawn = _figures(found, timings, read_published(published))
    write_whole(out, _page(found, timings, drawn))
    if pictures is not None:
        with disk_errors(pictures):
            pictures.mkdir(parents=True, exist_ok=True)
            for name, (_, figure) in drawn.items():
                figure.savefig(pictures / f"{name}.png", dpi=150, facecolor="white")
                figure.savefig(pictures / f"{name}.svg")


def _figures(
    results: list[Result], timings: list[Result], published: list[dict[str, Any]]
) -> dict[str, tuple[str, Any]]:
    """Name -> (what it shows, figure), of those that there is data for."""
    rows = frontier_rows(results, published)
    made = {
        "frontier": ("Perplexity against cache bytes per token", plots.frontier(rows) if rows else None),
        "positions": ("Perplexity, times the source, by position in the text", plots.positions(results)),
        "recovery": ("Task recovery: score as a share of the source's", plots.recovery(results)),
        "speed": ("Decoding speed against context", plots.speed(timings)),
        "spectrum": ("Energy of keys and values that each layer's latent keeps", plots.spectrum(results)),
        "layers": ("Error of the residual stream behind each layer, held out", plots.layers(results)),
    }
    return {name: (label, figure) for name, (label, figure) in made.items() if figure is not None}


def _page(results: list[Result], timings: list[Result], drawn: dict[str, tuple[str, Any]]) -> str:
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("transmla.evaluation.report", ""), autoescape=True, trim_blocks=True)
    shown = {name: Picture(label, _svg(figure)) for name, (label, figure) in drawn.items()}
    first = results[0].content
    names = ", ".join(result.name for result in results)
    source = ", ".join(sections.sources(results)) or "no source"
    made = first["made"]
    shown_sections = [
        sections.texts(results),
        sections.texts_written(results),
        sections.caches(results, shown),
        sections.tasks(results, shown),
        sections.positions(results, shown),
        sections.speed(timings, shown),
        sections.layers(shown),
        sections.generation(results),
        sections.gates(results),
        sections.provenance(results),
    ]
    content: str = environment.get_template("page.html.jinja").render(
        title=f"{names} beside {Path(source).name}",
        subtitle=f"transmla eval, {made['date']}, {made['dtype']} on {made['device']}. ± is one standard error; ratios "
        "and differences are paired on the same windows and documents.",
        cards=sections.cards(results),
        sections=[section for section in shown_sections if section is not None],
    )
    return content


def _svg(figure: Any) -> str:
    """The drawing without XML prologue; text stays text, and the same figure gives the same characters."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transmla", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
