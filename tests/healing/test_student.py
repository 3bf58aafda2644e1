"""A student's loss is that of its source, and its source is no part of it."""

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.families import lively_config, lively_model
from transmla.errors import DestinationError
from transmla.healing.prepare import Preparation
from transmla.healing.student import halve_frozen, select_trained, share_frozen, teach
from transmla.healing.teacher import CachedTeacher, OnlineTeacher, record
from transmla.healing.train import autocast
from transmla.healing.windows import Windows, write_windows
from transmla.model.modeling_transmla import UnfoldedConfig, UnfoldedForCausalLM
from transmla.processes import ALONE
from transmla.progress import silent
from transmla.recipe import Healing
from transmla.text.packing import pack
from transmla.train.losses import Objective

CPU = torch.device("cpu")
LENGTH = 24
IDS = torch.arange(3, 27)[None]


def unfolded(config: Any, seed: int = 1) -> UnfoldedForCausalLM:
    torch.manual_seed(seed)
    made = UnfoldedConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=32,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8,
        q_lora_rank=None, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=config.num_hidden_layers, max_position_embeddings=64,
    )  # fmt: skip
    return UnfoldedForCausalLM(made).eval()


@pytest.fixture
def source() -> Any:
    return lively_model(lively_config())


@pytest.fixture
def windows(tmp_path: Path, source: Any) -> Windows:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, source.config.vocab_size, (n,), generator=generator).tolist() for n in (9, 30, 14, 40)]
    write_windows(tmp_path / "w.npy", pack(texts, LENGTH), 3, LENGTH, lambda *_: None, "")
    return Windows(tmp_path / "w.npy")


def batch(windows: Windows) -> dict[str, torch.Tensor]:
    rows = [windows[number] for number in range(len(windows))]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_loss_is_the_mean_over_windows_of_that_of_whole_logits(source: Any, windows: Windows) -> None:
    model = unfolded(source.config)
    given = batch(windows)
    with torch.no_grad():
        inputs = {key: given[key] for key in ("input_ids", "position_ids")}
        own, wanted = (one(**inputs, use_cache=False).logits.double().log_softmax(-1) for one in (model, source))
    student = teach(model, OnlineTeacher(source, autocast("float32", CPU)), Objective(cross_entropy=0.25))
    with torch.no_grad():
        found = student(**given)
    counted = given["labels"] != -100
    divergence = (wanted.exp() * (wanted - own)).sum(-1)
    labels = given["labels"].clamp_min(0)[..., None]
    nats, source_nats = (-one.gather(-1, labels)[..., 0] for one in (own, wanted))

    def means(values: torch.Tensor) -> torch.Tensor:
        return (values * counted).sum(-1) / counted.sum(-1)

    assert torch.allclose(found["divergence"].double(), means(divergence), rtol=1e-4)
    assert torch.allclose(found["nats"].double(), means(nats), rtol=1e-4)
    assert torch.allclose(found["source_nats"].double(), means(source_nats), rtol=1e-4)
    assert float(found["loss"]) == pytest.approx(
        float((0.75 * means(divergence) + 0.25 * means(nats)).mean()), rel=1e-4
    )
    assert not torch.allclose(divergence, (own.exp() * (own - wanted)).sum(-1), rtol=0.05), "lively enough to tell"


def test_streams_are_matched_layer_by_layer(source: Any, windows: Windows) -> None:
    model = unfolded(source.config)
    given = batch(windows)
    teacher = OnlineTeacher(source, autocast("float32", CPU), streams=True)
    with torch.no_grad():
        plain = float(teach(model, teacher, Objective())(**given)["loss"])
        weighted = float(teach(model, teacher, Objective(), hidden_weight=2.0)(**given)["loss"])
        inputs = {key: given[key] for key in ("input_ids", "position_ids")}
        pair = [
            torch.stack(one.get_decoder()(**inputs, use_cache=False, output_hidden_states=True).hidden_states[1:-1])
            for one in (model, source)
        ]
        errors = (pair[0] - pair[1]).square().sum(-1) / pair[1].square().sum(-1)
    assert weighted == pytest.approx(plain + 2 * float(errors.mean()), rel=1e-4)


def test_a_single_layer_has_no_streams_to_match(windows: Windows) -> None:
    source = lively_model(lively_config(layers=1))
    given, teacher = batch(windows), OnlineTeacher(source, autocast("float32", CPU), streams=True)
    plain, weighted = (
        teach(unfolded(source.config), teacher, Objective(), weight)(**given)["loss"] for weight in (0.0, 2.0)
    )
    weighted.backward()
    assert float(weighted.detach()) == float(plain.detach()) > 0.01


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_state_that_predicts_nothing_has_no_finite_loss(source: Any, windows: Windows, value: float) -> None:
    """A flat distribution may be nearer to the source than a wrecked model is; still it is no gain."""
    student = teach(unfolded(source.config), OnlineTeacher(source, autocast("float32", CPU)), Objective())
    with torch.no_grad():
        assert torch.isfinite(student(**batch(windows))["loss"])
        student.model.norm.weight.fill_(value)
        assert student(**batch(windows))["loss"] == torch.inf


@pytest.mark.parametrize("k", [None, 300])
def test_what_is_measured_has_no_temperature(
    k: int | None, source: Any, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States are compared by it, and runs with each other; what is learned from has one."""
    monkeypatch.setattr(Preparation, "_model", lambda *_: source)
    settings = Healing(temperature=2.0, top_k=k, precision="float32")
    converted: Any = SimpleNamespace(config={"vocab_size": source.config.vocab_size})
    made = Preparation(converted, converted, settings, 1, ALONE, CPU, silent)
    teacher = made.teacher(tmp_path, windows, [], autocast("float32", CPU))
    assert len(teacher.models) == 1
    student = teach(unfolded(source.config), teacher, Objective(settings.temperature))
    plain, given = OnlineTeacher(source, autocast("float32", CPU), k=k), batch(windows)
    with torch.no_grad():
        wanted = teach(unfolded(source.config), plain, Objective())(**given)
        found = student(**given)
    assert torch.equal(found["divergence"], wanted["divergence"]) and found["loss"] == wanted["loss"]
    softer = OnlineTeacher(source, autocast("float32", CPU), k=k, temperature=2.0)
    learned = teach(unfolded(source.config), softer, Objective(2.0))(**given)["loss"]
    assert student(**given)["loss"] == learned != found["loss"]


def test_the_source_is_no_part_of_the_student(source: Any, windows: Windows) -> None:
    model = unfolded(source.config)
    names = list(model.state_dict())
    student = teach(model, OnlineTeacher(source, autocast("float32", CPU)), Objective())
    assert list(student.state_dict()) == names
    select_trained(student, "attention")
    student.train()(**batch(windows))["loss"].backward()
    assert all(parameter.grad is None for parameter in source.parameters())
    for name, parameter in student.named_parameters():
        is_matrix = ".self_attn." in name and "layernorm" not in name
        assert (parameter.grad is not None) == is_matrix, name
    select_trained(student, "all")
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    left = {"model.embed_tokens.weight", "lm_head.weight"}
    assert set(names) - trained == left | {name for name in names if name.endswith("kv_a_layernorm.weight")}


def test_frozen_matrices_are_halved_and_trained_ones_are_not(source: Any) -> None:
    model = unfolded(source.config)
    select_trained(model, "attention")
    halve_frozen(model)
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert layer.self_attn.o_proj.weight.dtype == layer.input_layernorm.weight.dtype == torch.float32


def test_frozen_experts_are_halved(device: torch.device) -> None:
    """Most of a model of experts, and no linear layers; the products run in bfloat16, and gradients pass."""
    if device.type == "pretended":
        pytest.skip("it has no autocast")
    model: Any = lively_model(lively_config(model_type="qwen3_moe", layers=2)).to(device)
    select_trained(model, "all")
    halve_frozen(model)
    experts = model.model.layers[1].mlp.experts
    assert {weight.dtype for weight in experts.parameters()} == {torch.float32}, "these are trained"
    generator = torch.Generator().manual_seed(0)
    stream_ND = torch.randn(10, 48, generator=generator).to(device)
    chosen_N2 = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(10)]).to(device)
    given = stream_ND, chosen_N2, torch.full((10, 2), 0.5, device=device)
    with torch.no_grad():
        wanted = experts(*given)
    select_trained(model, "attention")
    halve_frozen(model)
    assert {weight.dtype for weight in experts.parameters()} == {torch.bfloat16}
    stream_ND.requires_grad_()
    with autocast("bfloat16", device)():
        found = experts(*given)
        logits = model(IDS.to(device)).logits
    assert found.dtype == torch.float32 and (found - wanted).norm() < 0.03 * wanted.norm()
    (found.sum() + logits.float().square().sum()).backward()
    gradients = [stream_ND.grad, *(weight.grad for weight in model.parameters() if weight.requires_grad)]
    assert all(one is not None and one.isfinite().all() and one.abs().sum() > 0 for one in gradients)


def test_kept_predictions_are_those_of_the_source(source: Any, windows: Windows, tmp_path: Path) -> None:
    online = OnlineTeacher(source, autocast("float32", CPU), k=5)
    told: list[int] = []
    record(online, windows, tmp_path / "p", [0, 2], CPU, lambda _, done, total, __: told.append(done))
    assert told == [1, 2]
    first = next((tmp_path / "p").rglob("*.npz"))
    stamp = first.stat().st_mtime_ns
    record(online, windows, tmp_path / "p", [0, 1, 2], CPU, lambda *_: None)
    assert first.stat().st_mtime_ns == stamp, "what is there is not computed again"
    given = batch(windows)
    losses = []
    for teacher in (online, CachedTeacher(tmp_path / "p")):
        with torch.no_grad():
            losses.append(teach(unfolded(source.config), teacher, Objective())(**given))
    for key in ("loss", "divergence", "nats", "source_nats"):
        # probabilities are kept in 16 bits
        assert torch.allclose(losses[0][key], losses[1][key], rtol=2e-3), key


def test_a_full_disk_leaves_no_half_predictions(
    source: Any, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transmla.healing.teacher.np.savez_compressed", full)
    with pytest.raises(DestinationError, match="the disk is full"):
        record(OnlineTeacher(source, autocast("float32", CPU), k=5), windows, tmp_path / "p", [0], CPU, lambda *_: None)
    assert not list((tmp_path / "p").rglob("*.npz"))


def test_source_and_student_share_what_neither_trains() -> None:
    """After it, a change of a shared tensor is seen by both; trained ones, and those that differ, stay apart."""
    for tied in (False, True):
        source = lively_model(lively_config(layers=2, tied=tied))
        student = teach(copy.deepcopy(source), OnlineTeacher(source, contextlib.nullcontext), Objective())
        select_trained(student, "attention")
        with torch.no_grad():
            student.model.layers[1].mlp.up_proj.weight.add_(1e-3)
            wanted = source(IDS).logits
        before = sum(weight.numel() for weight in source.parameters()) * 4
        saved = share_frozen(student, source)
        assert before / 2 < saved < before and torch.equal(source(IDS).logits, wanted)
        pairs = dict(student.named_parameters())
        apart = {name for name, weight in source.named_parameters() if weight is not pairs[name]}
        assert apart == {name for name in pairs if ".self_attn." in name} | {"model.layers.1.mlp.up_proj.weight"}
        assert source.lm_head.weight is student.lm_head.weight
        assert tied == (source.lm_head.weight is source.model.embed_tokens.weight)
        student.to(torch.float64)
        assert source.model.layers[0].mlp.up_proj.weight.dtype == torch.float64, "a move moves both"
