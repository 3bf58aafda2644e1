"""Sums of outer products, of which half is mirrored."""

import pytest
import torch

from tests.maths.weights import lively, relative
from transmla.maths.moment import second_moment


@pytest.mark.parametrize("size", [3, 255, 256, 300, 577])
def test_second_moment(size: int) -> None:
    x_NF = lively(40, size, seed=size)
    moment_FF = second_moment(x_NF)
    assert moment_FF.dtype == torch.float64 and relative(moment_FF, moment_FF.T) < 1e-14
    assert relative(moment_FF, x_NF.T @ x_NF) < 1e-14
    assert relative(second_moment(x_NF.float()), x_NF.T @ x_NF) < 1e-6
