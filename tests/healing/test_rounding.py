"""Training with rounded latents: what a token attends to is what the packed cache holds when it comes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch._dynamo.backends.registry import lookup_backend

import transmla
from tests.families import lively_config, lively_model
from tests.healing.test_student import unfolded
from tests.model.test_attention import relative
from transmla.cli import main
from transmla.errors import RecipeError
from transmla.evaluation.perplexity import perplexity, ratio, text_windows
from transmla.healing.choice import check
from transmla.healing.student import teach
from transmla.healing.teacher import OnlineTeacher
from transmla.healing.train import autocast, recompute_activations
from transmla.model.loading import load, load_tokenizer
from transmla.model.rounding import round_latents
from transmla.recipe import Healing
from transmla.text.sources import read_text
from transmla.train.losses import Objective

LENGTH = 40


def lively(seed: int = 1) -> Any:
    """With weights large enough that rounding is seen in the logits."""
    model = unfolded(lively_config(), seed).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.mul_(8)
    return model


def texts(count: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 200, (count, length), generator=torch.Generator().manual_seed(count))


def through_cache(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Logits of a text that is read token by token."""
    cache = model.latent_cache(**settings)
    tokens = ids.split(1, dim=1)
    return torch.cat([model(token, past_key_values=cache).logits for token in tokens], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("bits", "sink", "recent"), [(2, 0, 0), (4, 0, 0), (2, 3, 0), (2, 4, 1), (3, 2, 6), (2, 0, 13)]
)
def test_a_window_is_read_as_through_the_cache(bits: int, sink: int, recent: int, implementation: str) -> None:
    model, ids = lively(), texts(2)
    model.set_attn_implementation(implementation)
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    exact = model(ids, use_cache=False).logits
    wanted = through_cache(model, ids, kind=f"int{bits}", sink=sink, recent=recent)
    other = through_cache(model, ids, kind=f"int{bits}", sink=sink, recent=recent + 2)
    rounding = round_latents(model, bits, recent, sink)
    rounding.begin(positions)
    found = model(ids, position_ids=positions, use_cache=False).logits
    # eager attention has a softmax in float32
    assert relative(found, wanted) < (1e-6 if implementation == "sdpa" else 1e-4)
    for wrong in (exact, other):
        assert relative(found, wrong) > 1e-3, "rounding changes nothing, the test sees nothing"
    rounding.begin(None)
    assert torch.equal(model(ids, use_cache=False).logits, exact)


@torch.no_grad()
def test_documents_in_a_window_have_caches_of_their_own() -> None:
    model, (first, second) = lively(), (texts(1, 23), texts(1, 17))
    wanted = torch.cat([through_cache(model, ids, kind="int2", sink=2, recent=3) for ids in (first, second)], dim=1)
    rounding = round_latents(model, 2, recent=3, sink=2)
    positions = torch.cat([torch.arange(23), torch.arange(17)])[None]
    rounding.begin(positions)
    ids = torch.cat([first, second], dim=1)
    assert relative(model(ids, position_ids=positions, use_cache=False).logits, wanted) < 1e-6


def test_gradients_pass_the_rounding() -> None:
    """As if it were not there: that of a sum of the rounded keys is that of a sum of the exact ones."""
    rounding = round_latents(lively(), 2, recent=0)
    key = torch.randn(1, 1, 5, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 1, 5, 12, dtype=torch.float64)
    rounded = rounding.rounded(key)
    assert not torch.allclose(rounded, key, atol=0.05)
    assert torch.equal(rounded, rounding.code.decode(rounding.code.encode(key[:, 0]), key.dtype)[:, None])
    (rounded * weights).sum().backward()
    assert key.grad is not None and torch.equal(key.grad, weights)


@pytest.mark.parametrize(("checkpointing", "precision"), [(False, "float32"), (True, "float32"), (True, "bfloat16")])
def test_what_makes_the_latents_learns(checkpointing: bool, precision: str) -> None:
    source = lively_model(lively_config())
    context = autocast(precision, torch.device("cpu"))
    teacher = OnlineTeacher(source, context)
    student = teach(lively().float(), teacher, Objective(), latent_bits=2, latent_recent=2)
    if checkpointing:
        recompute_activations(student)
    ids = texts(1)
    given = {"position_ids": torch.arange(LENGTH)[None], "labels": ids.roll(-1, 1), "index": torch.zeros(1).long()}
    with context():
        loss = student.train()(input_ids=ids, **given)["loss"]
    loss.backward()
    for layer in student.model.layers:
        for weight in (layer.self_attn.kv_a_proj_with_mqa.weight, layer.self_attn.kv_b_proj.weight):
            assert weight.grad is not None and (weight.grad != 0).all()
    assert student.rounding is not None
    student.rounding.recent = 1000
    exact = student(input_ids=ids, **given)["loss"]
    assert float(exact.detach()) != pytest.approx(float(loss.detach()), rel=1e-4)
    written = student.eval()(input_ids=ids).logits
    del student.rounding
    assert torch.equal(student(input_ids=ids).logits, written), "what it writes is not rounded"


def test_weights_learn_to_live_with_it(tmp_path: Path) -> None:
    """In a basis that is bad for equal bits: the same steps with and without rounding, read through a real cache."""
    transmla.convert("smoke", tmp_path / "plain", refine="off")
    transmla.quantise(tmp_path / "plain", tmp_path / "start", tokens=4096)
    settings: dict[str, Any] = {
        "tokens": 24576, "window": 128, "batch": 4, "micro": 4, "evaluations": 1, "rate": 5e-3,
        "heldout": 4, "data": "stories", "precision": "float32", "source": "stories260k", "device": "cpu",
    }  # fmt: skip
    text = read_text("tinystories-valid", 60_000, evaluation=True)
    ids = load_tokenizer("stories260k")(text, verbose=False).input_ids
    windows = text_windows(ids, 128, 96, "tinystories-valid")
    measured = {}
    for bits in (None, 2):
        out = tmp_path / f"healed-{bits}"
        report = transmla.heal(tmp_path / "start", out, latent_bits=bits, latent_recent=1, **settings)
        assert report.latent_bits == bits
        model = load(out, dtype=torch.float32)
        measured[bits] = perplexity(
            model, windows, cache=lambda m=model: m.latent_cache("int2", recent=1), batch=96, chunk=1
        )
    better = ratio(measured[2], measured[None])
    print(better)
    assert better.value + 4 * better.standard_error < 1
    entry = json.loads((tmp_path / "healed-2" / "transmla.json").read_text())["healed"][-1]
    assert (entry["settings"]["latent_bits"], entry["settings"]["latent_recent"]) == (2, 1)
    assert "latent-int2" in (tmp_path / "healed-2" / "README.md").read_text()
    assert "latent-int2" not in (tmp_path / "healed-None" / "README.md").read_text()
    assert "as in a cache latent-int2" in str(report)


def test_bits_of_no_cache_are_refused() -> None:
    with pytest.raises(RecipeError, match="there are caches of 2, 3, 4, 8 bits"):
        Healing().with_overrides(latent_bits=5)
    assert CliRunner().invoke(main, ["heal", "OUT", "--latent-bits", "5"]).exit_code == 2


def test_windows_in_which_nothing_would_be_rounded_are_refused() -> None:
    check(Healing(latent_bits=2, latent_recent=31, window=64), "cpu")
    check(Healing(latent_recent=64, window=64), "cpu")
    with pytest.raises(RecipeError, match="no latent would be rounded") as refused:
        check(Healing(latent_bits=2, latent_recent=32, window=64), "cpu")
    assert "--latent-recent 31" in str(refused.value)


# dynamo looks at the gradients of what it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_share_a_graph() -> None:
    source = lively_model(lively_config())
    teacher = OnlineTeacher(source, autocast("float32", torch.device("cpu")))
    student = teach(lively().float(), teacher, Objective(), latent_bits=2, latent_recent=2).train()
    ids = texts(1)
    given = {"position_ids": torch.arange(LENGTH)[None], "labels": ids.roll(-1, 1), "index": torch.zeros(1).long()}
    weights = [layer.self_attn.kv_a_proj_with_mqa.weight for layer in student.model.layers]
    found, graphs = [], []

    def traced(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    for _ in range(2):
        loss = student(input_ids=ids, **given)["loss"]
        found.append([loss.detach(), *torch.autograd.grad(loss, weights)])
        for layer in student.model.layers:
            layer.compile(backend=traced)
    assert len(graphs) == 1
    assert all(relative(one, other) < 1e-4 for one, other in zip(*found, strict=True))
