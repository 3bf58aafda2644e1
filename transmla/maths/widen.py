"""Heads wider than the source's: capacity that the cache does not pay for.

A head reads the latent through n unrotated and v value dimensions. In the source both are head_dim; up to r every one
more lets a head see a part of the latent that it could not. The function is the same at first: new rows of k_up meet
queries of zero, new rows of v_up zero columns of o_proj. Refinement then makes use of them.

Shape legend: see transmla/maths/__init__.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from transmla.maths.attention import MlaWeights
from transmla.maths.pad import grow


def widen(mla: MlaWeights, nope: int, value: int) -> MlaWeights:
    """The same block with qk_nope_head_dim `nope` and v_head_dim `value`; ValueError if one shrinks or exceeds r."""
    rank = mla.k_up_Hnr.shape[2]
    for up_Hkr, size in ((mla.k_up_Hnr, nope), (mla.v_up_Hvr, value)):
        if not up_Hkr.shape[1] <= size <= max(rank, up_Hkr.shape[1]):
            raise ValueError(f"a head of {up_Hkr.shape[1]} cannot be one of {size} at rank {rank}")
    return replace(
        mla,
        q_nope_HnD=grow(mla.q_nope_HnD, 1, nope),
        k_up_Hnr=_with_unseen(mla.k_up_Hnr, nope),
        v_up_Hvr=_with_unseen(mla.v_up_Hvr, value),
        o_DHv=grow(mla.o_DHv.unflatten(1, (mla.v_up_Hvr.shape[0], -1)), 2, value).flatten(1),
    )


def _with_unseen(up_Hkr: Tensor, size: int) -> Tensor:
    """Further rows, orthogonal to those of the head and to each other, as long as these are on average."""
    missing = size - up_Hkr.shape[1]
    if not missing:
        return up_Hkr
    _, _, basis_Hrr = torch.linalg.svd(up_Hkr.double(), full_matrices=True)
    length_H = up_Hkr.double().square().sum(-1).mean(-1).sqrt()
    rows = basis_Hrr[:, up_Hkr.shape[1] : size] * length_H[:, None, None]
    return torch.cat([up_Hkr, rows.to(up_Hkr)], dim=1)
