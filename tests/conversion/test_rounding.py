"""Refinement with rounded latents: what a token attends to is what the packed cache of the written folder holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.conversion.made import QUICK, Convert, check, digest
from tests.conversion.test_own_form import in_float64, sizes_of
from tests.families import THETA, MakeSource, lively_config, lively_model
from tests.maths.weights import lively as lively_values
from tests.maths.weights import mla_weights, relative
from transmla.cli import main
from transmla.conversion import flow
from transmla.conversion import run as running
from transmla.conversion.block import through
from transmla.conversion.plan import plan
from transmla.errors import DestinationError, RecipeError
from transmla.evaluation.perplexity import perplexity
from transmla.maths.attention import mla_attention
from transmla.model.loading import load, load_any
from transmla.model.rounding import SINK, Rounding

LENGTH, RECENT = 24, 3
IDS = torch.randint(3, 512, (2, LENGTH), generator=torch.Generator().manual_seed(1))
# what a layer attends to: keys of both kinds [B, 2 T, k], and which of them each token finds [T, 2 T]
Read = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Read]:
    """All that is attended to of rounded latents, in order."""
    kept: list[Read] = []
    read = Rounding.read

    def watched(rounding: Rounding, *args: Any) -> Read:
        kept.append(read(rounding, *args))
        return kept[-1]

    monkeypatch.setattr(Rounding, "read", watched)
    return kept


@pytest.fixture
def heldout(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The windows [N, T] of each conversion that are held out; they run in float32."""
    monkeypatch.setattr(running, "narrow_dtype", lambda device: None)
    kept: list[torch.Tensor] = []
    measure = flow.measure

    def watched(run: Any, streams: Any) -> Any:
        kept.append(run.text.ids_NT[-streams.num_heldout :])
        return measure(run, streams)

    monkeypatch.setattr(flow, "measure", watched)
    return kept


@torch.no_grad()
def difference(model: Any, ids_BT: torch.Tensor, reads: list[Read], kind: str, recent: int = RECENT) -> float:
    """Of what each layer attends to at every token and what a `LatentCache` holds then, read token by token: the
    largest over the layers, relative."""
    cache = model.latent_cache(kind, sink=SINK, recent=recent)
    wanted: list[list[torch.Tensor]] = [[] for _ in reads]
    found: list[list[torch.Tensor]] = [[] for _ in reads]
    length = ids_BT.shape[1]
    for token in range(length):
        for layer, (both_BSk, seen_TS) in enumerate(reads if token else ()):
            exact_S, rounded_S = seen_TS[token, :token], seen_TS[token, length : length + token]
            assert not (exact_S & rounded_S).any(), "a token is attended to twice"
            at_S = exact_S | rounded_S
            read_BSk = both_BSk[:, :token].where(exact_S[:, None], both_BSk[:, length : length + token])
            held_BSk = torch.cat([block_B1Nk[:, 0] for _, block_B1Nk in cache.layers[layer].blocks()], dim=1)
            found[layer].append(read_BSk[:, at_S].flatten())
            wanted[layer].append(held_BSk[:, at_S].flatten())
        model(ids_BT[:, token : token + 1], past_key_values=cache)
    pairs = zip(found, wanted, strict=True)
    return max(relative(torch.cat(of_found), torch.cat(of_wanted)) for of_found, of_wanted in pairs)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_a_block_reads_what_the_cache_holds(
    model_type: str, bits: int, reads: list[Read], request: pytest.FixtureRequest
) -> None:
    """Of inputs and of features, with biases, with windows and capped scores. What a layer has made of rounded latents
    is what the next one makes its own of, so that an error anywhere is one everywhere behind it."""
    source: Any = lively_model(lively_config(**sizes_of(model_type) | {"kv_heads": 2})).double()
    own, made = in_float64(source, latent=6)
    request.getfixturevalue("nothing_rounds")
    layers, weights = [layer for layer, _ in made], [mla for _, mla in made]
    base = own.get_submodule(layers[0].family.layers.rpartition(".")[0])
    stream: list[torch.Tensor] = []
    hook = base.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: stream.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        own(IDS)
        hook.remove()
        rounding = Rounding(6, weights[0].k_rope_eD.shape[0], bits, RECENT)
        through(layers, weights, stream[0], read=rounding.read)
    # Gemma 2 attends in float32
    assert difference(own, IDS, reads, f"int{bits}") < 1e-5
    assert difference(own, IDS, reads, f"int{bits}", RECENT + 2) > 1e-3
    assert difference(own, IDS, reads, "exact") > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_conversion_measures_what_the_cache_of_its_folder_gives(
    lively: MakeSource, run: Convert, reads: list[Read], heldout: list[torch.Tensor], model_type: str
) -> None:
    """Stock folders, whose latents are scaled, whose rotary keys are interleaved, and whose queries have no bias."""
    settings: dict[str, Any] = {
        "refine": "fast", "refinement": QUICK, "latent": 12, "rope": 8, "latent_bits": 2, "latent_recent": RECENT,
    }  # fmt: skip
    report = run(lively(model_type=model_type), **settings)
    assert report.plan.form == "deepseek_v3"
    model = load(report.destination, dtype=torch.float32)
    # a value in the middle between two levels may be rounded either way
    last = reads[-report.plan.mla.num_hidden_layers :]
    assert difference(model, heldout[0], last, "int2") < 0.01
    assert difference(model, heldout[0], last, "exact") > 0.05
    nats = {
        kind: perplexity(
            model, heldout[0], chunk=1, cache=lambda kind=kind: model.latent_cache(kind, sink=SINK, recent=RECENT)
        ).nats
        for kind in ("int2", "exact")
    }
    apart = abs(nats["int2"] - nats["exact"])
    assert abs(report.heldout.converted - nats["int2"]) < 0.1 * apart, nats


@pytest.mark.parametrize("block_layers", [None, 2])
def test_losses_are_those_of_the_cache(
    lively: MakeSource, run: Convert, heldout: list[torch.Tensor], block_layers: int | None
) -> None:
    """Before and after, and in every block: the last one is compared with two loaded models."""
    settings: dict[str, Any] = {
        "refine": "fast", "refinement": QUICK, "latent": 12, "rope": 8, "theta": THETA, "block_layers": block_layers,
    }  # fmt: skip
    source = lively()
    exact = run(source, "exact", **settings)
    report = run(source, latent_bits=2, latent_recent=RECENT, **settings)
    original, model = (load_any(folder, dtype=torch.float32) for folder in (source, report.destination))
    with torch.no_grad():
        target = original(heldout[-1]).logits.double().log_softmax(-1)

        def divergence(kind: str) -> float:
            cache = model.latent_cache(kind, sink=SINK, recent=RECENT)
            logits = [model(token, past_key_values=cache).logits for token in heldout[-1].split(1, dim=1)]
            return float((target.exp() * (target - torch.cat(logits, 1).double().log_softmax(-1))).sum(-1).mean())

        wanted, wrong = divergence("int2"), divergence("exact")
    assert report.blocks[-1].loss_after == pytest.approx(wanted, abs=0.1 * abs(wanted - wrong))
    for rounded, plain in zip(report.blocks, exact.blocks, strict=True):
        assert rounded.loss_after < rounded.loss_before
        assert rounded.loss_before != pytest.approx(plain.loss_before, rel=1e-4)


def test_gradients_pass_the_rounding() -> None:
    """As if a constant had been added to what is cached."""
    mla, x_TD = mla_weights(), lively_values(LENGTH, 24, seed=9)
    rounding = Rounding(10, 6, 2, 0)
    offset: list[torch.Tensor] = []

    def kept(key_Sk: torch.Tensor, seen_TS: torch.Tensor) -> Read:
        both, seen = rounding.read(key_Sk, seen_TS)
        offset.append((both - torch.cat([key_Sk, key_Sk])).detach())
        return both, seen

    def added(key_Sk: torch.Tensor, seen_TS: torch.Tensor) -> Read:
        return torch.cat([key_Sk, key_Sk]) + offset[0], rounding.read(key_Sk, seen_TS)[1]

    def cut(key_Sk: torch.Tensor, seen_TS: torch.Tensor) -> Read:
        both, seen = rounding.read(key_Sk, seen_TS)
        return torch.cat([key_Sk, both[len(key_Sk) :].detach()]), seen

    gradients = []
    for read in (kept, added, cut):
        leaves = [leaf.clone().requires_grad_() for leaf in (mla.kv_down_rD, mla.k_rope_eD)]
        learning = replace(mla, kv_down_rD=leaves[0], k_rope_eD=leaves[1])
        mla_attention(x_TD, learning, read=read).sin().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for through_rounding, wanted, wrong in zip(*gradients, strict=True):
        assert through_rounding is not None and wanted is not None and wrong is not None
        assert relative(through_rounding, wanted) < 1e-12
        assert relative(wrong, wanted) > 0.1


def test_latents_that_are_all_exact_change_nothing() -> None:
    mla, x_TD = mla_weights(), lively_values(LENGTH, 24, seed=9)
    exact_TF = mla_attention(x_TD, mla)
    assert relative(mla_attention(x_TD, mla, read=Rounding(10, 6, 2, LENGTH).read), exact_TF) < 1e-12
    assert relative(mla_attention(x_TD, mla, read=Rounding(10, 6, 2, LENGTH // 3).read), exact_TF) > 0.01


def test_without_bits_it_is_the_conversion_that_it_was(lively: MakeSource, run: Convert) -> None:
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    plain = digest(run(lively(), "plain", **settings).destination)
    assert digest(run(lively(), "recent", latent_recent=1, **settings).destination) == plain
    assert digest(run(lively(), "bits", latent_bits=8, latent_recent=1, **settings).destination) != plain


def test_it_is_said_everywhere(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('refine = "fast"\nlatent_bits = 3\nlatent_recent = 5\ntheta = 10000.0\n', encoding="utf-8")
    report = run(lively(), recipe=recipe, refine=None, refinement=QUICK)
    assert "in a cache latent-int3, in the refinement and the perplexity" in str(report)
    provenance = json.loads((report.destination / "transmla.json").read_text("utf-8"))
    assert (provenance["recipe"]["latent_bits"], provenance["recipe"]["latent_recent"]) == (3, 5)
    assert "as in a cache `latent-int3`" in (report.destination / "README.md").read_text("utf-8")
    planned = plan(str(lively()), latent_bits=3, latent_recent=5)
    assert any("the cache latent-int3 holds them, the newest 5 tokens" in note for note in planned.notes)
    plain = run(lively(), "plain", theta=THETA)
    assert "latent-int" not in str(plain) + (plain.destination / "README.md").read_text("utf-8")
    assert not any("latent-int" in note for note in plan(str(lively())).notes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"refine": "off", "latent_bits": 2}, ("no weight would learn", "--refine fast or full")),
        ({"latent_bits": 2, "window": 64, "latent_recent": 32}, ("no latent would be rounded", "--latent-recent 31")),
        # 256 positions are all that the source has
        ({"latent_bits": 2, "window": 1024, "latent_recent": 128}, ("no latent", "windows have 256 tokens")),
        ({"latent_bits": 5}, ("there are caches of 2, 3, 4, 8 bits",)),
        ({"latent_bits": 2, "latent_recent": -1}, ("latent_recent cannot be negative",)),
    ],
    ids=str,
)
def test_what_could_not_learn_is_refused(lively: MakeSource, settings: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(str(lively()), **settings)
    check(caught.value, "", words)


def test_what_still_can_is_not_refused(lively: MakeSource) -> None:
    plan(str(lively()), latent_bits=2, window=64, latent_recent=31)
    plan(str(lively()), refine="off", latent_recent=1000)


def test_the_command_takes_it(lively: MakeSource, tmp_path: Path) -> None:
    convert, call = ["convert", str(lively()), str(tmp_path / "out")], CliRunner()
    shown = call.invoke(main, [*convert, "--latent-bits", "4", "--latent-recent", "16", "--dry-run"])
    assert shown.exit_code == 0 and "latent-int4" in shown.output
    assert call.invoke(main, [*convert, "--latent-bits", "5", "--dry-run"]).exit_code == 2
    refused = call.invoke(main, [*convert, "--latent-bits", "4", "--refine", "off"])
    assert refused.exit_code == 10 and "no weight would learn" in refused.output


def test_a_run_with_other_bits_takes_nothing_over(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA, "latent_recent": RECENT}
    whole = digest(run(lively(), "whole", latent_bits=2, **settings).destination)

    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == "distil" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, latent_bits=2, **settings)
    for bits in (None, 3):
        with pytest.raises(DestinationError, match="differs in latent_bits"):
            run(lively(), latent_bits=bits, **settings)
    with pytest.raises(DestinationError, match=r"differs in latent_bits \(\[2, 3\] then, \[2, 4\] now\)"):
        run(lively(), latent_bits=2, **settings | {"latent_recent": 4})
    assert digest(run(lively(), latent_bits=2, **settings).destination) == whole
