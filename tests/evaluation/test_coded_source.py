"""The transform coded cache of a source: its keys without their rotation, in every family, and what it loses."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers.cache_utils import Cache, DynamicCache

import transmla
from tests.evaluation.test_quantised_cache import Naive
from tests.families import LLAMA3, YARN, MakeSource
from transmla.checkpoint.read import open_source
from transmla.cli import main
from transmla.errors import RecipeError
from transmla.evaluation.coded_source import CodedSource, rotations
from transmla.evaluation.evaluate import quantised_sizes
from transmla.evaluation.perplexity import perplexity
from transmla.evaluation.quantised_cache import packed_bytes_per_token, packed_caches
from transmla.model.loading import load_any, load_tokenizer, open_model
from transmla.text.sources import read_text
from transmla.text.windows import calibration_tokens

# newest tokens that stay exact: few, so that much is packed
STEP = 16


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"rope": LLAMA3}),
        ("llama", {"rope": YARN}),
        ("glm4", {}),  # interleaved pairs, half of the values
        ("gpt_neox", {}),  # half-split pairs, half of the values
        ("cohere2", {}),  # layers that do not turn
        ("smollm3", {}),
        ("gemma3_text", {}),  # two thetas
    ],
)
def test_keys_without_their_rotation(family: str, settings: dict[str, Any], lively: MakeSource) -> None:
    """A text of one token attends to itself whatever its position is, so its keys differ in the rotation alone."""
    folder = lively(model_type=family, **settings)
    model = load_any(folder, dtype=torch.float32)

    @torch.no_grad()
    def keys_at(position: int) -> list[torch.Tensor]:
        cache = DynamicCache()
        model(torch.tensor([[7]]), position_ids=torch.tensor([[position]]), past_key_values=cache)
        return [layer.keys for layer in cache.layers]

    moved = 0.0
    for still, turned, rotation in zip(
        keys_at(0), keys_at(37), rotations(open_source(folder), torch.device("cpu")), strict=True
    ):
        scale = float(still.abs().max())
        assert float((rotation.turned(turned, 37, -1) - still).abs().max()) < 1e-5 * scale
        assert float((rotation.turned(still, 37) - turned).abs().max()) < 1e-5 * scale
        moved = max(moved, float((turned - still).abs().max()) / scale)
    assert moved > 0.1, "nothing turns, the test sees nothing"


@pytest.fixture(scope="module")
def coded() -> tuple[Any, CodedSource, torch.Tensor]:
    """The embedded model, its code and windows of another text."""
    model, tokenizer = load_any("stories260k", dtype=torch.float32), load_tokenizer("stories260k")
    model.requires_grad_(True)
    ids_NT = calibration_tokens("stories", tokenizer, 4096, 512).ids_NT
    found = CodedSource(model, open_model("stories260k"), ids_NT)
    assert all(weight.requires_grad for weight in model.parameters())
    text = read_text("tinystories-valid", 6000, evaluation=True)
    return model, found, torch.tensor(tokenizer(text).input_ids)[None, :512]


def test_it_loses_less_than_other_caches_of_the_source(coded: tuple[Any, CodedSource, torch.Tensor]) -> None:
    model, source, ids_NT = coded
    exact = perplexity(model, ids_NT).nats
    lost, stored = {}, {}
    makers = {f"coded {bits}": lambda bits=bits: source.cache(bits, STEP) for bits in (1, 2.5, 8)}
    for name, make in (makers | packed_caches(model, 2, STEP)).items():
        made: list[Cache] = []
        lost[name] = (
            perplexity(model, ids_NT, cache=lambda m=made, k=make: m.append(k()) or m[-1], chunk=STEP).nats - exact
        )
        stored[name] = packed_bytes_per_token(made[0])
    values = model.config.num_hidden_layers * 2 * model.config.num_key_value_heads * model.config.head_dim
    for bits in (1, 2.5, 8):
        assert 0.9 * values * bits / 8 < stored[f"coded {bits}"] <= values * bits / 8
    assert abs(lost["coded 8"]) < 1e-3 < lost["coded 2.5"] < 0.5 * lost["coded 1"], lost
    for other in ("KIVI 2 bits", "rotated 2 bits"):
        assert stored["coded 2.5"] < stored[other] and lost["coded 2.5"] < lost[other]


@torch.no_grad()
def test_twice_the_bits_diverge_less(coded: tuple[Any, CodedSource, torch.Tensor]) -> None:
    """From the exact cache, in nats per token: losses on the text itself are below their noise at 3 bits."""
    model, source, ids_NT = coded
    exact_NTV = model(ids_NT, use_cache=False).logits.log_softmax(-1)
    lost = []
    for bits in (0.75, 1.5, 3, 6):
        cache = source.cache(bits, STEP)
        parts = [model(part, past_key_values=cache).logits for part in ids_NT.split(STEP, dim=1)]
        found_NTV = torch.cat(parts, dim=1).log_softmax(-1)
        lost.append(float((exact_NTV.exp() * (exact_NTV - found_NTV)).sum(-1).mean()))
    assert all(more < 0.5 * fewer for fewer, more in itertools.pairwise(lost[1:])) and lost[1] < lost[0], lost


def test_the_model_reads_what_is_packed(coded: tuple[Any, CodedSource, torch.Tensor]) -> None:
    model, source, ids_NT = coded
    codes = [layer._code for layer in source.cache(2).layers]
    found = perplexity(model, ids_NT, cache=lambda: source.cache(2, STEP), chunk=STEP)
    wanted = perplexity(model, ids_NT, cache=lambda: Cache(layers=[Naive(code, STEP) for code in codes]), chunk=STEP)
    assert found.nats == pytest.approx(wanted.nats, abs=1e-5)


def test_evaluation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"text": "tinystories-valid", "windows": 2, "dtype": "float32"}
    report = transmla.evaluate("stories260k", quantised=[3, 1.5], coded_source=True, **settings)
    rows = {row["cache"]: row for row in report.model["quantised"] if row}
    assert list(rows) == ["KIVI 3 bits", "rotated 3 bits", "KVTC-like 3 bits", "KVTC-like 1.5 bits"]
    assert rows["KVTC-like 3 bits"]["bytes_per_token"] == pytest.approx(120, rel=0.1) and not report.skipped
    assert rows["KVTC-like 1.5 bits"]["bytes_per_token"] == pytest.approx(60, rel=0.1)
    (left_out,) = transmla.evaluate("stories260k", quantised=[8, 5], **settings).skipped
    assert "--coded-source" in left_out.why and "5 bits" in left_out.part
    with pytest.raises(RecipeError, match="no cache has so many bits"):
        transmla.evaluate("stories260k", quantised=[5], **settings)
    with pytest.raises(RecipeError, match="--quantised"):
        transmla.evaluate("stories260k", coded_source=True, **settings)
    refused = CliRunner().invoke(main, ["eval", "stories260k", "--coded-source", "-q"])
    assert refused.exit_code == 10 and "--quantised 4,3,2" in refused.output


def test_sizes_of_rounded_caches_where_the_dtype_is_the_stored_one() -> None:
    settings: dict[str, Any] = {"text": "tinystories-valid", "windows": 1, "length": 64}
    sizes = []
    for dtype in ("auto", "bfloat16"):
        report = transmla.evaluate("stories260k", dtype=dtype, **settings)
        assert report.model["dtype"] == ("float32" if dtype == "auto" else dtype)
        sizes.append(quantised_sizes(report.model, dtype))
    assert sizes[0] == sizes[1]
