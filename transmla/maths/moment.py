"""Sums of outer products over tokens, and what is added to their diagonals.

Shape legend: see transmla/maths/__init__.py. F: features, N: tokens of any number of texts.
"""

from itertools import pairwise

import torch
from torch import Tensor

# narrower blocks would be slower than what they save
_LEAST_BLOCK = 128


def raised(moment_FF: Tensor, by: float | Tensor) -> Tensor:
    """A copy with `by`, one value or [F], added to the diagonal."""
    moment_FF = moment_FF.clone()
    moment_FF.diagonal().add_(by)
    return moment_FF


def second_moment(x_NF: Tensor) -> Tensor:
    """Sum of x x^T over tokens, float64 [F, F]; the products in the dtype of x. Symmetric: half of it is mirrored."""
    size = x_NF.shape[1]
    blocks = min(4, size // _LEAST_BLOCK)
    if blocks < 2:
        return (x_NF.T @ x_NF).double()
    edges = [size * block // blocks for block in range(blocks + 1)]
    moment_FF = torch.empty(size, size, dtype=torch.float64, device=x_NF.device)
    for start, end in pairwise(edges):
        product = x_NF[:, start:end].T @ x_NF[:, start:]
        moment_FF[start:end, start:] = product
        moment_FF[end:, start:end] = product[:, end - start :].T
    return moment_FF
