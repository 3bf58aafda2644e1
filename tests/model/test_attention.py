"""Two routes, one function: absorbed, decompressed, the naive loops and the stock class agree."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as StockForCausalLM

from tests.model.folders import HIDDEN, VOCAB, lively_model, naive_attention, tiny_config
from transmla.model import modeling_transmla
from transmla.model.modeling_transmla import DeepseekV3ForCausalLM, LatentAttention

Load = Callable[..., Any]


def never(*_: object) -> bool:
    return False


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def stepwise(model: Any, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Logits of all tokens, fed through a cache in chunks of the given lengths."""
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in torch.split(ids, chunks, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Records at every attention call whether the absorbed route was taken."""
    taken: list[bool] = []
    choose = LatentAttention.absorbs

    def record(*args: Any) -> bool:
        taken.append(choose(*args))
        return taken[-1]

    monkeypatch.setattr(LatentAttention, "absorbs", record)
    return taken


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_absorbed_equals_decompressed(
    ours: Load,
    ids: torch.Tensor,
    routes: list[bool],
    attention: str,
    dtype: torch.dtype,
    tolerance: float,
    device: torch.device,
) -> None:
    # stock eager attention takes its softmax in float32, and so does the decompressed route
    tolerance = max(tolerance, 1e-6 if attention == "eager" else 0.0)
    model, ids = ours(dtype, attn_implementation=attention, device=device), ids.to(device)
    absorbed = stepwise(model, ids, [10, 1, 1, 5, 7])
    assert any(routes), "the absorbed route was never taken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentAttention, "absorbs", never)
        decompressed = stepwise(model, ids, [10, 1, 1, 5, 7])
    assert relative(absorbed, decompressed) < tolerance


def test_attention_equals_naive_loops(ours: Load, routes: list[bool]) -> None:
    model = ours(torch.float64)
    attention = model.model.layers[1].self_attn
    hidden = torch.randn(1, 9, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = naive_attention(attention, hidden[0])

    def run(lengths: list[int]) -> torch.Tensor:
        # the model computes angles in float32; here they are exact
        cache, start, outputs = DynamicCache(config=model.config), 0, []
        frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        for part in torch.split(hidden, lengths, dim=1):
            positions = torch.arange(start, start + part.shape[1])
            angles = (positions[:, None] * frequencies).repeat(1, 2)[None]
            mask = torch.ones(part.shape[1], start + part.shape[1], dtype=torch.bool).tril(start)[None, None]
            attention.layer_idx = 0
            outputs.append(attention(part, (angles.cos(), angles.sin()), mask, cache)[0])
            start += part.shape[1]
        return torch.cat(outputs, dim=1)[0]

    with torch.no_grad():
        assert relative(run([9]), expected) < 1e-10 and not any(routes)
        assert relative(run([3, 1, 4, 1]), expected) < 1e-10 and any(routes)
    assert relative(naive_attention(attention, hidden[0], rotate=False), expected) > 0.1


@pytest.mark.parametrize("changes", [{}, {"rope_interleave": False}])
def test_equals_stock_class(
    folder: Path, ours: Load, ids: torch.Tensor, changes: dict[str, Any], device: torch.device
) -> None:
    stock = StockForCausalLM.from_pretrained(folder, **changes)
    model = ours(device=device, **changes)
    with torch.no_grad():
        expected = stock(ids).logits
        ids = ids.to(device)
        assert relative(model(ids).logits, expected) < 1e-3
        assert relative(stepwise(model, ids, [12] + [1] * 12), expected) < 1e-3
        model.model.layers[0].self_attn.kv_a_layernorm.variance_epsilon = 1e-5
        assert relative(model(ids).logits, expected) > 1e-2, "the norm does not matter to this test"


def test_unfolded_checkpoint_with_query_latent(ids: torch.Tensor, routes: list[bool]) -> None:
    # each with its own: a model notes in its config how it runs experts, and only the stock class may choose
    stock, model = (
        make(tiny_config(latent_norm_folded=False, q_lora_rank=20)) for make in (lively_model, DeepseekV3ForCausalLM)
    )
    stock.train(False)
    model.train(False)
    model.load_state_dict(stock.state_dict())
    with torch.no_grad():
        expected = stock(ids).logits
    assert relative(stepwise(model, ids, [8] + [1] * 16), expected) < 1e-5 and any(routes)


def test_step_by_step_equals_full_forward(ours: Load, ids: torch.Tensor) -> None:
    model = ours()
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    for chunks in ([1] * 24, [5, 3, 1, 9, 6], [16, 8]):
        assert relative(stepwise(model, ids, chunks), full) < 1e-5


@pytest.mark.parametrize("kernel", ["rows", "products"])
def test_ways_to_run_absorbed_attention_agree(
    ours: Load, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    model = ours()
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    monkeypatch.setattr(modeling_transmla, "_kernel", lambda *_: kernel)
    assert relative(stepwise(model, ids, [5, 3, 1, 9, 6]), full) < 1e-5
    monkeypatch.setattr(modeling_transmla, "_kernel", lambda q, key, mask: "heads" if q.shape[2] == 1 else kernel)
    assert relative(stepwise(model, ids, [8] + [1] * 16), full) < 1e-5


def test_which_way_absorbed_attention_runs() -> None:
    """By device, width, number of queries and mask; tensors without memory, so that no GPU is needed."""

    def way(device: str, rank: int, batch: int = 1, queries: int = 1, mask: object = None, size: int = 4096) -> str:
        query, key = (
            SimpleNamespace(shape=shape, device=torch.device(device), dtype=torch.bfloat16)
            for shape in ((batch, 32, queries, rank + 64), (batch, 1, size, rank + 64))
        )
        return modeling_transmla._kernel(query, key, mask)  # type: ignore[arg-type]

    assert way("cpu", 512) == way("cpu", 96) == "rows"
    assert way("cuda", 512) == way("cuda", 256) == "products" and way("cuda", 192) == "heads"
    assert way("cuda", 96, mask=object()) == way("cuda", 96, queries=2) == "products"
    assert way("cuda", 512, batch=16, queries=128, size=8192) == "rows"


def test_several_tokens_need_the_causal_mask(ours: Load, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours()
    right = stepwise(model, ids, [20, 4])
    absorbed = LatentAttention.absorbed
    monkeypatch.setattr(LatentAttention, "absorbed", lambda self, q, p, key, _: absorbed(self, q, p, key, None))
    assert relative(stepwise(model, ids, [20, 4]), right) > 1e-2


def test_long_chunks_are_decompressed(ours: Load, routes: list[bool]) -> None:
    # absorbed while T * (2 * 12 - 16) < 12 * 16, that is T < 24
    ids = torch.randint(3, VOCAB, (1, 80), generator=torch.Generator().manual_seed(3))
    stepwise(ours(), ids, [33, 23, 24])
    assert routes == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_equals_unpadded_rows(ours: Load, ids: torch.Tensor, routes: list[bool], attention: str) -> None:
    model, pad = ours(attn_implementation=attention), 5
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, parts, start = DynamicCache(config=model.config), [], 0
    with torch.no_grad():
        for length in (3, 10, 1, 1, 9):  # the first chunk is all padding in row 1
            end = start + length
            parts.append(
                model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                ).logits
            )
            start = end
        logits = torch.cat(parts, dim=1)
        assert logits.isfinite().all() and any(routes)
        assert relative(logits[:1], model(ids[:1]).logits) < 1e-5
        assert relative(logits[1:, pad:], model(ids[1:, pad:]).logits) < 1e-5
        assert relative(logits[1:, pad:], model(ids[1:]).logits[:, pad:]) > 1e-2


def test_eager_equals_sdpa_and_float_equals_bool_masks(ours: Load, ids: torch.Tensor) -> None:
    sdpa, eager = ours(), ours(attn_implementation="eager")
    expected = stepwise(sdpa, ids, [8, 1, 15])
    assert relative(stepwise(eager, ids, [8, 1, 15]), expected) < 1e-5

    boolean = torch.ones(4, 12, dtype=torch.bool).tril(8).expand(2, 1, 4, 12).clone()
    boolean[:, :, :, 2] = False
    additive = torch.zeros(boolean.shape).masked_fill(~boolean, torch.finfo(torch.float32).min)
    results = []
    with torch.no_grad():
        for model in (sdpa, eager):
            for mask in (boolean, additive):
                cache = DynamicCache(config=model.config)
                model(ids[:, :8], past_key_values=cache)
                positions = torch.arange(8, 12)[None]
                results.append(
                    model(ids[:, 8:12], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
                )
    for result in results[1:]:
        assert relative(result, results[0]) < 1e-5


def test_attention_weights_sum_to_one_on_both_routes(ours: Load, ids: torch.Tensor, routes: list[bool]) -> None:
    model = ours(attn_implementation="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        full = model(ids, output_attentions=True, use_cache=False).attentions
        model(ids[:, :20], past_key_values=cache)
        last = model(ids[:, 20:], past_key_values=cache, output_attentions=True).attentions
    assert routes[:3] == [False] * 3 and routes[-3:] == [True] * 3
    for whole, part in zip(full, last, strict=True):
        assert whole.shape == (2, 6, 24, 24) and part.shape == (2, 6, 4, 24)
        torch.testing.assert_close(whole.sum(-1), torch.ones(2, 6, 24))
        torch.testing.assert_close(part, whole[:, :, 20:], atol=1e-5, rtol=1e-4)


# two units in the last place of each dtype, and twice what is measured
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.008)])
def test_half_precision(ours: Load, ids: torch.Tensor, dtype: torch.dtype, tolerance: float) -> None:
    """The absorbed route rounds as little as the other one; compared with the same rounded weights in float64."""
    steps = [12] + [1] * 12
    exact = stepwise(ours(dtype).double(), ids, steps)
    absorbed = stepwise(ours(dtype), ids, steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentAttention, "absorbs", never)
        decompressed = stepwise(ours(dtype), ids, steps)
    assert absorbed.dtype == dtype and relative(absorbed, exact) < tolerance
    assert relative(absorbed, exact) < 1.3 * relative(decompressed, exact)


class Wrapped(torch.Tensor):
    """A weight as torchao leaves it in its layer: it can be multiplied, and nothing else."""

    values: torch.Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            return function(args[0], args[1].values, *args[2:])
        if getattr(function, "__name__", "") in ("__get__", "dim", "size"):  # what a tensor says of itself
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise AssertionError(f"a quantised weight is read by {function}")


@pytest.mark.parametrize("kind", ["wrapped", "empty"])
def test_weights_that_cannot_be_read_are_multiplied(ours: Load, ids: torch.Tensor, kind: str) -> None:
    """torchao and sharding replace the weight and keep the layer: it runs its own forward at every step."""
    model = ours(dtype=torch.float32)
    wanted = stepwise(model, ids, [ids.shape[1] - 3, 1, 1, 1])
    for layer in model.model.layers:
        module = layer.self_attn.kv_b_proj
        weight = module.weight.detach()
        if kind == "wrapped":
            wrapped = weight.clone().as_subclass(Wrapped)
            wrapped.values = weight
            del module._parameters["weight"]
            module.weight = wrapped
        else:  # as DeepSpeed has it outside the layer's own forward
            module.weight = torch.nn.Parameter(weight.new_empty(0))
            module.forward = functools.partial(torch.nn.functional.linear, weight=weight)
    assert relative(stepwise(model, ids, [ids.shape[1] - 3, 1, 1, 1]), wanted) < 1e-5


@pytest.mark.parametrize("as_config", [False, True])
def test_double_quantisation_is_refused_where_it_loses_the_latent(as_config: bool) -> None:
    """Of folded weights, whose latent rows are small beside others of their matrix; where these stay out, it works."""
    given: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}

    def made(**settings: Any) -> Any:
        config = tiny_config(latent_norm_folded=True)
        settings = given | settings
        config.quantization_config = SimpleNamespace(to_dict=lambda: settings) if as_config else settings
        return DeepseekV3ForCausalLM(config)

    with pytest.raises(ValueError, match="bnb_4bit_use_double_quant"):
        made()
    with pytest.raises(ValueError, match="kv_a_proj_with_mqa"):
        made(llm_int8_skip_modules=["lm_head"])
    with pytest.raises(ValueError, match="kv_a_proj_with_mqa"):
        made(llm_int8_skip_modules=[""])
    made(llm_int8_skip_modules=["kv_a_proj_with_mqa", "lm_head"])
    made(llm_int8_skip_modules=["self_attn.kv_a_proj_with_mqa", "lm_head"])
    made(bnb_4bit_use_double_quant=False)
    made(load_in_4bit=False, load_in_8bit=True)
