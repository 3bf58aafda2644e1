"""What refinement has brought, step by step: the curve of training losses that conversions keep.

    python benchmarks/refine_curve.py MODEL-A MODEL-B --out benchmarks/results/refine.png

Reads transmla.json of converted folders (or such files themselves) that were refined as one block. A window is measured
before the step that uses it; rings are held-out windows, before and after, none of which skips positions. Where a
curve still falls at the end, more steps would help; where it is flat, they would not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transmla.evaluation.report.plots import COLOURS, GREY, MARKERS, styled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    figure, (axes,) = styled(1, 9.0)
    for number, path in enumerate(arguments.models):
        _draw(axes, path, COLOURS[number % 6], MARKERS[number % 6])
    axes.set_xlabel("tokens distilled on, a window counts in every pass")
    axes.set_ylabel("divergence from the source, nats per token")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.legend(frameon=False, labelcolor=GREY)
    figure.savefig(arguments.out, dpi=150, facecolor="white")


def _draw(axes: Any, path: Path, colour: str, marker: str) -> None:
    provenance = json.loads((path / "transmla.json" if path.is_dir() else path).read_text("utf-8"))
    (block,) = provenance["distilled_blocks"]
    training, mla = block["training"], provenance["geometry"]["mla"]
    batch = min(provenance["refinement"]["distil"]["batch"], block["windows"])
    tokens = block["steps"] * batch * provenance["calibration"]["window"]
    name = (
        f"{mla['kv_lora_rank']}+{mla['qk_rope_head_dim']}, {provenance['recipe']['refine']}, {block['windows']} windows"
    )
    middles = [(place + 0.5) / len(training) * tokens for place in range(len(training))]
    axes.plot(middles, training, color=colour, marker=marker, markersize=3, linewidth=1, label=name)
    axes.plot([0, tokens], [block["loss_before"], block["loss_after"]], marker="o", fillstyle="none",
              color=colour, linestyle="none", markersize=9)  # fmt: skip


if __name__ == "__main__":
    main()
