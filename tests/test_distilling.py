"""What is kept of a block's losses."""

import pytest

from transmla.distilling import stretches


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([], []),
        ([3.0], [3.0]),
        ([4.0, 2.0], [4.0, 2.0]),
        ([8.0, 6.0, 4.0, 2.0], [7.0, 3.0]),
        ([5.0, 4.0, 2.0], [5.0, 3.0]),
    ],
)
def test_stretches(losses: list[float], found: list[float]) -> None:
    """At most two: the later ones take what does not divide."""
    assert stretches(losses, 2) == found


def test_every_step_counts_once() -> None:
    means = stretches([float(step) for step in range(100)], 32)
    assert len(means) == 32 and means == sorted(means)
    assert stretches([1.0] * 100, 32) == [1.0] * 32
