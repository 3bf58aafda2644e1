"""Ridge regressions from second moments: how one layer repairs what the layers before it lost.

Shape legend: see transmla/maths/__init__.py. F: features, K: outputs.
"""

import torch
from torch import Tensor


def stream_map(converted_DD: Tensor, cross_DD: Tensor, ridge: float) -> Tensor:
    """Linear estimate A [D, D] of the source's input from the converted one: x ~ A x_hat.

    converted_DD: E[x_hat x_hat^T];  cross_DD: E[x x_hat^T]
    ridge:        relative to the mean diagonal; pulls A towards the identity, not towards zero
    """
    eye = torch.eye(len(converted_DD), dtype=converted_DD.dtype, device=converted_DD.device)
    strength = ridge * converted_DD.diagonal().mean() * eye
    solution: Tensor = torch.linalg.solve(converted_DD + strength, (cross_DD + strength).T)
    return solution.T


def refit(weight_KF: Tensor, gram_FF: Tensor, residual_FK: Tensor, ridge: float) -> Tensor:
    """`weight` moved to the least-squares fit of the residual, held back by a ridge towards its old value.

    gram_FF:     sum of w f f^T over tokens;  residual_FK: sum of w f (target - weight f)^T
    ridge:       relative to the mean diagonal of gram
    """
    strength = ridge * gram_FF.diagonal().mean()
    eye = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    return weight_KF + torch.linalg.solve(gram_FF + strength * eye, residual_FK).T
