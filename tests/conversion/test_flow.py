"""The whole conversion on lively models: plan, calibrate, fit, write, verify, load in two classes."""

import errno
import hashlib
import io
import json
import os
import shutil
import weakref
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import LINEAR, LLAMA3, THETA, YARN, MakeSource
from tests.maths.weights import relative
from transmla.checkpoint.read import Source
from transmla.cli.display import show_conversion
from transmla.conversion import distil as distilling
from transmla.conversion import flow as conversion
from transmla.conversion import run as run_module
from transmla.conversion.flow import ConversionReport, convert, default_destination
from transmla.conversion.levels import Descent, Refinement
from transmla.conversion.plan import plan
from transmla.errors import DestinationError, GeometryError, RecipeError, VerificationError
from transmla.maths.closed_form import ClosedForm
from transmla.maths.fold import MAX_NORM_DEVIATION
from transmla.model.loading import load
from transmla.text.windows import calibration_tokens, shuffled

PLAIN = ClosedForm(refit_output=False, two_streams=False)
# a few steps of everything
QUICK = Refinement(Descent(2.0, 4, 1e-2), Descent(2.0, 2, 1e-2))
# of a source with one key/value head of 12: nothing is lost at these
EXACT: dict[str, Any] = {"latent": 12, "rope": 12, "theta": THETA, "method": PLAIN}
IDS = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))

Convert = Callable[..., ConversionReport]


@pytest.fixture
def run(tmp_path: Path, text_file: Path) -> Convert:
    """Convert to tmp_path/out, or another name, on eight windows of 64 tokens."""

    def converted(source: Path, name: str = "out", **settings: Any) -> ConversionReport:
        settings = {"calibration": str(text_file), "tokens": 512, "window": 64, "refine": "off"} | settings
        return convert(str(source), tmp_path / name, **settings)

    return converted


def logits(folder: Path) -> torch.Tensor:
    """Of the stock class, float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    assert type(model).__module__.startswith("transformers.models.")
    with torch.no_grad():
        output: torch.Tensor = model(IDS).logits
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_written_in_another_dtype(lively: MakeSource, run: Convert, dtype: str) -> None:
    source = lively(kv_heads=1)
    report = run(source, dtype=dtype, **EXACT)
    assert {str(value.dtype) for value in weights(report.destination).values()} == {f"torch.{dtype}"}
    assert relative(logits(report.destination), logits(source)) < 0.05
    config = json.loads((report.destination / "config.json").read_text("utf-8"))
    assert config["dtype"] == config["torch_dtype"] == dtype


@pytest.mark.parametrize("refine", ["off", "fast"])
def test_queries_through_a_latent(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, refine: str
) -> None:
    """At full rank nothing is lost; at a smaller one what is written is still what was converted (verified).

    In float32, since a lively model makes much of the noise of bfloat16.
    """
    monkeypatch.setattr(run_module, "narrow_dtype", lambda device: None)
    source = lively()
    wide = run(source, "wide", refine=refine, theta=100.0)
    full = run(source, "full", refine=refine, theta=100.0, q_latent=48)
    narrow = run(source, "narrow", refine=refine, theta=100.0, q_latent=20)
    assert wide.layers[0].query_loss is None and full.layers[0].query_loss < 1e-9 < narrow.layers[0].query_loss
    config = json.loads((narrow.destination / "config.json").read_text())
    assert config["q_lora_rank"] == 20
    assert weights(narrow.destination)["model.layers.0.self_attn.q_a_proj.weight"].shape == (20, 48)
    if refine == "off":
        assert full.heldout.converted == pytest.approx(wide.heldout.converted, abs=1e-3)
    else:
        assert narrow.blocks[0].loss_after < narrow.blocks[0].loss_before
    own = load(narrow.destination, dtype=torch.float32)
    with torch.no_grad():
        error = own(IDS).logits - logits(narrow.destination)
    # our class has the linear map that the norm of the stock class approximates within this
    assert error.norm() < MAX_NORM_DEVIATION * logits(narrow.destination).norm()


@pytest.mark.parametrize("layerwise", [False, True])
def test_wider_heads(lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, layerwise: bool) -> None:
    """The same start, and weights that only the wider model has come out of the refinement in use; what is written is
    what was converted (verified)."""
    monkeypatch.setattr(run_module, "narrow_dtype", lambda device: None)
    descent = Descent(passes=2.0, batch=2, rate=1e-2)
    refinement = Refinement(Descent(passes=1.0, batch=2, rate=1e-3) if layerwise else None, descent)
    given: dict[str, Any] = {"refine": "fast", "theta": 100.0, "latent": 20, "rope": 8, "refinement": refinement}
    given["context"] = 1  # so few windows do not teach distances
    narrow = run(lively(), "narrow", **given)
    wide = run(lively(), "wide", nope=16, value=20, **given)
    config = json.loads((wide.destination / "config.json").read_text())
    assert (config["qk_nope_head_dim"], config["v_head_dim"]) == (16, 20)
    if not layerwise:
        assert wide.blocks[0].loss_before == pytest.approx(narrow.blocks[0].loss_before, rel=1e-4)
    assert wide.blocks[0].loss_after < wide.blocks[0].loss_before
    heads, width = config["num_attention_heads"], json.loads((lively() / "config.json").read_text())["head_dim"]
    tensors = weights(wide.destination)
    q_Hxd = tensors["model.layers.0.self_attn.q_proj.weight"].unflatten(0, (heads, 16 + 8))
    o_DHv = tensors["model.layers.0.self_attn.o_proj.weight"].unflatten(1, (heads, 20))
    assert q_Hxd[:, width:16].abs().amax() > 1e-4 and o_DHv[..., width:].abs().amax() > 1e-4


def test_wider_heads_need_refinement(lively: MakeSource, run: Convert) -> None:
    with pytest.raises(RecipeError, match="wider heads and no refinement"):
        run(lively(), "wide", nope=16, refine="off", latent=20, rope=8)


def test_wider_heads_fit_every_latent_that_is_tried(lively: MakeSource) -> None:
    """Refused before anything is loaded, not in the middle of the search."""
    with pytest.raises(GeometryError, match="v_head_dim 40 is impossible"):
        plan(str(lively()), latent="auto", budget=0.5, value=40)


def test_text_that_the_source_writes_joins_the_calibration(lively: MakeSource, run: Convert) -> None:
    source = lively(layers=1)
    report = run(source, "more", sampled=300, theta=100.0)
    assert report.num_calibration_tokens == 512 + 320
    assert report.heldout.num_windows == run(source, "plain", theta=100.0).heldout.num_windows == 1
    provenance = json.loads((report.destination / "transmla.json").read_text())
    assert provenance["calibration"]["text"].endswith("+320 sampled tokens")
    assert provenance["recipe"]["sampled"] == 300


def test_an_interrupted_run_keeps_what_the_source_wrote(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not written again, since it need not be the same twice."""
    settings: dict[str, Any] = {"calibration": "self", "sampled": 64, "theta": THETA}
    expected = digest(run(lively(), "whole", **settings).destination)

    def interrupt(at: str, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, **settings)
    for name in ("sample_from", "continue_from"):
        monkeypatch.delattr(conversion, name)
    report = run(lively(), **settings)
    assert digest(report.destination) == expected
    assert json.loads((report.destination / "transmla.json").read_text())["calibration"]["text"].startswith("self+")
    with pytest.raises(NameError):
        run(lively(), "another", **settings)


def test_windows_of_a_step(lively: MakeSource, run: Convert) -> None:
    """Two of the seven fitted ones, three steps and a half a pass."""
    done = run(lively(), refine="fast", batch=2, theta=THETA)
    assert (done.blocks[0].windows, done.blocks[0].steps) == (7, 4)
    assert json.loads((done.destination / "transmla.json").read_text())["recipe"]["batch"] == 2
    assert run(lively(), "one", refine="fast", theta=THETA).blocks[0].steps == 7


def test_repair_helps(lively: MakeSource, run: Convert) -> None:
    losses = [
        run(lively(), name, tokens=2048, window=64, latent=12, rope=8, method=method).layers[-1].stream_loss_fitted
        for name, method in (("plain", PLAIN), ("repaired", ClosedForm()))
    ]
    assert losses[1] < 0.9 * losses[0]


def test_theta_is_chosen_or_taken(lively: MakeSource, run: Convert) -> None:
    chosen, given = run(lively(), "chosen"), run(lively(), "given", theta=777.0)
    assert chosen.theta in chosen.theta_losses and next(iter(chosen.theta_losses)) == THETA
    assert all(len(losses) == 3 for losses in chosen.theta_losses.values())
    assert given.theta == 777.0 and given.theta_losses == {}
    config = json.loads((given.destination / "config.json").read_text("utf-8"))
    assert config["rope_theta"] == 777.0


def test_same_input_gives_the_same_bytes(lively: MakeSource, run: Convert) -> None:
    folders = [run(lively(), name).destination for name in ("first", "second")]
    assert digest(folders[0]) == digest(folders[1])
    assert digest(folders[0]) != digest(run(lively(seed=1), "other").destination)


def test_calibration_on_the_model_s_own_text(lively: MakeSource, run: Convert) -> None:
    """The only step with chance in it: the seed decides."""
    digests = [
        digest(run(lively(), f"out{place}", calibration="self", theta=THETA, seed=seed).destination)
        for place, seed in enumerate((3, 3, 4))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_one_shard_and_ten_hold_the_same(lively: MakeSource, run: Convert) -> None:
    one = run(lively(), "one").destination
    ten = run(lively(), "ten", shard_bytes=60_000).destination
    assert len(list(one.glob("*.safetensors"))) == 1 and len(list(ten.glob("*.safetensors"))) >= 8
    whole, dealt = weights(one), weights(ten)
    assert whole.keys() == dealt.keys() and all(torch.equal(whole[name], dealt[name]) for name in whole)
    assert torch.equal(logits(one), logits(ten))


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


@pytest.mark.parametrize("stage", ["tokens", "choose theta"])
def test_a_run_that_was_interrupted_before_the_first_layer_leaves_nothing(
    lively: MakeSource, run: Convert, tmp_path: Path, stage: str
) -> None:
    def interrupt(at: str, done: int, total: int, remark: str) -> None:
        if at == stage and done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert run(lively()).destination.is_dir()


def test_progress_counts_to_the_end(lively: MakeSource, run: Convert) -> None:
    seen: list[tuple[str, int, int]] = []
    run(lively(), progress=lambda stage, done, total, remark: seen.append((stage, done, total)))
    assert ("convert layers", 3, 3) in seen and ("verify", 3, 3) in seen and ("choose theta", 3, 3) in seen
    assert seen.index(("convert layers", 3, 3)) < seen.index(("verify", 1, 3))


def test_the_output_explains_itself(lively: MakeSource, run: Convert) -> None:
    source = lively()
    report = run(source, latent=16, rope=8, seed=5)
    made = json.loads((report.destination / "transmla.json").read_text("utf-8"))
    assert made["source"]["name"] == str(source) and made["source"]["revision"] is None
    assert made["source"]["files"] == {"model.safetensors": digest(source)}
    assert made["recipe"] | {"latent": 16, "rope": 8, "seed": 5, "window": 64, "dtype": "float32"} == made["recipe"]
    assert made["geometry"]["gqa"]["num_key_value_heads"] == 2 and made["geometry"]["mla"]["kv_lora_rank"] == 16
    assert made["method"]["refit_output"] is True and made["method"]["split"]["complex_component"] is True
    assert {"transmla", "torch", "transformers", "safetensors", "python"} <= made["versions"].keys()
    assert made["calibration"]["tokens"] == 512 and len(made["calibration"]["sha256"]) == 64
    assert made["rope_theta"]["chosen"] == report.theta
    assert [layer["layer"] for layer in made["layers"]] == [0, 1, 2]
    assert made["layers"][1]["latent_loss"] == report.layers[1].latent_loss
    assert [layer["latent_scale"] for layer in made["layers"]] == list(report.latent_scales)
    assert made["heldout"]["source"] == report.heldout.source
    card = (report.destination / "README.md").read_text("utf-8")
    assert "16 + 8" in card and "for inference" in card.lower() and "no gradient steps" in card


def test_everything_that_goes_along(lively: MakeSource, run: Convert, text_file: Path) -> None:
    source = lively()
    folder = run(source).destination
    text = text_file.read_text("utf-8")[:500]
    before, after = (AutoTokenizer.from_pretrained(path)(text).input_ids for path in (source, folder))
    assert before == after and len(after) > 100
    assert (folder / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert (folder / "modeling_transmla.py").is_file()
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", lambda weight: weight.flip(0)),
        ("model.layers.2.self_attn.q_proj.weight", lambda weight: weight * 2),
        ("model.layers.0.self_attn.kv_a_layernorm.weight", lambda weight: weight * 0.9),
        ("model.layers.0.input_layernorm.weight", lambda weight: weight * 128),
        ("model.layers.2.mlp.down_proj.weight", torch.zeros_like),
        ("model.embed_tokens.weight", lambda weight: weight * 3),
        ("model.norm.weight", lambda weight: weight.flip(0)),
        ("lm_head.weight", lambda weight: weight.roll(1, 0)),
    ],
)
def test_verification_sees_a_wrong_tensor(
    lively: MakeSource, run: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Any
) -> None:
    verify = conversion.verify

    def damaged(folder: Path, *args: Any) -> Any:
        stored = load_file(folder / "model.safetensors")
        stored[name] = damage(stored[name]).contiguous()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return verify(folder, *args)

    monkeypatch.setattr(conversion, "verify", damaged)
    with pytest.raises(VerificationError, match="does not compute") as caught:
        run(lively())
    assert caught.value.exit_code == 9 and "relative error" in caught.value.why
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["rope_interleave", "rope_theta", "rms_norm_eps"])
def test_verification_sees_a_wrong_config(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    make = conversion.deepseek_v3_config
    wrong = {"rope_interleave": False, "rope_theta": 50.0, "rms_norm_eps": 10.0}[setting]
    monkeypatch.setattr(conversion, "deepseek_v3_config", lambda *args: make(*args) | {setting: wrong})
    with pytest.raises(VerificationError):
        run(lively())


class LiveBytes:
    """Bytes of the tensors that `Source.read` has delivered and that are still in memory, and their peaks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = {"layer": 0, "other": 0}
        self.peak = dict(self.now)
        read = Source.read

        def counted(source: Source, name: str, **kwargs: Any) -> torch.Tensor:
            # a tensor's memory dies with the array that lends it, whoever made views of it
            array = read(source, name, **kwargs).numpy().copy()
            kind = "layer" if ".layers." in name else "other"
            self._add(kind, array.nbytes)
            weakref.finalize(array, self._add, kind, -array.nbytes)
            return torch.from_numpy(array)

        monkeypatch.setattr(Source, "read", counted)

    def _add(self, kind: str, num_bytes: int) -> None:
        self.now[kind] += num_bytes
        self.peak[kind] = max(self.peak[kind], self.now[kind])


def layer_bytes(folder: Path) -> int:
    return sum(value.nbytes for name, value in weights(folder).items() if name.startswith("model.layers.0."))


def test_one_layer_in_memory(lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight layers never two at once, and of the other tensors never two: peaks by reference counts."""
    source = lively(layers=8)
    live = LiveBytes(monkeypatch)
    report = run(source)
    largest = max(layer_bytes(source), layer_bytes(report.destination))
    embedding = weights(source)["model.embed_tokens.weight"].nbytes
    assert 0 < live.peak["layer"] <= largest
    assert 0 < live.peak["other"] <= embedding + 48 * 4
    assert live.now == {"layer": 0, "other": 0}


def test_holding_on_to_layers_would_show(lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lively(layers=8)
    live, kept, build = LiveBytes(monkeypatch), [], run_module.build_layer

    def keep(*args: Any) -> Any:
        kept.append(build(*args))
        return kept[-1]

    monkeypatch.setattr(run_module, "build_layer", keep)
    run(source, theta=THETA)
    assert live.peak["layer"] >= 8 * layer_bytes(source)


def test_default_destination(lively: MakeSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_destination(plan("stories260k", latent=24, rope=4)) == Path("stories260k-mla-24-4")
    assert default_destination(plan(str(lively()), latent=24, rope=4)) == Path("model-mla-24-4")
    monkeypatch.chdir(lively())
    assert default_destination(plan(".", latent=24, rope=4)) == Path("model-mla-24-4")


def test_an_interrupted_run_goes_on(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    """Layers that were finished are not fitted again, and the result is that of an uninterrupted run, bit by bit."""
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "latent": 12, "rope": 8}
    whole = digest(run(lively(), "whole", **settings).destination)
    for stage in ("convert layers", "distil"):
        seen: list[str] = []

        def interrupt(at: str, done: int, total: int, remark: str, stage: str = stage) -> None:
            if at == stage and done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(lively(), progress=interrupt, **settings)
        assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]
        assert {path.name for path in (tmp_path / "out.partial").iterdir()} == {".transmla-partial", "journal"}
        report = run(lively(), progress=lambda *at, seen=seen: seen.append(f"{at[0]} {at[-1]}"), **settings)
        refined = {int(line.split()[3][:-1]) for line in seen if line.startswith("refine layer layer")}
        assert refined == ({2} if stage == "convert layers" else set())
        assert digest(report.destination) == whole
        assert not (tmp_path / "out.partial").exists() and not (report.destination / "journal").exists()
        shutil.rmtree(report.destination)


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    # the last blocks of one and of two layers are the same layer
    [
        ("distil layers 2-2", 2, 3), ("distil", 3, 2), ("measure", 3, 2), ("measure", 2, 3), ("measure", 1, 2),
        ("measure", 2, 1), ("distil layers 2-2", 1, 2),
    ],
)  # fmt: skip
def test_blocks_of_another_size_are_not_mixed(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, stage: str, before: int, after: int
) -> None:
    """The size of a block depends on the memory that is free, and that may have changed since the interruption."""
    monkeypatch.setattr(distilling, "SAVE_EVERY", 0.0)
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    expected = digest(run(lively(), "whole", block_layers=after, **settings).destination)

    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == stage and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, block_layers=before, **settings)
    assert digest(run(lively(), block_layers=after, **settings).destination) == expected


def test_blocks_of_three_divisions_are_not_mixed(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of two layers, then one of three, then of two again: layer 3 is of a block whose layer 2 is gone."""
    monkeypatch.setattr(distilling, "SAVE_EVERY", 0.0)
    source = lively(layers=4)
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    expected = digest(run(source, "whole", block_layers=2, **settings).destination)

    def interrupted_at(stage: str) -> Callable[..., None]:
        def interrupt(at: str, done: int, *_: Any) -> None:
            if at == stage:
                raise KeyboardInterrupt

        return interrupt

    for stage, block_layers in (("measure", 2), ("distil layers 3-3", 3)):
        with pytest.raises(KeyboardInterrupt):
            run(source, progress=interrupted_at(stage), block_layers=block_layers, **settings)
    assert digest(run(source, block_layers=2, **settings).destination) == expected


@pytest.mark.parametrize(
    ("stage", "began", "fitting"), [("measure", 2, 1), ("measure", 2, 3), ("distil layers 1-1", 1, 3)]
)
def test_blocks_stay_as_they_began(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, stage: str, began: int, fitting: int
) -> None:
    """What is finished, or fits in smaller blocks, is not begun anew when other memory is free."""
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    expected = digest(run(lively(), "whole", block_layers=began, **settings).destination)

    def interrupt(at: str, *_: Any) -> None:
        if at == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(distilling, "layers_that_fit", lambda *_: began)
    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, **settings)
    monkeypatch.setattr(distilling, "layers_that_fit", lambda *_: fitting)
    seen: list[str] = []
    assert digest(run(lively(), progress=lambda at, *_: seen.append(at), **settings).destination) == expected
    trained = {at for at in seen if at.startswith("distil")}
    assert trained == (set() if stage == "measure" else {"distil layers 1-1", "distil layers 2-2"})


def test_distillation_goes_on_with_the_step_it_was_at(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilling, "SAVE_EVERY", 0.0)
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    expected = digest(run(lively(), "whole", **settings).destination)
    seen: list[int] = []

    def progress(at: str, done: int, *_: Any) -> None:
        if at == "distil":
            seen.append(done)
            if seen == [1, 2, 3, 4]:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=progress, **settings)
    report = run(lively(), progress=progress, **settings)
    assert seen == [1, 2, 3, 4, *range(4, report.blocks[0].steps + 1)]  # step 4 had not been saved yet
    assert digest(report.destination) == expected


def test_two_windows_are_enough(lively: MakeSource, run: Convert) -> None:
    """One to fit to and one held out, also where theta is chosen."""
    report = run(lively(), tokens=128, window=64)
    assert report.heldout.num_windows == 1 and report.num_calibration_tokens == 128
    losses = [loss for found in report.theta_losses.values() for loss in found]
    assert losses and all(0 < loss < 10 for loss in losses)


def test_gaps_teach_distances_beyond_the_window(lively: MakeSource, run: Convert) -> None:
    """Windows of 32 tokens, texts of 256: with gaps, a tenth less is lost behind the window, as much inside."""
    text = (resources.files("transmla.data") / "wikitext2-train-excerpt.txt").read_text("utf-8")[20000:25000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(lively())(text).input_ids[:2048]).view(8, 256)
    with torch.no_grad():
        target = (
            AutoModelForCausalLM.from_pretrained(lively(), dtype=torch.float32)(ids).logits.double().log_softmax(-1)
        )
    lost = {}
    for context in (1, 256):
        given: dict[str, Any] = {"context": context, "tokens": 2048, "window": 32, "theta": 100.0}
        done = run(lively(), f"context-{context}", latent=24, rope=8, **given)
        model = AutoModelForCausalLM.from_pretrained(done.destination, dtype=torch.float32)
        with torch.no_grad():
            found = model(ids).logits.double().log_softmax(-1)
        lost[context] = (target.exp() * (target - found)).sum(-1).mean(0)
    assert lost[256][32:].mean() < 0.95 * lost[1][32:].mean()
    assert lost[256][:32].mean() < 1.06 * lost[1][:32].mean()


@pytest.mark.parametrize(
    ("descent", "end"),
    [
        (Descent(1.0, 8, 0.0), " 1 steps;"),
        (Descent(6.0, 8, 1e30), " of 6: then the loss or a gradient was not finite;"),
    ],
)
def test_a_refinement_that_is_no_gain_is_said_to_be_none(
    lively: MakeSource, run: Convert, descent: Descent, end: str
) -> None:
    report = run(lively(), theta=THETA, refine="fast", refinement=Refinement(None, descent))
    written = io.StringIO()
    show_conversion(report, 0, Console(file=written, width=200))
    assert end in written.getvalue() and "not taken: no better than before" in written.getvalue()
    assert "Closed form, no gradient steps" in (report.destination / "README.md").read_text("utf-8")
    plain = run(lively(), "plain", theta=THETA)
    assert report.heldout.converted == pytest.approx(plain.heldout.converted, abs=1e-9)


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
    assert all(layer.stream_loss_fitted < 1 and layer.refined_after < 1 for layer in report.layers)


def test_a_journal_of_other_settings_is_not_thrown_away(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    def interrupt(at: str, done: int, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, theta=THETA)
    with pytest.raises(DestinationError, match="differs in theta") as caught:
        run(lively(), theta=500.0)
    with pytest.raises(DestinationError, match="differs in context"):
        run(lively(), theta=THETA, context=1)
    with pytest.raises(DestinationError, match="differs in seed, tokens"):
        run(lively(), theta=THETA, seed=1, tokens=256)
    assert "--restart" in str(caught.value) and (tmp_path / "out.partial" / "journal" / "settings.json").is_file()
    assert run(lively(), theta=500.0, restart=True).theta == 500.0


def test_a_config_that_has_changed_is_another_setting(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(lively(), source)

    def interrupt(at: str, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, progress=interrupt, theta=THETA)
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}), encoding="utf-8")
    with pytest.raises(DestinationError, match="differs in config"):
        run(source, theta=THETA)


def test_a_text_that_has_changed_is_another_setting(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    """Of two texts of one name, too."""
    paths = [tmp_path / folder / "text.txt" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("Once there was a dog. " * 400, encoding="utf-8")
    settings = {"calibration": "+".join(map(str, paths)), "theta": THETA}

    def interrupt(at: str, *_: Any) -> None:
        if at == "convert layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lively(), progress=interrupt, **settings)
    paths[0].write_text("Once there was a cat. And then? " * 300, encoding="utf-8")
    with pytest.raises(DestinationError, match="differs in texts"):
        run(lively(), **settings)


def test_activations_in_a_file_or_in_memory_give_the_same_bytes(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"refine": "fast", "refinement": QUICK, "theta": THETA}
    inside = run(lively(), "inside", **settings).destination
    folders, allocate = [], run_module.allocate

    def seen(shape: tuple[int, ...], folder: Path | None) -> torch.Tensor:
        folders.append(folder)
        return allocate(shape, folder)

    monkeypatch.setattr(run_module, "allocate", seen)
    outside = run(lively(), "outside", offload=0, **settings).destination
    assert digest(inside) == digest(outside)
    assert folders and all(folder is not None and folder.name == "outside.partial" for folder in folders)


def test_a_disk_too_small_for_the_activations(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DestinationError, match="the disk is full"):
        run(lively(), offload=0, theta=THETA)
    assert not list(tmp_path.rglob("activations-*")) and not (tmp_path / "out").exists()
    assert run(lively(), theta=THETA).destination.is_dir(), "memory is enough"


@pytest.mark.parametrize("block_layers", [None, 2])
def test_the_distilled_loss_is_that_of_the_written_model(
    lively: MakeSource, run: Convert, text_file: Path, block_layers: int | None
) -> None:
    """KL to the source's predictions on the held-out windows, computed from two loaded models."""
    source = lively()
    report = run(source, refine="fast", refinement=QUICK, latent=12, rope=8, block_layers=block_layers)
    tokenizer = AutoTokenizer.from_pretrained(source)
    made = shuffled(calibration_tokens(str(text_file), tokenizer, 512, 64), 0)
    ids = made.ids_NT[-report.heldout.num_windows :]
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, report.destination)
    ]
    with torch.no_grad():
        target, found = (model(ids).logits.double().log_softmax(-1) for model in models)
    divergence = float((target.exp() * (target - found)).sum(-1).mean())
    assert report.blocks[-1].loss_after == pytest.approx(divergence, rel=0.05)  # the streams may run in bfloat16
    assert report.blocks[-1].loss_after < report.blocks[-1].loss_before
    written = json.loads((report.destination / "transmla.json").read_text())["distilled_blocks"][-1]
    assert 0 < written["training"][-1] < written["training"][0]  # QUICK passes over few windows again and again
    assert [(block.first_layer, block.last_layer) for block in report.blocks] == (
        [(0, 2)] if block_layers is None else [(0, 1), (2, 2)]
    )


def test_refinement_is_worth_it(lively: MakeSource, run: Convert) -> None:
    nats = {}
    for name, refinement in (("off", Refinement(None, None)), ("on", QUICK)):
        heldout = run(lively(), name, tokens=2048, latent=12, rope=8, refinement=refinement).heldout
        nats[name] = heldout.converted - heldout.source
    assert nats["on"] < 0.8 * nats["off"]


def test_blocks_bound_the_memory(lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight layers never more than a block of two."""
    alive, peaks, read = [0], [0], run_module.Run.frozen_layer

    def counted(run: Any, index: int) -> Any:
        layer = read(run, index)
        alive[0] += 1
        peaks[-1] = max(peaks[-1], alive[0])
        weakref.finalize(layer, lambda: alive.__setitem__(0, alive[0] - 1))
        return layer

    monkeypatch.setattr(run_module.Run, "frozen_layer", counted)
    run(lively(layers=8), refine="fast", refinement=QUICK, block_layers=2)
    peaks.append(0)
    run(lively(layers=8), "whole", refine="fast", refinement=QUICK)
    assert peaks == [2, 8] and alive == [0]
