"""Logits of what was written against logits of what it was made from: right, wrong, and none at all."""

from pathlib import Path

import pytest
import torch

from transmla.errors import VerificationError
from transmla.targets.comparison import compare_logits

EXPECTED_TV = torch.randn(12, 30, generator=torch.Generator().manual_seed(1))


def test_the_error_is_relative_and_the_mean_over_tokens() -> None:
    written_TV = EXPECTED_TV * torch.linspace(1.0, 1.001, 12)[:, None]
    expected = float((torch.linspace(1.0, 1.001, 12).double() - 1).square().mean().sqrt())
    assert compare_logits(Path("OUT"), written_TV, EXPECTED_TV, "float32") == pytest.approx(expected, rel=1e-3)


def test_a_difference_beyond_the_tolerance_is_refused() -> None:
    with pytest.raises(VerificationError, match="does not compute what it was made from") as caught:
        compare_logits(Path("OUT"), 1.01 * EXPECTED_TV, EXPECTED_TV, "float32")
    assert "1.00e-02, allowed 5e-03 in float32" in caught.value.why
    assert compare_logits(Path("OUT"), 1.01 * EXPECTED_TV, EXPECTED_TV, "bfloat16") == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("logits_TV", "fault"),
    [
        (torch.zeros(12, 30), "all zero"),
        (torch.full((12, 30), 3.0), "the same for every token"),
        (EXPECTED_TV.masked_fill(EXPECTED_TV > 2, float("nan")), "not finite"),
        (EXPECTED_TV.masked_fill(EXPECTED_TV > 2, float("inf")), "not finite"),
    ],
)
def test_logits_that_predict_nothing_are_named(logits_TV: torch.Tensor, fault: str) -> None:
    """On either side, and also where both sides agree."""
    for written_TV, expected_TV in ((logits_TV, EXPECTED_TV), (EXPECTED_TV, logits_TV), (logits_TV, logits_TV)):
        with pytest.raises(VerificationError, match="predicts nothing") as caught:
            compare_logits(Path("OUT"), written_TV, expected_TV, "float32")
        assert fault in caught.value.why and "--dtype" not in caught.value.remedy


def test_a_token_without_logits_must_have_none_on_the_other_side() -> None:
    """As at the start of a text, if the token has no embedding."""
    expected_TV = EXPECTED_TV.clone()
    expected_TV[0] = 0
    assert compare_logits(Path("OUT"), expected_TV, expected_TV, "float32") == 0
    with pytest.raises(VerificationError, match="does not compute"):
        compare_logits(Path("OUT"), EXPECTED_TV, expected_TV, "float32")
