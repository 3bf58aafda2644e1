"""A padded block in the stock class computes what the unpadded one computes."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from transmla.geometry import MlaGeometry
from transmla.maths import EPS
from transmla.maths.pad import Widths, pad_attention
from transmla.targets.stock import deepseek_v3_config

HIDDEN, HEADS, SCALE = 24, 3, 2.0**-22
OLD = Widths(HEADS, rank=10, rope=4, nope=6, value=6)
NEW = Widths(HEADS, rank=32, rope=16, nope=8, value=12)


def block(widths: Widths, q_rank: int | None = None) -> DeepseekV3Attention:
    source = {"vocab_size": 7, "hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes = MlaGeometry(1, HIDDEN, HEADS, widths.rank, widths.rope, widths.nope, widths.value)
    settings = deepseek_v3_config(
        source | {"num_attention_heads": HEADS, "hidden_act": "silu"}, sizes, 100.0, 64, "float32"
    )
    config = DeepseekV3Config(**settings | {"q_lora_rank": q_rank})
    config._attn_implementation = "eager"
    return DeepseekV3Attention(config, 0).double().eval()


def output(made: DeepseekV3Attention, x_TD: Tensor) -> Tensor:
    angles = torch.arange(len(x_TD))[:, None] * DeepseekV3RotaryEmbedding(made.config).inv_freq.double()
    turns = tuple(torch.cat([part, part], -1)[None] for part in (angles.cos(), angles.sin()))
    mask = torch.full((len(x_TD), len(x_TD)), -math.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        return made(x_TD[None], position_embeddings=turns, attention_mask=mask)[0][0]


def lively_block(q_rank: int | None = None) -> DeepseekV3Attention:
    """Random weights; latent rows so small that its norm is a linear map."""
    generator = torch.Generator().manual_seed(3)
    made = block(OLD, q_rank)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        made.kv_a_proj_with_mqa.weight[: OLD.rank] *= SCALE
        made.kv_a_layernorm.weight.fill_(math.sqrt(EPS) / SCALE)
    return made


@pytest.mark.parametrize("q_rank", [None, 9])
def test_the_same_function(q_rank: int | None) -> None:
    x_TD = torch.randn(12, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small, large = lively_block(q_rank), block(NEW, q_rank)
    large.load_state_dict(pad_attention(small.state_dict(), OLD, NEW))
    wanted = output(small, x_TD)
    # not to the last bit: the norm of the latent deviates from a linear map by less in the larger one
    assert (output(large, x_TD) - wanted).norm() < 1e-5 * wanted.norm()
    moved = pad_attention(small.state_dict(), OLD, NEW)
    rows = moved["kv_a_proj_with_mqa.weight"]
    moved["kv_a_proj_with_mqa.weight"] = torch.cat([rows[: NEW.rank], rows[NEW.rank :].roll(2, 0)])
    large.load_state_dict(moved)
    assert (output(large, x_TD) - wanted).norm() > 0.05 * wanted.norm(), "pairs of other frequencies are not seen"


@pytest.mark.parametrize(
    "new",
    [
        Widths(HEADS, 9, 4, 6, 6),
        Widths(HEADS, 10, 6, 6, 6),
        Widths(HEADS, 10, 4, 5, 6),
        Widths(HEADS, 10, 4, 6, 5),
        Widths(HEADS + 1, 10, 4, 6, 6),
    ],
)
def test_widths_that_do_not_fit(new: Widths) -> None:
    with pytest.raises(ValueError, match="cannot be padded"):
        pad_attention(lively_block().state_dict(), OLD, new)
