"""What `transmla quantise` says of what it wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from transmla.targets.quantise import QuantiseReport


def show_quantised(report: QuantiseReport, console: Console) -> None:
    spread = sum(report.spread) / len(report.spread)
    console.print(f"written     {report.path}", highlight=False, markup=False)
    console.print(f"measured on {report.tokens:,} tokens", highlight=False)
    console.print(
        f"gain        dealt bits: errors {spread:.2f} times smaller than equal ones, by theory", highlight=False
    )
    left = ", ".join(f"{bits} bits {share:.2%}" for bits, share in enumerate(report.distortion) if bits in (2, 3, 4))
    console.print(f"error       {left} of a value's variance", highlight=False)
    console.print(f"verified    relative error {report.relative_error:.1e}", highlight=False)
