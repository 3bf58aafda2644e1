"""What `heal` prints, wide and narrow."""

import io
from pathlib import Path

from rich.console import Console

from transmla.healing.flow import HealReport

MEASURED = {"divergence": 0.2369, "nats": 1.5, "source_nats": 1.4, "recovery": 0.779, "recovery_error": 0.008}


def test_all_numbers_at_80_columns() -> None:
    texts = ("wikitext:2+code", "tinystories-valid")
    report = HealReport(
        Path("out"), Path("out-healed"), "source", texts, dict.fromkeys(texts, MEASURED),
        dict.fromkeys(texts, MEASURED | {"divergence": 0.0408}), 1000, 10, 10, 100, 0.01, 1000, {}, {}, 1.0,
        200.0, 2.5,
    )  # fmt: skip
    for width in (80, 100):
        written = io.StringIO()
        report.show(Console(file=written, width=width))
        found = written.getvalue()
        assert all(number in found for number in ("0.2369", "0.0408", "4.482", "4.055", "77.9%", "0.8%", *texts))
        assert max(len(line) for line in found.splitlines()) <= width
