"""transmla report."""

from __future__ import annotations

import click

from transmla.cli.frame import command, errors, option


@command("report", "transmla report out.json bench.json --out page.html --pictures plots")
@click.argument("results", metavar="RESULTS...", nargs=-1, required=True)
@option(
    "--published",
    metavar="FILE",
    group="Also on the page",
    help="JSON rows of other methods: name, bytes_per_token, ratio to the source.",
)
@option("--out", default="report.html", metavar="FILE", group="Output", help="The page; an existing one is replaced.")
@option("--pictures", metavar="DIR", group="Output", help="Also write every figure as PNG and SVG there.")
def report_command(results: tuple[str, ...], out: str, pictures: str | None, published: str | None) -> None:
    """Make one page with tables and pictures of files that `transmla eval --json` and `bench --json` have written."""
    with errors():
        import transmla

        click.echo(transmla.report(results, out, pictures=pictures, published=published))
