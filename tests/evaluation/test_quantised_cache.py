"""Packed caches of sources: against values rounded one by one, in a model that attends to them."""

import math
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer

from tests.families import lively_config, lively_model
from transmla.evaluation.perplexity import perplexity
from transmla.evaluation.quantised_cache import (
    Apart,
    GridCode,
    PairCode,
    RotatedCode,
    packed_bytes_per_token,
    packed_caches,
    why_no_cache,
)
from transmla.maths.coding import SINK

IDS = torch.randint(3, 512, (2, 60), generator=torch.Generator().manual_seed(1))
STEP = 8


def on_grid(values: list[float], bits: int) -> list[float]:
    """Each of a group's values rounded to the nearest of 2^bits, with a scale and a zero point in half precision."""
    low = float(torch.tensor(min(values)).half())
    step = float(torch.tensor((max(values) - low) / (2**bits - 1)).half())
    return [low + step * min(max(round((value - low) / step), 0), 2**bits - 1) for value in values]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_channels_of_keys_and_tokens_of_values(bits: int) -> None:
    x = torch.randn(1, 2, STEP, 12, generator=torch.Generator().manual_seed(bits))
    x[..., 5] *= 100
    errors = []
    for by_channel in (True, False):
        code = GridCode(STEP if by_channel else 12, bits, by_channel=by_channel)
        found = code.decode(code.encode(x), torch.float32)
        across = x.transpose(2, 3) if by_channel else x
        wanted = torch.tensor([on_grid(row.tolist(), bits) for row in across.flatten(0, 2)]).view_as(across)
        assert torch.allclose(found, wanted.transpose(2, 3) if by_channel else wanted, atol=1e-4, rtol=1e-5)
        errors.append(float((found - x)[..., :5].square().mean()))
    assert errors[0] < 0.1 * errors[1], "the outlier channel should spoil the others only within a token"


def test_a_rotation_shares_an_outlier_out() -> None:
    x = torch.randn(1, 1, 50, 64, generator=torch.Generator().manual_seed(2))
    x[..., 9] *= 30
    errors = {}
    for name, code in (("rotated", RotatedCode(64, 4)), ("grid", GridCode(64, 4, by_channel=False))):
        packed = code.encode(x)
        errors[name] = float((code.decode(packed, torch.float32) - x).square().sum() / x.square().sum())
        assert sum(tensor.nbytes for tensor in packed.values()) == 50 * (34 if name == "rotated" else 40)
    # four bits for a normal distribution leave 0.0095 of the variance
    assert errors["rotated"] == pytest.approx(0.0095, rel=0.2)


class Naive(DynamicLayer):
    """All keys and values as floats, of which groups of `step` tokens were rounded when so many newer ones had come."""

    def __init__(self, code: PairCode, step: int = STEP) -> None:
        super().__init__()
        self.code, self.step, self.packed = code, step, 0

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = super().update(key, value)
        shown = [x.clone() for x in whole]
        for start in range(SINK, SINK + self.packed, self.step):
            block = self.code.encode(*(exact[:, :, start : start + self.step] for exact in whole), start)
            for x, rounded in zip(shown, self.code.decode(block, start, key.dtype), strict=True):
                x[:, :, start : start + self.step] = rounded
        while whole[0].shape[2] - SINK - self.packed >= 2 * self.step:
            self.packed += self.step
        return tuple(shown)


@pytest.mark.parametrize("kind", ["KIVI 2 bits", "rotated 2 bits"])
def test_the_model_reads_what_is_packed(kind: str) -> None:
    model = lively_model(lively_config())
    size, layers = model.config.head_dim, model.config.num_hidden_layers
    grids = Apart(GridCode(STEP, 2, by_channel=True), GridCode(size, 2, by_channel=False))
    code = grids if kind.startswith("KIVI") else Apart(RotatedCode(size, 2), RotatedCode(size, 2))
    made: list[Cache] = []

    def real() -> Cache:
        made.append(packed_caches(model, 2, STEP)[kind]())
        return made[-1]

    found = perplexity(model, IDS, cache=real, chunk=STEP)
    wanted = perplexity(model, IDS, cache=lambda: Cache(layers=[Naive(code) for _ in range(layers)]), chunk=STEP)
    exact = perplexity(model, IDS)
    assert found.nats == pytest.approx(wanted.nats, abs=1e-5)
    assert abs(exact.nats - found.nats) > 1e-3, "rounding changes nothing, the test sees nothing"
    heads = model.config.num_key_value_heads
    grid = 2 * size * 2 / 8 + 4 * -(-size // 32) + 4 * size / STEP
    rotated = 2 * (size * 2 / 8 + 2)
    assert packed_bytes_per_token(made[0]) == layers * heads * (grid if kind.startswith("KIVI") else rotated)


def test_caches_by_bits() -> None:
    model = lively_model(lively_config())
    assert list(packed_caches(model, 4)) == ["KIVI 4 bits", "rotated 4 bits"]
    assert packed_caches(model, 2.5) == packed_caches(model, 5) == {}
    assert why_no_cache(model) == "integers have 2, 3, 4, 8 bits; --coded-source measures numbers between"
    assert math.isnan(packed_bytes_per_token(packed_caches(model, 4)["KIVI 4 bits"]()))
