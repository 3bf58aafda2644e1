"""Wider heads compute the same function, and can learn what narrow ones cannot."""

from dataclasses import replace

import pytest
import torch

from transmla.maths.attention import MlaWeights, inverse_frequencies, mla_attention
from transmla.maths.reference import mla_naive
from transmla.maths.widen import widen

HIDDEN, HEADS, RANK, ROPE, WIDTH = 24, 3, 10, 4, 6


def block() -> MlaWeights:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator) / 3

    return MlaWeights(
        q_nope_HnD=random(HEADS, WIDTH, HIDDEN), q_rope_HeD=random(HEADS, ROPE, HIDDEN),
        kv_down_rD=random(RANK, HIDDEN), k_rope_eD=random(ROPE, HIDDEN), k_up_Hnr=random(HEADS, WIDTH, RANK),
        v_up_Hvr=random(HEADS, WIDTH, RANK), o_DHv=random(HIDDEN, HEADS * WIDTH),
        inv_freq_M=inverse_frequencies(100.0, ROPE), scaling=0.4,
    )  # fmt: skip


@pytest.mark.parametrize(("nope", "value"), [(6, 6), (8, 6), (6, 9), (10, 10)])
def test_the_same_function(nope: int, value: int) -> None:
    x_TD = torch.randn(9, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mla = block()
    wide = widen(mla, nope, value)
    assert wide.q_nope_HnD.shape == (HEADS, nope, HIDDEN) and wide.k_up_Hnr.shape == (HEADS, nope, RANK)
    assert wide.v_up_Hvr.shape == (HEADS, value, RANK) and wide.o_DHv.shape == (HIDDEN, HEADS * value)
    assert torch.allclose(mla_naive(x_TD, wide), mla_naive(x_TD, mla), atol=1e-12)
    if value > WIDTH:
        # the test can fail: what meets the new values is zero, and only that
        assert wide.v_up_Hvr[:, WIDTH:].abs().max() > 0.1


def test_new_rows_are_what_a_head_could_not_see() -> None:
    wide = widen(block(), RANK, RANK)
    for up_Hkr in (wide.k_up_Hnr, wide.v_up_Hvr):
        old, new = up_Hkr[:, :WIDTH], up_Hkr[:, WIDTH:]
        assert (old @ new.mT).abs().max() < 1e-12
        length = old.square().sum(-1).mean(-1)
        assert torch.allclose(new @ new.mT, torch.eye(RANK - WIDTH).double() * length[:, None, None], atol=1e-12)
        # together they span the latent
        assert torch.linalg.matrix_rank(up_Hkr).tolist() == [RANK] * HEADS


def test_gradients_reach_all_that_is_new() -> None:
    """Zeros on one side only: on both, they would stay."""
    wide = widen(block(), RANK, RANK)
    x_TD = torch.randn(9, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = {name: getattr(wide, name).clone().requires_grad_() for name in ("q_nope_HnD", "o_DHv")}
    learning = replace(wide, **leaves)
    (mla_attention(x_TD, learning) @ learning.o_DHv.T).square().sum().backward()
    grads = [leaves["q_nope_HnD"].grad, leaves["o_DHv"].grad]
    assert grads[0] is not None and grads[1] is not None
    assert (grads[0][:, WIDTH:].abs().amax((1, 2)) > 1e-6).all()
    assert (grads[1].unflatten(1, (HEADS, RANK))[..., WIDTH:].abs().amax((0, 2)) > 1e-6).all()


@pytest.mark.parametrize(("nope", "value"), [(5, 6), (6, 5), (11, 6), (6, 11)])
def test_sizes_that_cannot_be(nope: int, value: int) -> None:
    with pytest.raises(ValueError, match="cannot be one of"):
        widen(block(), nope, value)
