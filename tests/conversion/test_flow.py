"""The whole conversion on lively models: plan, calibrate, fit, write, verify, load in two classes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import transmla
from tests.conversion.made import EXACT, IDS, PLAIN, QUICK, Convert, digest, logits, weights
from tests.families import LINEAR, LLAMA3, THETA, YARN, MakeSource
from tests.maths.weights import relative
from transmla.maths.closed_form import ClosedForm
from transmla.model.loading import load


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied": True},
        {"eps": 1e-6},
        {"eps": 1e-8},
        {"model_type": "mistral"},
        {"shards": 4},
        {"heads": 4, "hidden": 64},
    ],
    ids=str,
)
def test_one_key_head_at_full_size_is_the_same_model(
    lively: MakeSource, run: Convert, settings: dict[str, Any]
) -> None:
    """Nothing is lost, so every name, scale and layout of the written folder shows in the logits."""
    source = lively(kv_heads=1, **settings)
    report = run(source, **EXACT)
    assert relative(logits(report.destination), logits(source)) < 1e-4
    # the streams may run in bfloat16
    assert report.heldout.converted == pytest.approx(report.heldout.source, abs=0.02)
    assert max(layer.stream_loss_heldout for layer in report.layers) < 1e-2


def test_on_every_device(lively: MakeSource, run: Convert, device: torch.device) -> None:
    """Converted and verified there, and the same model on the CPU."""
    source = lively(kv_heads=1)
    report = run(source, device=device.type, **EXACT)
    assert relative(logits(report.destination), logits(source)) < 1e-4
    settings: dict[str, Any] = {"tokens": 2048, "latent": 12, "rope": 8, "theta": THETA}
    report = run(lively(), "refined", device=device.type, refine="fast", refinement=QUICK, **settings)
    assert report.verification.relative_error < report.verification.tolerance
    assert report.blocks[-1].loss_after < report.blocks[-1].loss_before
    made = json.loads((report.destination / "transmla.json").read_text("utf-8"))
    assert made["computed"]["device"] == device.type


@pytest.mark.parametrize("smaller", [{"latent": 11}, {"rope": 10}, {"theta": 100.0}], ids=str)
def test_one_size_smaller_is_another_model(lively: MakeSource, run: Convert, smaller: dict[str, Any]) -> None:
    source = lively(kv_heads=1)
    report = run(source, **EXACT | smaller)
    assert relative(logits(report.destination), logits(source)) > 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_heads": 6},
        {"kv_heads": 2},
        {"kv_heads": 1},
        {"rope": LLAMA3},
        {"rope": LINEAR},
        {"rope": YARN},
        {"model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": 32},
        {"tied": True, "shards": 10},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "eps": 1e-6},
    ],
    ids=str,
)
def test_every_kind_of_source_converts(lively: MakeSource, run: Convert, settings: dict[str, Any]) -> None:
    """And gives one function in the stock class and in ours; verification has passed."""
    source = lively(**settings)
    report = run(source, latent=16, rope=8)
    assert report.verification.relative_error < report.verification.tolerance
    own = load(report.destination, dtype=torch.float32)
    with torch.no_grad():
        assert relative(own(IDS).logits, logits(report.destination)) < 1e-3
    stored = {value.dtype for value in weights(report.destination).values()}
    assert stored == {settings.get("dtype", torch.float32)}
    assert len(report.layers) == 3 and all(0 < layer.latent_loss < 1 for layer in report.layers)


def test_sliding_window_caps_the_context(lively: MakeSource, run: Convert) -> None:
    report = run(lively(model_type="mistral", sliding_window=32), latent=16, rope=8)
    config = json.loads((report.destination / "config.json").read_text("utf-8"))
    assert config["max_position_embeddings"] == 32
    assert any("becomes 32" in note for note in report.plan.notes)


def test_no_window_is_written_as_minus_one_too(lively: MakeSource, run: Convert) -> None:
    report = run(lively(model_type="mistral", sliding_window=-1), latent=16, rope=8)
    assert report.plan.max_position_embeddings == report.plan.source.config["max_position_embeddings"]


def test_repair_helps(lively: MakeSource, run: Convert) -> None:
    losses = [
        run(lively(), name, tokens=2048, window=64, latent=12, rope=8, method=method).layers[-1].stream_loss_fitted
        for name, method in (("plain", PLAIN), ("repaired", ClosedForm()))
    ]
    assert losses[1] < 0.9 * losses[0]


def test_theta_is_chosen_or_taken(lively: MakeSource, run: Convert) -> None:
    chosen, given = run(lively(), "chosen"), run(lively(), "given", theta=777.0)
    losses = chosen.theta_losses
    assert chosen.theta in losses and next(iter(losses)) == THETA
    assert all(len(found) == 3 for found in losses.values())
    assert given.theta == 777.0 and given.theta_losses == {}
    config = json.loads((given.destination / "config.json").read_text("utf-8"))
    assert config["rope_theta"] == 777.0


def test_same_input_gives_the_same_bytes(lively: MakeSource, run: Convert) -> None:
    folders = [run(lively(), name).destination for name in ("first", "second")]
    assert digest(folders[0]) == digest(folders[1])
    assert digest(folders[0]) != digest(run(lively(seed=1), "other").destination)


def test_sources_in_shards_and_as_bin_convert_to_the_same_bytes(
    lively: MakeSource, run: Convert, tmp_path: Path
) -> None:
    whole = lively()
    binary = tmp_path / "binary"
    shutil.copytree(whole, binary, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(weights(whole), binary / "pytorch_model.bin")
    digests = {digest(run(source, source.name + str(n)).destination) for n, source in enumerate((whole, binary))}
    digests.add(digest(run(lively(shards=10), "shards").destination))
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("saved", "settings"),
    [
        ("without a head", {"tied": True}),
        ("without a head", {"tied": True, "model_type": "qwen3"}),
        ("embeddings as the head", {"tied": True}),
        # whose config says nothing of it
        ("embeddings as the head", {"tied": True, "model_type": "gemma"}),
    ],
)
def test_other_names_that_transformers_knows(
    lively: MakeSource, run: Convert, tmp_path: Path, saved: str, settings: dict[str, Any]
) -> None:
    source = lively(**settings)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    tensors = load_file(source / "model.safetensors")
    if saved == "without a head":
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    else:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    if settings.get("model_type") == "gemma":
        config = json.loads((other / "config.json").read_text("utf-8"))
        del config["tie_word_embeddings"]
        (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert transmla.plan(other).mla == transmla.plan(source).mla, "a path, and no more than headers"
    for name, one in (("a", source), ("b", other)):
        run(one, name, latent=16, rope=4)
    found, wanted = (weights(tmp_path / name) for name in "ba")
    assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_progress_counts_to_the_end(lively: MakeSource, run: Convert) -> None:
    seen: list[tuple[str, int, int]] = []
    run(lively(), progress=lambda stage, done, total, remark: seen.append((stage, done, total)))
    assert ("convert layers", 3, 3) in seen and ("verify", 3, 3) in seen and ("choose theta", 3, 3) in seen
    assert seen.index(("convert layers", 3, 3)) < seen.index(("verify", 1, 3))
    seen.clear()
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA, "block_layers": 2}
    run(lively(), "blocks", progress=lambda stage, done, total, remark: seen.append((stage, done, total)), **settings)
    passed = [("targets of layers 0-1", done, 2) for done in range(3)]
    assert [one for one in seen if one[0] == passed[0][0]] == passed
    stages = list(dict.fromkeys(stage for stage, *_ in seen))
    first = stages.index(passed[0][0])
    assert stages[first:][:3] == ["targets of layers 0-1", "distil layers 0-1", "targets of layers 2-2"]


@pytest.mark.parametrize("theta", [THETA, "auto"])
def test_layers_and_tokens_that_are_zero(lively: MakeSource, run: Convert, tmp_path: Path, theta: float | str) -> None:
    """As in models that were deepened by layers without an effect, and in vocabularies that were padded."""
    source = tmp_path / "source"
    shutil.copytree(lively(kv_heads=1), source)
    stored = load_file(source / "model.safetensors")
    stored["model.layers.1.self_attn.o_proj.weight"].zero_()
    stored["model.embed_tokens.weight"][::2] = 0
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    assert relative(logits(run(source, **EXACT).destination), logits(source)) < 1e-4
    report = run(source, "refined", latent=8, rope=4, theta=theta, refine="fast", refinement=QUICK)
    assert all(torch.isfinite(value).all() for value in weights(report.destination).values())
    assert all(layer.stream_loss_fitted < 1 for layer in report.layers)
