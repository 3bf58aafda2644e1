"""Ridge regressions from second moments: how one layer repairs what the layers before it lost.

Both are held back by a ridge. How much is a matter of how many tokens there are per feature: what suits 85 lets 12 fit
their own noise. So the ridge is chosen on tokens that are set aside (cross-validation with one fold), and the fit made
again on all of them.

Shape legend: see transmla/maths/__init__.py. F: features, K: outputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GAIN = 0.1


def stream_map(converted_DD: Tensor, cross_DD: Tensor, ridge: float) -> Tensor:
    """Linear estimate A [D, D] of the source's input from the converted one: x ~ A x_hat.

    converted_DD: E[x_hat x_hat^T];  cross_DD: E[x x_hat^T]
    ridge:        relative to the mean diagonal; pulls A towards the identity, not towards zero
    """
    eye = torch.eye(len(converted_DD), dtype=converted_DD.dtype, device=converted_DD.device)
    strength = ridge * converted_DD.diagonal().mean() * eye
    solution: Tensor = torch.linalg.solve(converted_DD + strength, (cross_DD + strength).T)
    return solution.T


def refit(weight_KF: Tensor, gram_FF: Tensor, wanted_FK: Tensor, ridge: float) -> Tensor:
    """`weight` moved to the least-squares fit of a target, held back by a ridge towards its old value.

    gram_FF:     sum of w f f^T over tokens;  wanted_FK: sum of w f target^T
    ridge:       relative to the mean diagonal of gram
    """
    strength = ridge * gram_FF.diagonal().mean()
    eye = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    residual_FK = wanted_FK - gram_FF @ weight_KF.T
    return weight_KF + torch.linalg.solve(gram_FF + strength * eye, residual_FK).T


def chosen_ridge(
    ridges: Sequence[float], fit: Callable[[float], Tensor], gram_FF: Tensor, wanted_FK: Tensor, energy: float
) -> float:
    """Of ascending ridges, the first behind which the squared error of the fit [K, F] on other tokens does not fall by
    `GAIN`; what little text says of small differences is not worth more.

    gram_FF, wanted_FK: of those tokens, see `refit`;  energy: sum of w |target|^2
    """
    best, least = ridges[0], float("inf")
    for ridge in ridges:
        weight_KF = fit(ridge)
        error = float(((weight_KF @ gram_FF) * weight_KF).sum() - 2 * (weight_KF.T * wanted_FK).sum()) + energy
        if error >= (1 - GAIN) * least:
            break
        best, least = ridge, error
    return best
