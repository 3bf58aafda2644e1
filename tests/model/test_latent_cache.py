"""Packed caches against a naive one: all tokens as floats, those rounded that the real one has packed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from tests.model.folders import LAYERS, RANK, ROPE, VOCAB, write_folder
from tests.model.test_attention import relative
from tests.model.test_cache import generate
from transmla.evaluation.quantised_cache import packed_caches, why_no_cache
from transmla.model import modeling_transmla as modeling
from transmla.model.loading import load
from transmla.model.modeling_transmla import (
    GAIN_BITS,
    GAIN_STEPS,
    GAIN_ZERO,
    GAINS_TRIED,
    GroupCode,
    LatentCache,
    TransformCode,
    dealt_bits,
    pack,
    packed_width,
    transform_codes,
    unpack,
)

Load = Callable[..., Any]
WIDTH = RANK + ROPE
LEVELS = {
    1: [-0.8, 0.8],
    2: [-1.5, -0.45, 0.45, 1.5],
    3: [-2.2, -1.3, -0.76, -0.25, 0.25, 0.76, 1.3, 2.2],
    4: torch.linspace(-2.7, 2.7, 16).tolist(),
}


def prepared() -> dict[str, Any]:
    """What `transmla quantise` writes into a config: here with uneven importance, in an arbitrary basis."""
    generator = torch.Generator().manual_seed(3)
    layers = [
        {
            "mean": (0.1 * torch.randn(WIDTH, generator=generator)).tolist(),
            "deviation": (0.5 + torch.rand(WIDTH, generator=generator)).tolist(),
            "importance": torch.rand(WIDTH, generator=generator).pow(3).tolist(),
        }
        for _ in range(LAYERS)
    ]
    return {"layers": layers, "levels": [[0.0], *LEVELS.values()], "distortion": [1.0, 0.36, 0.12, 0.035, 0.01]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = write_folder(tmp_path_factory.mktemp("packed") / "tiny", latent_code=prepared())
    return load(folder, dtype=torch.float64)


class NaiveLayer(DynamicLayer):
    """Everything as floats; a token is rounded once so many newer ones have come that it was packed."""

    def __init__(self, code: Any, sink: int, recent: int, first: list[int]) -> None:
        super().__init__()
        self.code, self.sink, self.recent, self.first, self.packed = code, sink, recent, first, 0
        self.rounded: dict[bytes, torch.Tensor] = {}

    def round(self, one: torch.Tensor) -> torch.Tensor:
        """One token [1, 1, k], alone; the same values are the same when they come again."""
        values = one.numpy().tobytes()
        if values not in self.rounded:
            self.rounded[values] = self.code.decode(self.code.encode(one), one.dtype)[0, 0]
        return self.rounded[values]

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        whole, empty = super().update(key, value)
        shown = whole.clone()
        for text in range(len(whole)):
            for token in range(self.packed):
                if not self.first[text] <= token < self.first[text] + self.sink:
                    shown[text, 0, token] = self.round(whole[text : text + 1, 0, token : token + 1])
        while whole.shape[2] - self.packed >= self.recent + max(1, self.recent):
            self.packed += max(1, self.recent)
        return shown, empty

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.packed = min(self.packed, self.get_seq_length())


def naive(real: LatentCache, first: list[int]) -> Cache:
    layers: list[Any] = real.layers
    return Cache(layers=[NaiveLayer(layer.code, real.sink, real.recent, first) for layer in layers])


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_come_back_from_whole_bytes(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for count in (1, 2, 7, 8, 13, 32, 96):
        codes = torch.randint(2**bits, (3, 5, count), generator=generator, dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.shape == (3, 5, packed_width(count, bits)) and torch.equal(unpack(packed, bits, count), codes)
        if count % 8 == 0:
            assert packed.shape[-1] * 8 == count * bits
        other = codes.clone()
        other[1, 2, count // 2] ^= 1
        assert not torch.equal(pack(other, bits), packed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grouped_values_are_the_nearest_of_their_grid(bits: int) -> None:
    code = GroupCode(40, 8, bits)
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1)) * 3 + 1
    x[1, 1, 3] = 50.0
    x[0, 2] = 0.25
    found = code.decode(code.encode(x), torch.float32)
    for start, end, size in ((0, 32, bits), (32, 40, bits), (40, 48, 8)):
        for part, rounded in zip(x[..., start:end].flatten(0, 1), found[..., start:end].flatten(0, 1), strict=True):
            low = float(part.min().half())
            step = max(float(torch.tensor((float(part.max()) - low) / (2**size - 1)).half()), 1.2e-7)
            grid = low + step * torch.arange(2**size)
            nearest = grid[(part[:, None] - grid).abs().argmin(1)]
            assert torch.allclose(rounded, nearest, atol=1e-5)
    assert code.bytes_per_token == 32 * bits // 8 + bits + 8 + 3 * 4


def test_bits_go_where_they_help_most() -> None:
    importance = [[8.0] * 8 + [0.1] * 8, [1.0] * 16]
    distortion = [4.0**-bits for bits in range(9)]
    bits = dealt_bits(importance, distortion, 3.0)
    assert sum(map(sum, bits)) + 2 * GAIN_BITS == 3 * 32
    assert bits[0][0] > bits[1][0] >= bits[0][8] and len(set(bits[0][:8])) == 1

    def loss(dealt: list[list[int]]) -> float:
        return sum(
            w * distortion[b] for ws, bs in zip(importance, dealt, strict=True) for w, b in zip(ws, bs, strict=True)
        )

    equal = [[2] * 16, [2] * 16]
    assert sum(map(sum, equal)) == sum(map(sum, bits)) and loss(bits) < 0.7 * loss(equal)


def test_many_bits_have_the_best_gain_of_those_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """And few bits the root of the mean square."""
    monkeypatch.setattr(modeling, "WIDE_BITS", 3)
    generator = torch.Generator().manual_seed(2)
    layer = prepared()["layers"][1]
    bits = torch.randint(5, (WIDTH,), generator=generator).tolist()
    levels = [[0.0], *LEVELS.values()]
    code = TransformCode(layer, bits, levels)
    x = torch.randn(2, 6, WIDTH, generator=generator)
    x[0, 1, bits.index(4)], x[1, 3, bits.index(4)], x[1, 4, bits.index(2)] = 9.0, -14.0, 14.0
    x[1, 5] *= 1e-4
    packed = code.encode(x)
    assert packed["gains"].dtype == torch.uint8 and packed["gains"].shape == (2, 6, 2)
    whole = packed["codes"].shape[-1] + packed["gains"].shape[-1]
    assert whole == code.bytes_per_token == sum(packed_width(count, size) for size, count in code.runs) + 2

    mean, deviation, weight = (torch.tensor(layer[name]) for name in ("mean", "deviation", "importance"))
    z, wide = (x - mean) / deviation, torch.tensor(bits) >= 3
    size = (z.square().mean(-1, keepdim=True).sqrt().log2() * GAIN_STEPS).round()
    tried = []
    for step in GAINS_TRIED:
        gain = 2.0 ** ((size + step) / GAIN_STEPS)
        nearest = torch.zeros_like(z)
        for place, count in enumerate(bits):
            each = torch.tensor(levels[count])
            nearest[..., place] = each[(z[..., place, None] / gain - each).abs().argmin(-1)] * gain[..., 0]
        tried.append(nearest)
    chosen = torch.stack([((one - z).square() * weight)[..., wide].sum(-1) for one in tried]).argmin(0)
    assert chosen[0, 1] > 0 and chosen[1, 3] > 0 and (chosen == 0).any(), chosen
    best = torch.stack(tried).gather(0, chosen[None, ..., None].expand(1, 2, 6, WIDTH))[0]
    wanted = torch.where(wide, best, tried[0]) * deviation + mean
    assert relative(code.decode(packed, torch.float32), wanted) < 1e-6
    in_parts = [code.encode(part) for part in x.split(1, dim=1)]
    assert torch.equal(torch.cat([part["codes"] for part in in_parts], 1), packed["codes"])
    assert set(packed["gains"][..., 0].flatten().tolist()) == set((size + GAIN_ZERO).int().flatten().tolist())


def test_latents_of_few_bits_have_one_gain_for_most() -> None:
    """Where the source's coded cache has one of their own for all with six bits and more."""
    generator = torch.Generator().manual_seed(2)
    importance = [4.0**5] * 8 + [4.0**4] * 8 + [1.0] * 112
    layer = {"mean": [0.0] * 128, "deviation": [1.0] * 128, "importance": importance}
    levels = [[0.0], *(torch.linspace(-2, 2, 2**bits).tolist() for bits in range(1, 9))]
    code = {"layers": [layer], "levels": levels, "distortion": [4.0**-bits for bits in range(9)]}
    config = SimpleNamespace(num_hidden_layers=1, kv_lora_rank=96, qk_rope_head_dim=32, latent_code=code)
    x = torch.randn(1, 64, 128, generator=generator)
    x[:, ::2, :4] *= 6
    for average, same in ((3.0, modeling.WIDE_BITS), (2.0, modeling.WIDE_BITS_OF_FEW)):
        found = LatentCache(config, f"coded{average:g}").layers[0].code.encode(x)["gains"]
        wanted = {wide: transform_codes(code, average, wide)[0].encode(x)["gains"] for wide in (6, 8)}
        assert not torch.equal(wanted[6], wanted[8]), average
        assert torch.equal(found, wanted[same]), average


def test_many_tokens_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    code = transform_codes(prepared(), 2.5)[0]
    x = torch.randn(3, 50, WIDTH, generator=torch.Generator().manual_seed(4))
    whole = code.encode(x)
    monkeypatch.setattr(modeling, "ENCODED", 3 * 7 * WIDTH)
    parts = code.encode(x)
    assert set(parts) == set(code.stored) and all(torch.equal(parts[name], whole[name]) for name in whole)


@torch.no_grad()
def test_a_cache_that_was_packed_in_another_way(model: Any) -> None:
    cache = model.latent_cache("coded2.5", recent=4)
    model(torch.arange(3, 33)[None], past_key_values=cache)
    state = cache.state_dict()
    LatentCache.from_state(model.config, state)
    older = {name.replace("gains", "scales"): value for name, value in state.items()}
    with pytest.raises(ValueError, match=r"another way .*scales.* compute it again"):
        LatentCache.from_state(model.config, older)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_any_shape_mask_and_chunking_is_the_naive_cache(model: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    if seed % 4 == 1:
        # in many pieces, the last of which has the exact tokens as well
        monkeypatch.setattr(modeling, "LEAST_BLOCK", 7)
        monkeypatch.setattr(modeling, "UNPACKED", {"cpu": 1})

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    kind = ("int8", "int4", "int3", "int2", "coded2.5", "coded2")[seed % 6]
    batch, length, sink, recent = draw(1, 4), draw(40, 70), draw(0, 6), (0, 1, 5, 16)[draw(0, 4)]
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    pads = [draw(0, 9) if seed % 2 else 0 for _ in range(batch)]
    mask = torch.ones_like(ids)
    for text, pad in enumerate(pads):
        mask[text, :pad] = 0
    real = model.latent_cache(kind, sink=sink, recent=recent, max_length=length if seed % 3 == 0 else None)
    reference, at, others = naive(real, pads), 0, 0.0
    strange = naive(model.latent_cache("int2", sink=0, recent=0), pads)
    while at < length:
        size = min(length - at, (1, 1, 3, 30)[draw(0, 4)] if at else draw(10, 20))
        call = {
            "attention_mask": mask[:, : at + size],
            "position_ids": mask.cumsum(1).sub(1).clamp_min(0)[:, at : at + size],
        }
        found, wanted, wrong = (
            model(ids[:, at : at + size], past_key_values=cache, **call).logits for cache in (real, reference, strange)
        )
        seen = mask[:, at : at + size].bool()
        assert relative(found[seen], wanted[seen]) < 1e-7, (kind, at, size)
        others = max(others, float(relative(found[seen], wrong[seen])))
        at += size
        if at > 25 and draw(0, 5) == 0:
            removed = draw(1, 12)
            for cache in (real, reference, strange):
                cache.crop(-removed)
            at -= removed
        if at > 25 and draw(0, 5) == 0:
            order = torch.randperm(batch, generator=generator)
            ids, mask, pads = ids[order], mask[order], [pads[text] for text in order]
            for cache in (real, reference, strange):
                cache.reorder_cache(order)
            for layer in (*reference.layers, *strange.layers):
                layer.first = pads
    assert others > 1e-2, "rounding changes nothing, the test sees nothing"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["exact", "int8", "int3", "coded2.5"])
def test_stored_bytes_are_what_is_said(model: Any, kind: str) -> None:
    ids = torch.randint(3, VOCAB, (2, 200), generator=torch.Generator().manual_seed(2))
    sizes = []
    for length in (136, 200):
        cache = model.latent_cache(kind, recent=16)
        model(ids[:, :length], past_key_values=cache)
        tensors = [tensor for layer in cache.layers for tensor in layer.tensors().values()]
        sizes.append(sum(tensor.nbytes for tensor in tensors))
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert held <= 1.3 * sizes[-1], "there is much more in memory than is used"
    assert (sizes[1] - sizes[0]) / (2 * 64) == cache.bytes_per_token
    if kind == "exact":
        assert cache.bytes_per_token == LAYERS * WIDTH * 8
    if kind == "int3":
        assert cache.bytes_per_token == LAYERS * (-(-RANK * 2 // 8) + -(-RANK // 8) + ROPE + 8)
    if kind == "coded2.5":
        assert cache.bytes_per_token <= LAYERS * WIDTH * 2.5 / 8


@torch.no_grad()
@pytest.mark.parametrize("kind", ["exact", "int4"])
def test_a_step_copies_no_whole_cache(model: Any, kind: str) -> None:
    ids = torch.randint(3, VOCAB, (1, 2048 + 256), generator=torch.Generator().manual_seed(2))
    cache, moves, held = model.latent_cache(kind), 0, None
    layer = cache.layers[0]
    model(ids[:, :2048], past_key_values=cache)
    for place in range(2048, 2048 + 256):
        model(ids[:, place : place + 1], past_key_values=cache)
        buffer = layer.exact if kind == "exact" else layer.packed["codes"]
        moves += held is not None and held != buffer.data_ptr()
        held = buffer.data_ptr()
    assert buffer.shape[1] > 2048
    assert moves <= 3, f"{moves} of 256 steps copied what is held"


@torch.no_grad()
def test_one_block_is_unpacked_at_a_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, VOCAB, (2, 90), generator=torch.Generator().manual_seed(2))
    cache = model.latent_cache("int4", recent=0)
    model(ids[:, :70], past_key_values=cache)
    state = cache.state_dict()
    unpacked = []
    decode = GroupCode.decode

    def watched(self: Any, packed: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        unpacked.append(packed["codes"].shape[1])
        return decode(self, packed, *args)

    monkeypatch.setattr(GroupCode, "decode", watched)
    blocks = type(cache.layers[0]).blocks
    wanted = model(ids[:, 70:], past_key_values=LatentCache.from_state(model.config, state)).logits
    monkeypatch.setattr(type(cache.layers[0]), "blocks", lambda self, ordered, rows: blocks(self, 16, ordered))
    found = model(ids[:, 70:], past_key_values=cache).logits
    assert unpacked == [70] * LAYERS + [16, 16, 16, 16, 6] * LAYERS
    assert relative(found, wanted) < 1e-7


@torch.no_grad()
def test_many_queries_see_small_blocks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of all of them with a block are there at once."""
    ids = torch.randint(3, VOCAB, (2, 400), generator=torch.Generator().manual_seed(2))
    cache = model.latent_cache("int4", recent=0)
    model(ids[:, :360], past_key_values=cache)
    state, sizes = cache.state_dict(), []
    scores = modeling._scores

    def watched(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
        found: torch.Tensor = scores(query, key, *rest)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(modeling, "_scores", watched)
    found = []
    for most in (2**28, 2**14):
        monkeypatch.setattr(modeling, "SCORES", most)
        sizes.clear()
        found.append(model(ids[:, 360:], past_key_values=LatentCache.from_state(model.config, state)).logits)
        heads = model.config.num_attention_heads
        assert max(sizes) == 2 * heads * 40 * (360 if most == 2**28 else modeling.LEAST_BLOCK)
    assert relative(*found) < 1e-7


def test_fewer_bits_than_the_gains_take_are_no_cache(model: Any) -> None:
    fewest = GAIN_BITS / WIDTH
    assert packed_caches(model, fewest) == {} and list(packed_caches(model, fewest + 0.1)) == [f"coded{fewest + 0.1:g}"]
    assert f"more than {fewest:g} and at most 8" in why_no_cache(model)
    with pytest.raises(ValueError, match="more than"):
        model.latent_cache(f"coded{fewest:g}")


def test_names_with_and_without_what_generate_wants_before_them(model: Any) -> None:
    assert [model.latent_cache(kind).kind for kind in ("latent", "latent-int4", "int4")] == ["exact", "int4", "int4"]


def test_a_layer_that_no_bit_was_dealt_to(model: Any) -> None:
    layer = {"mean": [1.0] * 4, "deviation": [2.0] * 4, "importance": [1.0] * 4}
    code = TransformCode(layer, [0] * 4, [[0.0]])
    packed = code.encode(torch.randn(2, 5, 4))
    assert packed["codes"].shape == (2, 5, 0) and code.bytes_per_token == 2
    assert torch.equal(code.decode(packed, torch.float32), torch.ones(2, 5, 4))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["exact", "int4", "coded2.5"])
def test_a_prefix_is_kept_in_a_file_and_goes_on(model: Any, kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ids = torch.randint(3, VOCAB, (1, 60), generator=torch.Generator().manual_seed(4))
    cache = model.latent_cache(kind, sink=2, recent=8)
    model(ids[:, :40], past_key_values=cache)
    save_file(cache.state_dict(), tmp_path / "prefix.safetensors")
    again = LatentCache.from_state(model.config, load_file(tmp_path / "prefix.safetensors"))
    again.batch_repeat_interleave(2)
    wanted = model(ids[:, 40:], past_key_values=cache).logits
    assert relative(model(ids[:, 40:].repeat(2, 1), past_key_values=again).logits, wanted.repeat(2, 1, 1)) < 1e-12
    again.reset()
    assert again.get_seq_length() == 0 and not any(layer.tensors() for layer in again.layers)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["exact", "int4", "coded2"])
def test_a_prefix_goes_on_in_another_dtype(model: Any, kind: str) -> None:
    """One that was kept in float32 is read by a model in float64, and the other way round: within the rounding."""
    ids = torch.randint(3, VOCAB, (1, 60), generator=torch.Generator().manual_seed(4))
    cache = model.latent_cache(kind, sink=2, recent=8)
    model(ids[:, :40], past_key_values=cache)
    kept = {name: part.float() if part.is_floating_point() else part for name, part in cache.state_dict().items()}
    wanted = model(ids[:, 40:], past_key_values=cache).logits
    again = LatentCache.from_state(model.config, kept)
    assert relative(model(ids[:, 40:], past_key_values=again).logits, wanted) < 1e-4
    assert {layer.exact.dtype for layer in again.layers} == {layer.dtype for layer in again.layers} == {torch.float64}


def test_a_prefix_goes_on_where_the_model_is(model: Any) -> None:
    """What was read on another device is moved there with the first tokens that are added."""
    cache = model.latent_cache("int4", sink=2, recent=8)
    with torch.no_grad():
        model(torch.arange(3, 43)[None], past_key_values=cache)
    layer = cache.layers[0]
    layer.append(torch.empty(1, 1, 1, WIDTH, device="meta"))
    parts = [layer.exact, layer.first, layer.sinks, *layer.packed.values()]
    assert layer.packed and {part.device.type for part in parts} == {"meta"} and layer.device.type == "meta"


@torch.no_grad()
def test_masks_that_are_infinite(model: Any) -> None:
    """A text's padding sees nothing at all then, and the tokens behind it are what they are with a boolean mask."""
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(8))
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask[0, :, :, :7] = False
    infinite = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    places = torch.stack([torch.arange(40) - 7, torch.arange(40)]).clamp_min(0)
    found = []
    for given in (mask, infinite):
        cache, logits = model.latent_cache("int4", sink=2, recent=4), []
        for part in (slice(0, 3), slice(3, 30), slice(30, 40)):
            step = {"attention_mask": given[:, :, part, : part.stop], "position_ids": places[:, part]}
            logits.append(model(ids[:, part], past_key_values=cache, **step).logits)
        found.append(torch.cat(logits, dim=1))
    assert relative(found[1][0, 7:], found[0][0, 7:]) < 1e-12 and relative(found[1][1], found[0][1]) < 1e-12


def test_continuous_batching_is_refused(model: Any) -> None:
    """It hands in a cache of its own, which would hold the expanded heads of all tokens."""
    with torch.no_grad(), pytest.raises(ValueError, match="continuous batching"):
        model(torch.arange(3, 9)[None], cache=object())


def greedy(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return generate(model, ids, max_new_tokens=12, min_new_tokens=12, **kwargs)


def test_generate_reads_the_packed_cache(model: Any) -> None:
    ids = torch.randint(3, VOCAB, (2, 90), generator=torch.Generator().manual_seed(7))
    for beams in (1, 3):
        wanted = naive(model.latent_cache("int2", sink=1, recent=8), [0] * 2 * beams)
        found = greedy(model, ids, num_beams=beams, past_key_values=model.latent_cache("int2", sink=1, recent=8))
        assert torch.equal(found, greedy(model, ids, num_beams=beams, past_key_values=wanted))
    default = greedy(model, ids, cache_implementation="latent-int2")
    assert torch.equal(default, greedy(model, ids, past_key_values=model.latent_cache("int2")))
    exact = greedy(model, ids)
    assert torch.equal(greedy(model, ids, cache_implementation="latent"), exact)
    assert torch.equal(greedy(model, ids, cache_implementation="static", disable_compile=True), exact)
    coarse = greedy(model, ids, past_key_values=model.latent_cache("int2", sink=0, recent=0))
    assert not torch.equal(coarse, exact), "rounding changes nothing, the test sees nothing"


@torch.no_grad()
def test_one_mask_of_all_texts(model: Any) -> None:
    """Additive and infinite where nothing is seen, a whole piece of the cache for one query."""
    ids = torch.randint(3, VOCAB, (2, 60), generator=torch.Generator().manual_seed(2))
    before = torch.zeros(50, 50, dtype=torch.float64).masked_fill(torch.ones(50, 50).triu(1).bool(), float("-inf"))
    behind = torch.zeros(10, 60, dtype=torch.float64).masked_fill(torch.ones(10, 60).triu(51).bool(), float("-inf"))
    behind[3, :50] = float("-inf")
    found = []
    for rows in ([0, 1], [0], [1]):
        cache = model.latent_cache("int4", recent=0)
        model(ids[rows, :50], past_key_values=cache, attention_mask=before[None, None])
        assert cache.layers[0].num_packed == 50
        found.append(model(ids[rows, 50:], past_key_values=cache, attention_mask=behind[None, None]).logits)
    assert bool(found[0].isfinite().all())
    assert relative(found[0], torch.cat(found[1:])) < 1e-9


@torch.no_grad()
def test_an_emptied_cache_learns_where_texts_begin_anew(model: Any) -> None:
    ids = torch.randint(3, VOCAB, (2, 60), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    used, fresh = (model.latent_cache("int2", recent=60) for _ in range(2))
    model(ids, past_key_values=used)
    used.crop(-60)
    assert used.get_seq_length() == 0
    found = []
    for cache in (used, fresh):
        for layer in cache.layers:
            layer.recent, layer.step = 0, 1
        model(ids[:, :50], past_key_values=cache, attention_mask=mask[:, :50])
        found.append(model(ids[:, 50:], past_key_values=cache, attention_mask=mask).logits)
    assert used.layers[0].num_packed == 60 and used.layers[0].first.tolist() == [0, 7]
    assert torch.equal(*found)


@torch.no_grad()
def test_an_emptied_cache_forgets_padding(model: Any) -> None:
    """The first tokens, which stay exact, are then those of texts without padding, however many there are."""
    ids = torch.randint(3, VOCAB, (2, 60), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    used, fresh = (model.latent_cache("int2", sink=3, recent=0) for _ in range(2))
    for layer in used.layers:
        layer.recent, layer.step = 60, 60
    model(ids, past_key_values=used, attention_mask=mask)
    assert used.layers[0].first.tolist() == [0, 7]
    used.crop(-60)
    for layer in used.layers:
        layer.recent, layer.step = 0, 1
    found = []
    for cache in (used, fresh):
        model(ids[:, :50], past_key_values=cache)
        found.append(model(ids[:, 50:], past_key_values=cache).logits)
    assert used.layers[0].first.tolist() == [0, 0] and torch.equal(*found)


def test_generate_takes_one_cache(model: Any) -> None:
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match="leave one of them out"):
        greedy(model, ids, past_key_values=model.latent_cache(), cache_implementation="latent-int4")
    with pytest.raises(ValueError, match='use cache_implementation="latent-int8"'):
        greedy(model, ids, cache_implementation="quantized", cache_config={"backend": "quanto"})


def test_padding_changes_nothing(model: Any) -> None:
    """With no newest tokens exact, a padded text has the same tokens packed as the text alone."""
    ids = torch.randint(3, VOCAB, (1, 30), generator=torch.Generator().manual_seed(8))
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], dim=1)
    both = torch.cat([padded, torch.randint(3, VOCAB, (1, 37), generator=torch.Generator().manual_seed(9))])
    mask = (both != 0).long()
    cache = model.latent_cache("int2", sink=3, recent=0)
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    found = model.generate(both, attention_mask=mask, past_key_values=cache, **settings)
    alone = greedy(model, ids, past_key_values=model.latent_cache("int2", sink=3, recent=0))
    assert torch.equal(found[0, 37:], alone[0, 30:40])
    others = model.latent_cache("int2", sink=0, recent=0)
    assert not torch.equal(found, model.generate(both, attention_mask=mask, past_key_values=others, **settings))


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(37,), (3, 4, 30), (1,) * 37])
def test_first_tokens_are_those_behind_all_padding(model: Any, sizes: tuple[int, ...]) -> None:
    """However the texts come: one may be padding alone at first."""
    ids = torch.randint(3, VOCAB, (3, 37), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[2, :2] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, start = model.latent_cache("int2", sink=3, recent=2), 0
    for size in sizes:
        part = slice(start, start + size)
        model(ids[:, part], attention_mask=mask[:, : part.stop], position_ids=places[:, part], past_key_values=cache)
        start += size
    layers: list[Any] = cache.layers
    assert all(layer.first.tolist() == [7, 0, 2] and not layer.waiting for layer in layers)
    (text, place), other = (0, slice(7, 10)), model.latent_cache("exact")
    model(ids, attention_mask=mask, position_ids=places, past_key_values=other)
    assert torch.allclose(layers[0].sinks[text], other.layers[0].exact[text, place], atol=1e-9)


@torch.no_grad()
def test_a_compiled_step_reads_the_packed_cache(model: Any) -> None:
    """In one graph, and not in a new one for every length: more tokens come, and some are packed five times."""
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(2, 60, model.config.hidden_size, generator=torch.Generator().manual_seed(12)).double()
    mask = torch.ones(2, 1, 60, 60, dtype=torch.bool).tril()
    mask[1, :, :, :3] = False
    angles = model.model.rotary_emb(hidden, torch.arange(60)[None])
    caches = [model.latent_cache("int4", recent=4, max_length=100) for _ in range(2)]

    def step(cache: Any, start: int, end: int, run: Any = attention) -> torch.Tensor:
        places = tuple(part[:, start:end] for part in angles)
        out: torch.Tensor = run(hidden[:, start:end], places, mask[:, :, start:end, :end], past_key_values=cache)[0]
        return out

    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=count, fullgraph=True)
    packed = set()
    for cache in caches:
        step(cache, 0, 40)
    for start in range(40, 60):
        wanted, found = step(caches[0], start, start + 1), step(caches[1], start, start + 1, compiled)
        assert relative(found, wanted) < 1e-9
        packed.add(caches[1].layers[0].num_packed)
    assert len(packed) == 6 and 0 < len(graphs) <= 5
    torch._dynamo.reset()


def test_rejected_drafts_leave_no_trace(model: Any) -> None:
    ids = torch.randint(3, VOCAB, (1, 80), generator=torch.Generator().manual_seed(10))
    alone = greedy(model, ids, past_key_values=model.latent_cache("int8", recent=24))
    drafted = greedy(
        model,
        ids,
        past_key_values=model.latent_cache("int8", recent=24),
        prompt_lookup_num_tokens=3,
        max_matching_ngram_size=1,
    )
    assert torch.equal(drafted, alone)
    with pytest.raises(ValueError, match="negative"):
        model.latent_cache().layers[0].crop(3)


def test_what_cannot_be_is_said(model: Any, ours: Load) -> None:
    with pytest.raises(ValueError, match="no latent cache of kind 'int5'"):
        model.latent_cache("int5")
    with pytest.raises(ValueError, match="at most 8 bits"):
        model.latent_cache("coded0.1")
    with pytest.raises(ValueError, match="transmla quantise"):
        ours().latent_cache("coded3")
    cache = model.latent_cache("int4", max_length=10)
    with pytest.raises(ValueError, match="made for 10 tokens"), torch.no_grad():
        model(torch.ones(1, 11, dtype=torch.long), past_key_values=cache)


def test_the_class_that_a_folder_brings(model: Any) -> None:
    """With transformers alone; a cache may come from either copy of the file."""
    folder = model.config._name_or_path
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    assert type(remote).__module__ != type(model).__module__
    ids = torch.randint(3, VOCAB, (2, 90), generator=torch.Generator().manual_seed(7))
    wanted = greedy(model, ids, cache_implementation="latent-int2")
    assert torch.equal(greedy(remote, ids, cache_implementation="latent-int2"), wanted)
    assert torch.equal(greedy(remote, ids, past_key_values=model.latent_cache("int2")), wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_float16_cannot_hold_saturates(bits: int) -> None:
    """Scales and zero points are float16: a value beyond 65,504 must not make its group infinite."""
    code = GroupCode(32, 8, bits)
    x = torch.randn(1, 1, 40, generator=torch.Generator().manual_seed(1))
    x[..., 3], x[..., 35] = 1e5, -1e9
    found = code.decode(code.encode(x), torch.float32)
    assert found.isfinite().all() and found[..., 3] > 6e4 and found[..., 35] < -6e4
