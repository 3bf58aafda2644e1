"""How calls that take long report what they are doing."""

from collections.abc import Callable

# progress(stage, done, total, remark): `done` of `total` units of a stage, and a few words on how it goes
Progress = Callable[[str, int, int, str], None]


def silent(stage: str, done: int, total: int, remark: str) -> None:
    """The `Progress` of a call that was given none."""
