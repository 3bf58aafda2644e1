"""Arithmetic in which nothing rounds."""

from tests.conversion.conftest import nothing_rounds

__all__ = ["nothing_rounds"]
