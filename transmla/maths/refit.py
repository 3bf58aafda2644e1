"""Ridge regressions from second moments: how one layer repairs what the layers before it lost.

Both are held back by a ridge. How much is a matter of how many tokens there are per feature: what suits 85 lets 12 fit
their own noise. So the ridge is chosen on tokens that are set aside (cross-validation with one fold), and the fit made
again on all of them.

Shape legend: see transmla/maths/__init__.py. F: features, K: outputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transmla.maths.moment import raised

GAIN = 0.1


def stream_map(converted_DD: Tensor, cross_DD: Tensor, ridge: float) -> Tensor:
    """Linear estimate A [D, D] of the source's input from the converted one: x ~ A x_hat.

    converted_DD: E[x_hat x_hat^T];  cross_DD: E[x x_hat^T]
    ridge:        relative to the mean diagonal; pulls A towards the identity, not towards zero
    """
    strength = ridge * converted_DD.diagonal().mean()
    factors = torch.linalg.lu_factor(raised(converted_DD, strength))  # what goes in is gone before the right side comes
    return torch.linalg.lu_solve(*factors, raised(cross_DD, strength).T).T


def refit(weight_KF: Tensor, gram_FF: Tensor, wanted_FK: Tensor, ridge: float) -> Tensor:
    """`weight` moved to the least-squares fit of a target, held back by a ridge towards its old value.

    gram_FF:     sum of w f f^T over tokens;  wanted_FK: sum of w f target^T
    ridge:       relative to the mean diagonal of gram
    """
    strength = ridge * gram_FF.diagonal().mean() + 1e-300  # of features that are all zero, the weights stay
    residual_FK = torch.addmm(wanted_FK, gram_FF, weight_KF.T, alpha=-1)
    factors = torch.linalg.lu_factor(raised(gram_FF, strength))
    moved_FK: Tensor = torch.linalg.lu_solve(*factors, residual_FK)
    del factors, residual_FK  # before the sum, which is as large
    return weight_KF + moved_FK.T


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
        size = (weight_KF @ gram_FF).mul_(weight_KF).sum()
        error = float(size - 2 * (weight_KF.T * wanted_FK).sum()) + energy
        del weight_KF  # before the next one is fitted
        if error >= (1 - GAIN) * least:
            break
        best, least = ridge, error
    return best
