"""Biases in the attention, in the stock form: the same model where nothing is lost, and each bias in its place."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import transmla
from tests.conversion.made import IDS, PLAIN, Convert, check, logits, weights
from tests.families import THETA, MakeSource
from tests.maths.weights import relative
from transmla.conversion import write
from transmla.conversion.target import target_config
from transmla.errors import DestinationError, RecipeError, UnsupportedError
from transmla.maths.attention import MlaWeights
from transmla.maths.fold import unfolded_attention
from transmla.model.loading import load
from transmla.model.modeling_transmla import TransmlaConfig, TransmlaForCausalLM
from transmla.targets.own import own_attention

SOURCES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "llama": {"attention_bias": True},
    "smollm3": {"model_type": "smollm3", "attention_bias": True, "layers": 4},
}
ATTENTION = "model.layers.1.self_attn"


def whole(run: Convert, source: Path, name: str = "out", **settings: Any) -> Any:
    """One key/value head of 12: nothing is lost in a latent of 24."""
    return run(source, name, latent=24, rope=12, theta=THETA, method=PLAIN, **settings)


def of_source(source: Path, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)(IDS).logits
    return found


@pytest.mark.parametrize("family", SOURCES)
def test_nothing_dropped_is_the_same_model(lively: MakeSource, run: Convert, family: str) -> None:
    """The stock class up to what the norm bends, ours up to float32."""
    source = lively(kv_heads=1, **SOURCES[family])
    report = whole(run, source)
    config = json.loads((report.destination / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["attention_bias"], config["q_lora_rank"]) == ("deepseek_v3", True, 49)
    assert report.plan.obstacles == () and report.verification.relative_error < 1e-3
    wanted = of_source(source, torch.float64)
    assert relative(logits(report.destination).double(), wanted) < 1e-3
    own = load(report.destination, dtype=torch.float64)
    with torch.no_grad():
        assert relative(own(IDS).logits, wanted) < 1e-4


@pytest.mark.parametrize(
    ("bias", "rows"),
    [
        (f"{ATTENTION}.q_a_proj.bias", slice(None)),
        (f"{ATTENTION}.kv_a_proj_with_mqa.bias", slice(24, None)),
        (f"{ATTENTION}.o_proj.bias", slice(None)),
    ],
)
def test_each_bias_is_needed(lively: MakeSource, run: Convert, tmp_path: Path, bias: str, rows: slice) -> None:
    """Those of the queries, of the rotary key and of the values."""
    source = lively(kv_heads=1, model_type="qwen2")
    folder = whole(run, source).destination
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    assert not tensors[f"{ATTENTION}.kv_a_proj_with_mqa.bias"][:24].any(), "the latent needs none"
    tensors[bias][rows] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    assert relative(logits(folder), of_source(source, torch.float32)) > 0.02


@pytest.mark.parametrize("q_latent", [None, 20])
def test_fewer_values_are_those_of_the_own_form(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, q_latent: int | None
) -> None:
    """The same weights written in both forms; a latent of queries, which the own form has not, is multiplied out."""
    made: list[MlaWeights] = []

    def noting(mla: MlaWeights) -> dict[str, torch.Tensor]:
        made.append(mla)
        return unfolded_attention(mla)

    monkeypatch.setattr(write, "unfolded_attention", noting)
    source = lively(model_type="qwen2")
    report = run(source, latent=14, rope=6, theta=100.0, q_latent=q_latent)
    planned = replace(report.plan, form="transmla", mla=replace(report.plan.mla, q_lora_rank=None))
    config = target_config(planned, None, [mla.inv_freq_M.tolist() for mla in made])
    settings = {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "dtype")}
    own: Any = TransmlaForCausalLM(TransmlaConfig(**settings)).eval()
    tensors = {name: value for name, value in weights(source).items() if ".self_attn." not in name}
    for index, mla in enumerate(made):
        if mla.q_down_qD is not None:
            mla = replace(
                mla,
                q_down_qD=None,
                q_nope_HnD=mla.q_nope_HnD @ mla.q_down_qD,
                q_rope_HeD=mla.q_rope_HeD @ mla.q_down_qD,
            )
        attention = own_attention(mla.to(dtype=torch.float32), torch.arange(12))
        tensors |= {f"model.layers.{index}.self_attn.{name}": value for name, value in attention.items()}
    own.load_state_dict(tensors)
    with torch.no_grad():
        wanted = own(IDS).logits
        assert relative(load(report.destination, dtype=torch.float32)(IDS).logits, wanted) < 1e-4
    assert relative(logits(report.destination), wanted) < 2e-3
    assert relative(of_source(source, torch.float32), wanted) > 0.1, "much is dropped"


@pytest.mark.parametrize("q_latent", [None, 20])
def test_generation_with_a_cache(lively: MakeSource, run: Convert, q_latent: int | None) -> None:
    folder = run(lively(model_type="qwen2"), latent=14, rope=6, q_latent=q_latent).destination
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for model in (stock, load(folder, dtype=torch.float32)):
        written = model.generate(IDS, max_new_tokens=8, do_sample=False)
        with torch.no_grad():
            whole_text = model(written).logits
            cached = model(IDS, use_cache=True).past_key_values
            step = model(written[:, IDS.shape[1] :], past_key_values=cached).logits
        assert torch.equal(whole_text[:, IDS.shape[1] - 1 : -1].argmax(-1), written[:, IDS.shape[1] :])
        assert relative(step, whole_text[:, IDS.shape[1] :]) < 1e-5
        assert sum(cached.layers[0].keys.shape[-1:]) == 20 or model is stock


def test_refinement_and_bfloat16(lively: MakeSource, run: Convert) -> None:
    """Refined like any other; in bfloat16 the identity is still one."""
    report = run(lively(model_type="qwen2", tied=True), latent=12, rope=8, tokens=2048, refine="fast", dtype="bfloat16")
    assert report.blocks[-1].loss_after < report.blocks[-1].loss_before
    down = weights(report.destination)[f"{ATTENTION}.q_a_proj.weight"]
    assert down.dtype == torch.bfloat16
    assert torch.equal(down, torch.cat([torch.eye(48), torch.zeros(1, 48)]).bfloat16() * down[0, 0])


@pytest.fixture
def steady(lively: MakeSource, tmp_path: Path) -> Path:
    """A source whose stream has a part that all tokens share, as those of real models have."""
    source = tmp_path / "steady"
    shutil.copytree(lively(kv_heads=1, model_type="qwen2"), source)
    tensors = weights(source)
    tensors["model.embed_tokens.weight"][:, 0] = 3.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_lossy_reads_biases_from_the_input(steady: Path, run: Convert, tmp_path: Path) -> None:
    """Close to the source, which without its biases is another model; and a folder that no engine drops a bias of."""
    report = whole(run, steady, lossy=True)
    config = json.loads((report.destination / "config.json").read_text("utf-8"))
    assert (config["attention_bias"], config["q_lora_rank"], config["biases_left_out"]) == (False, None, True)
    assert not any(name.endswith("bias") for name in weights(report.destination))
    assert report.verification.relative_error < 1e-3
    wanted = of_source(steady, torch.float32)
    error = relative(logits(report.destination), wanted)
    bare = tmp_path / "bare"
    shutil.copytree(steady, bare)
    unbiased = {name: value * (not name.endswith("bias")) for name, value in weights(steady).items()}
    save_file(unbiased, bare / "model.safetensors", metadata={"format": "pt"})
    assert error < 0.03 and relative(of_source(bare, torch.float32), wanted) > 0.3


def test_lossy_is_said_wherever_one_looks(steady: Path, run: Convert, tmp_path: Path) -> None:
    report = run(steady, latent=14, rope=6, lossy=True)
    (note,) = (note for note in report.plan.notes if "bias" in note)
    assert note.startswith("--lossy") and "Not exact" in note
    assert "`--lossy`" in (report.destination / "README.md").read_text("utf-8")
    provenance = json.loads((report.destination / "transmla.json").read_text("utf-8"))
    assert provenance["recipe"]["lossy"] is True
    # the form for training and back, as healing does it
    transmla.unfold(report.destination, tmp_path / "train")
    transmla.fold(tmp_path / "train", tmp_path / "again")
    for folder in (report.destination, tmp_path / "again"):
        diagnosis = transmla.doctor(folder)
        assert diagnosis.summary()["notes"] == diagnosis.notes and "--lossy" in diagnosis.notes[0]
        by_name = {verdict.engine: verdict.accepts for verdict in diagnosis.engines}
        assert by_name["llama.cpp"] and by_name["MLX-LM"]
    exact = run(steady, "exact", latent=14, rope=6)
    diagnosis = transmla.doctor(exact.destination)
    assert not diagnosis.notes and not {one.engine: one.accepts for one in diagnosis.engines}["llama.cpp"]
    with pytest.raises(UnsupportedError, match="biases in its attention") as caught:
        transmla.export(exact.destination, tmp_path / "exact.gguf")
    assert "--lossy" in caught.value.remedy
    transmla.export(report.destination, tmp_path / "lossy.gguf", type="f32")
    assert transmla.doctor(tmp_path / "lossy.gguf").notes == transmla.doctor(report.destination).notes


def test_lossy_drops_the_bias_of_the_output(lively: MakeSource, run: Convert) -> None:
    """And the refit of the output makes up for what it can."""
    report = run(lively(attention_bias=True), latent=14, rope=6, lossy=True)
    assert not any(name.endswith("bias") for name in weights(report.destination))


def test_an_unfinished_exact_conversion_is_not_taken_over(steady: Path, run: Convert) -> None:
    def interrupt(stage: str, *_: Any) -> None:
        if stage == "measure":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(steady, latent=14, rope=6, theta=THETA, progress=interrupt)
    with pytest.raises(DestinationError, match="other settings"):
        run(steady, latent=14, rope=6, theta=THETA, lossy=True)


@pytest.mark.parametrize(
    ("model", "settings", "why"),
    [
        ({}, {}, "has no biases"),
        ({"model_type": "qwen3"}, {}, "is needed: norms on queries and keys"),
        ({"model_type": "qwen2"}, {"format": "transmla"}, "is asked for"),
    ],
)
def test_nothing_to_lose(lively: MakeSource, model: dict[str, Any], settings: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match="nothing to lose") as caught:
        transmla.plan(str(lively(**model)), lossy=True, **settings)
    check(caught.value, "--lossy", (why, "leave out --lossy"))


def test_the_plan_says_what_it_costs(lively: MakeSource) -> None:
    source = str(lively(model_type="qwen2"))
    planned, own = transmla.plan(source), transmla.plan(source, format="transmla")
    (note,) = (note for note in planned.notes if "bias" in note)
    assert "2,401 weights a layer" in note and "q_lora_rank 49" in note and "no cache" in note
    assert not any("bias" in note for note in own.notes)
    # of three layers, float32; the journal keeps what is fitted
    assert planned.disk_bytes - own.disk_bytes > 3 * 4 * 2401
    assert planned.cache == own.cache
    assert not any("bias" in note for note in transmla.plan(str(lively())).notes)
