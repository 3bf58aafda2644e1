"""Every family in its own form: the same model where nothing is lost, with and without a cache."""

import contextlib
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import transmla
from tests.conversion.made import IDS, PLAIN, QUICK, Convert
from tests.conversion.pieces import random_streams
from tests.families import THETA, YARN, MakeSource, lively_config, lively_model
from tests.maths.weights import fit_layer, relative
from tests.maths.weights import lively as lively_values
from transmla.conversion.moments import observe
from transmla.errors import GeometryError, UnsupportedError
from transmla.families import FAMILIES, rope_parameters, rotary_dim
from transmla.geometry import GqaGeometry, gqa_geometry, mla_geometry
from transmla.maths.closed_form import ClosedForm
from transmla.maths.reference import mla_naive
from transmla.model.layer import build_layer
from transmla.model.loading import load, load_any, load_tokenizer
from transmla.model.modeling_transmla import (
    TransmlaConfig,
    TransmlaForCausalLM,
    TransmlaForSequenceClassification,
    TransmlaModel,
)
from transmla.model.skeleton import attention_facts, layer_tensors, skeleton
from transmla.targets.own import own_attention, own_config

# one key/value head of 8: 16 values hold all of it, however little of it turns
SIZES: dict[str, Any] = {"kv_heads": 1, "head_dim": 8, "layers": 4}
SIZES_OF = {"gpt_neox": {"kv_heads": 1, "heads": 1, "hidden": 16, "head_dim": 16, "layers": 4}}


PARTIAL = YARN | {"partial_rotary_factor": 0.5}
YARN_OF: dict[str, dict[str, Any]] = {
    "qwen3": YARN, "cohere2": YARN, "glm4": PARTIAL, "phi": PARTIAL, "stablelm": PARTIAL, "minimax_m2": PARTIAL,
    "olmo3": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": THETA}},
}  # fmt: skip


def sizes_of(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type} | SIZES_OF.get(model_type, SIZES)


def full_size(config: dict[str, Any], gqa: GqaGeometry) -> tuple[int, int]:
    """Latent and rotary values of which nothing is lost."""
    return min(gqa.cache_values(), gqa.hidden_size), rotary_dim(config, gqa.head_dim)


def in_float64(model: Any, latent: int | None = None) -> tuple[Any, list[Any]]:
    """The own form of a float64 model and the weights of its layers, by the converter's functions, nothing rounded."""
    config, family = model.config.to_dict(), FAMILIES[model.config.model_type]
    gqa, bare = gqa_geometry(config, "config.json"), skeleton(model.config)
    facts = attention_facts(family, bare, gqa)
    most, rope = full_size(config, gqa)
    sizes = mla_geometry(gqa, latent or most, rope)
    settings = own_config(
        config, family, gqa, sizes, [], "float32", softmax_scale=facts.scaling, softcap=facts.softcap,
        biased=facts.biased, encoded=facts.encoded,
        output_bias=facts.output_bias or (facts.biased and not facts.encoded),
    )  # fmt: skip
    settings = {key: value for key, value in settings.items() if key not in ("model_type", "auto_map", "dtype")}
    own: Any = TransmlaForCausalLM(TransmlaConfig(**settings)).double().eval()
    rotary = own.get_submodule(family.layers.rpartition(".")[0]).rotary_emb
    for one in (model, own.__dict__["_inner"]):  # grouped products know no float64
        one.set_experts_implementation("eager")
    state, found, layers = model.state_dict(), own.state_dict(), []
    tensors = {name: value for name, value in state.items() if f".{family.attention}." not in name}
    for index in range(sizes.num_hidden_layers):
        names = {name: f"{family.layers}.{index}.{name}" for name in layer_tensors(family, bare, index)}
        # built twice: statistics are float32
        narrow = build_layer(family, bare, gqa, index, {name: state[one].float() for name, one in names.items()})
        streams = random_streams(windows=8, tokens=24, hidden=gqa.hidden_size, noise=0.0)
        moments = observe(narrow, streams, 16)
        layer = build_layer(family, bare, gqa, index, {name: state[one].clone() for name, one in names.items()})
        mla = layer.complete(fit_layer(layer.gqa, moments, sizes.kv_lora_rank, rope, None, PLAIN).mla)
        rotary.inv_freq.append(mla.inv_freq_M.tolist())
        prefix = f"{family.layers}.{index}.{family.attention}."
        attention = own_attention(mla, layer.order_d, layer.rotary_dim, layer.rotary_factor)
        tensors |= {prefix + name: value for name, value in attention.items()}
        layers.append((layer, mla))
    assert set(tensors) == set(found)
    own.load_state_dict(tensors)
    return own, layers


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nothing_dropped_is_the_same_model(model_type: str, request: pytest.FixtureRequest) -> None:
    model: Any = lively_model(lively_config(**sizes_of(model_type))).double()
    own, _ = in_float64(model)
    request.getfixturevalue("nothing_rounds")
    # the only attention of Gemma 2 has a float32 softmax; angles of theta 1,000 are rounded in another order
    tolerance = {"gemma2": 1e-6, "gemma3_text": 1e-7}.get(model_type, 1e-8)
    with torch.no_grad():
        wanted = model(IDS).logits
        assert relative(own(IDS).logits, wanted) < tolerance
        # one rotary pair the other way round
        name = next(name for name in own.state_dict() if name.endswith("kv_a_proj_with_mqa.weight"))
        with torch.no_grad():
            own.get_parameter(name)[-1] *= -1
        assert relative(own(IDS).logits, wanted) > 1e-4


@pytest.mark.parametrize("model_type", YARN_OF)
def test_factors_that_come_with_turning(model_type: str, request: pytest.FixtureRequest) -> None:
    """YaRN's, of the values that turn and in the layers that do, behind norms as well."""
    model: Any = lively_model(lively_config(**sizes_of(model_type), rope=YARN_OF[model_type])).double()
    own, _ = in_float64(model)
    request.getfixturevalue("nothing_rounds")
    with torch.no_grad():
        # frequencies of YaRN are float32 in transformers
        assert relative(own(IDS).logits, model(IDS).logits) < 1e-7


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text", "glm4", "cohere2"])
@pytest.mark.parametrize("queries", [1, 24])
def test_fewer_values_are_the_naive_reference(model_type: str, queries: int) -> None:
    """Both ways to compute attention: one query over a cache is absorbed, a whole text is not."""
    model: Any = lively_model(lively_config(**sizes_of(model_type) | {"kv_heads": 2, "layers": 2})).double()
    own, layers = in_float64(model, latent=6)
    layer, mla = layers[0]
    x_TD = lively_values(24, 48, seed=7)
    attention = own.get_submodule(f"{layer.family.layers}.0.{layer.family.attention}")
    base = own.get_submodule(layer.family.layers.rpartition(".")[0])
    angles = base.rotary_emb(x_TD[None], torch.arange(24)[None])
    places = torch.arange(24)
    seen_TT = places <= places[:, None]
    if mla.window is not None:
        seen_TT &= places > places[:, None] - mla.window
    with torch.no_grad():
        q_nope, q_rope, key = attention.project(x_TD[None], angles)
        q_nope, q_rope, seen_TT = q_nope[:, :, -queries:], q_rope[:, :, -queries:], seen_TT[-queries:]
        mask = seen_TT[None, None]
        absorbs = attention.absorbs(q_nope, key, mask)
        run = attention.absorbed if absorbs else attention.decompressed
        found = attention.o_proj(run(q_nope, q_rope, key, mask)[0].flatten(2))[0]
    assert absorbs == (queries == 1)
    if mla.encoder is None:
        wanted = mla_naive(x_TD, mla)
    else:
        heads = layer.heads(x_TD)
        wanted = mla_naive(layer.inputs(x_TD, heads), mla, queries_HTd=heads[0])
    assert relative(found, wanted[-queries:]) < 1e-6


@pytest.mark.parametrize(
    ("model_type", "form"), [*((model_type, "auto") for model_type in FAMILIES), ("qwen2", "transmla")]
)
def test_converted_folder(lively: MakeSource, run: Convert, model_type: str, form: str) -> None:
    """From disk to disk: the form that the rule picks, and generation with a cache as without one."""
    source = lively(**sizes_of(model_type))
    config = json.loads((source / "config.json").read_text("utf-8"))
    planned = transmla.plan(str(source))
    latent, rope = full_size(planned.config, planned.gqa)
    stock = model_type in ("llama", "mistral", "ministral", "qwen2", "smollm3", "phi3") and form == "auto"
    theta = float(rope_parameters(planned.config)["rope_theta"]) if stock else "auto"
    report = run(source, latent=latent, rope=rope, method=PLAIN, theta=theta, format=form)
    assert report.plan.form == ("deepseek_v3" if stock else "transmla")
    assert form != "auto" or bool(report.plan.obstacles) != stock
    assert report.verification.relative_error < 1e-3
    own = load(report.destination, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    written = own.generate(IDS, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        assert relative(own(IDS).logits, theirs(IDS).logits) < 1e-3
        assert torch.equal(own(written).logits[:, IDS.shape[1] - 1 : -1].argmax(-1), written[:, IDS.shape[1] :])
    assert config["model_type"] == model_type


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma3_text"])
def test_refinement_trains_what_the_form_has(lively: MakeSource, run: Convert, model_type: str) -> None:
    source = lively(model_type=model_type, tied=True)
    report = run(source, latent=12, rope=8, tokens=2048, refine="fast", refinement=QUICK, format="transmla")
    assert report.blocks[-1].loss_after < report.blocks[-1].loss_before
    assert report.verification.relative_error < 1e-3
    model = load(report.destination, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    cache = model(IDS, use_cache=True).past_key_values
    assert cache.layers[-1].keys.shape[-1] == 20 and cache.layers[-1].values.shape[-1] == 0


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe", "gemma3_text"])
def test_on_every_device(lively: MakeSource, run: Convert, model_type: str, device: torch.device) -> None:
    """Converted there, where it is the same model as on the CPU, also with a packed cache."""
    settings: dict[str, Any] = {"tokens": 2048, "refine": "fast", "refinement": QUICK, "format": "transmla"}
    folder = run(lively(model_type=model_type), latent=12, rope=8, device=device.type, **settings).destination
    here, there = (load(folder, dtype=torch.float32, device=one) for one in ("cpu", device))
    with torch.no_grad():
        assert relative(there(IDS.to(device)).logits.cpu(), here(IDS).logits) < 1e-4
        found = []
        for model in (here, there):
            cache = model.latent_cache("int8", sink=2, recent=4)
            parts = [part.to(model.device) for part in (IDS[:, :30], IDS[:, 30:31], IDS[:, 31:])]
            found.append(torch.cat([model(part, past_key_values=cache).logits.cpu() for part in parts], dim=1))
        # a value between two levels may go either way
        assert relative(found[1], found[0]) < 0.02
    texts = [model.generate(IDS.to(model.device), max_new_tokens=8, do_sample=False).cpu() for model in (here, there)]
    assert torch.equal(*texts)


def test_padded_texts_are_the_texts_alone(lively: MakeSource, run: Convert) -> None:
    report = run(lively(model_type="qwen3"), latent=12, rope=8)
    model = load(report.destination, dtype=torch.float32)
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    together = model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)
    alone = model.generate(IDS[1:, 7:], max_new_tokens=6, do_sample=False)
    assert torch.equal(together[1, 7:], alone[0])


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_static_cache_and_one_graph(lively: MakeSource, run: Convert, model_type: str) -> None:
    folder = run(lively(model_type=model_type), latent=12, rope=8, format="transmla").destination
    model = load(folder, dtype=torch.float32)
    wanted = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False, cache_implementation="static"), wanted)
    in_pieces = {"cache_implementation": "static", "prefill_chunk_size": 5, "disable_compile": True}
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False, **in_pieces), wanted)
    assert model.generate(IDS, max_new_tokens=8, do_sample=False, num_beams=3).shape == wanted.shape
    whole = torch.compile(model, backend="eager", fullgraph=True)
    roomy = StaticCache(config=model.config, max_cache_len=IDS.shape[1] + 9)
    with torch.no_grad():
        assert torch.allclose(model(IDS, past_key_values=roomy).logits, model(IDS).logits, atol=1e-4)
        assert torch.allclose(whole(IDS).logits, model(IDS).logits, atol=1e-5)


def test_the_trainer_of_transformers_finds_its_columns(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    """It looks for them in the signature of forward; the saved folder is the trained model."""
    folder = run(lively(model_type="qwen3"), latent=12, rope=8).destination
    model = load(folder, dtype=torch.float32)
    before = {name: value.clone() for name, value in copy.deepcopy(model).state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row, "unused": 1} for row in IDS]
    Trainer(model, arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    assert not torch.equal(model.state_dict()["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    model.save_pretrained(tmp_path / "trained")
    again = load(tmp_path / "trained", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_without_the_package(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    """The folder loads with trust_remote_code where transmla is not installed, and saves itself whole."""
    report = run(lively(model_type="qwen3"), latent=12, rope=8)
    code = f"""
import sys
sys.modules["transmla"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
ids = torch.tensor({IDS.tolist()})
model = AutoModelForCausalLM.from_pretrained({str(report.destination)!r}, trust_remote_code=True, dtype="float32")
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
assert torch.equal(model(ids).logits, again(ids).logits)
print(float(model(ids).logits.double().sum()))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    with torch.no_grad():
        wanted = float(load(report.destination, dtype=torch.float32)(IDS).logits.double().sum())
    assert float(found.stdout.split()[-1]) == pytest.approx(wanted, rel=1e-4)


def test_doctor_in_a_process_that_has_loaded_nothing(lively: MakeSource, run: Convert) -> None:
    folder = str(run(lively(model_type="qwen3"), latent=12, rope=8).destination)
    code = f"import transmla; print(transmla.doctor({folder!r}).geometry)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.split() == ["12+8"], found.stderr


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma3_text", "gpt_neox"])
def test_other_heads(lively: MakeSource, run: Convert, model_type: str) -> None:
    """The model without a head, and one with a new head to train."""
    sizes = {"kv_heads": 6, "head_dim": 8} if model_type == "gpt_neox" else {}
    folder = run(lively(model_type=model_type, **sizes), latent=12, rope=4, format="transmla").destination
    whole, body = load(folder, dtype=torch.float32), AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, whole.base_model(IDS).last_hidden_state)
        streams, wanted = (one(IDS, output_hidden_states=True).hidden_states for one in (body, whole.base_model))
        assert len(streams) == len(wanted) == 4 and all(map(torch.equal, streams, wanted))
        # the table of tokens, which GPT-NeoX calls by another name, can be read and grown in both
        for one in (whole, body):
            one.resize_token_embeddings(520, mean_resizing=False)
            assert one.get_input_embeddings().weight.shape[0] == 520
        assert body(torch.full((1, 4), 519)).last_hidden_state.isfinite().all()
    judge = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=3)
    loss = judge(IDS, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert judge(IDS).logits.shape == (2, 3)
    grads = {name: weight.grad for name, weight in judge.named_parameters() if "kv_a_proj" in name}
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_head_that_the_source_s_family_lacks_is_not_promised(model_type: str) -> None:
    source = lively_config(**sizes_of(model_type))
    config, family = source.to_dict(), FAMILIES[model_type]
    gqa = gqa_geometry(config, "config.json")
    written = own_config(
        config, family, gqa, mla_geometry(gqa, 8, 4), [], "float32",
        softmax_scale=1.0, softcap=None, biased=False, encoded=False, output_bias=False,
    )  # fmt: skip
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(written["auto_map"])
    promised = "AutoModelForSequenceClassification" in written["auto_map"]
    with (
        torch.device("meta"),
        contextlib.nullcontext() if promised else pytest.raises(ValueError, match="Unrecognized"),
    ):
        AutoModelForSequenceClassification.from_config(source)


def test_the_model_without_a_head_is_the_source_s_in_all_that_transformers_asks() -> None:
    """Two families in one process; layers are not cut between devices; what is exchanged later runs."""
    bodies = []
    for model_type in ("llama", "qwen3_moe"):
        text_config = lively_config(layers=2, model_type=model_type).to_dict()
        bodies.append(TransmlaModel(own_sizes(text_config)).eval())
    for body, recorded in zip(bodies, ({"hidden_states"}, {"hidden_states", "router_logits"}), strict=True):
        inner = body.__dict__["_inner"]
        assert body._no_split_modules == inner._no_split_modules and body._no_split_modules
        assert body._skip_keys_device_placement == inner._skip_keys_device_placement
        wanted = {"output_hidden_states": True, "output_router_logits": True}
        found = {name for name in ("hidden_states", "router_logits") if body(IDS, **wanted).get(name) is not None}
        assert found == recorded
    body = copy.deepcopy(bodies[0])
    assert not body.train().eval().__dict__["_inner"].training and body.train().__dict__["_inner"].training
    before = body(IDS, output_hidden_states=True).hidden_states
    body.layers = body.layers[:1]
    after = body(IDS, output_hidden_states=True).hidden_states
    assert (len(before), len(after)) == (3, 2) and torch.equal(before[0], after[0])


def test_no_weight_of_a_new_model_is_what_lay_in_memory() -> None:
    """The rotary projection of queries is a parameter of its own in the form of norms on queries and keys."""
    torch.use_deterministic_algorithms(True)  # which fills new memory with nan
    try:
        model: Any = TransmlaForCausalLM(own_sizes(lively_config(layers=2, model_type="qwen3").to_dict(), "features"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []
    assert 0.01 < float(model.model.layers[1].self_attn.q_rope_proj.detach().std()) < 0.03


def small_config(**settings: Any) -> TransmlaConfig:
    """Of a llama in the own form that nobody has converted."""
    return own_sizes(lively_config(layers=2, dtype=settings.get("dtype")).to_dict(), **settings)


def own_sizes(text_config: dict[str, Any], latent_encoder: str = "input", **settings: Any) -> TransmlaConfig:
    return TransmlaConfig(
        text_config=text_config, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=12, v_head_dim=12,
        latent_inv_freq=[[1.0, 0.1]] * 2, latent_encoder=latent_encoder, source_rotary_dim=12, **settings,
    )  # fmt: skip


def test_what_is_changed_in_the_config_holds_in_the_source_s_modules() -> None:
    judge: Any = TransmlaForSequenceClassification(small_config()).eval()
    with pytest.raises(ValueError, match="padding token"):
        judge(IDS)
    judge.config.pad_token_id = 0
    assert judge(IDS).past_key_values is not None and judge(IDS).hidden_states is None
    judge.config.use_cache, judge.config.output_hidden_states = False, True
    assert judge(IDS).past_key_values is None and len(judge(IDS).hidden_states) == 3


def test_a_changed_config_is_copied_and_saved(tmp_path: Path) -> None:
    small_config().save_pretrained(tmp_path)
    config = TransmlaConfig.from_pretrained(tmp_path)
    before = config.to_json_string()
    changed = copy.deepcopy(config)
    changed.use_cache, changed.eos_token_id, changed.num_labels = False, 5, 3
    changed.kv_lora_rank, changed.dtype = 9, torch.bfloat16
    assert config.to_json_string() == before
    changed.save_pretrained(tmp_path)
    # what is the source's alone is there once
    assert "use_cache" not in json.loads((tmp_path / "config.json").read_text("utf-8"))
    for one in (changed, TransmlaConfig.from_pretrained(tmp_path)):
        for part in (one, one.text_config):
            assert (part.use_cache, part.eos_token_id, part.num_labels) == (False, 5, 3)
        assert one.kv_lora_rank == 9 and not hasattr(one.text_config, "kv_lora_rank")
        assert (one.dtype, one.text_config.dtype) == (torch.bfloat16, None)
    config.save_pretrained(tmp_path)
    assert TransmlaConfig.from_pretrained(tmp_path).to_json_string() == before
    told = TransmlaConfig.from_pretrained(tmp_path, num_labels=4, pad_token_id=7, use_cache=False)
    for part in (told, told.text_config):
        assert (part.num_labels, part.pad_token_id, part.use_cache) == (4, 7, False)


def test_all_weights_have_one_dtype() -> None:
    """That of torch where the class is called as it is, and the config's where transformers builds the model."""
    for make, wanted in ((TransmlaForCausalLM, torch.float32), (AutoModelForCausalLM.from_config, torch.bfloat16)):
        model: Any = make(small_config(dtype="bfloat16"))
        assert {weight.dtype for weight in model.parameters()} == {wanted}


@pytest.mark.parametrize("form", ["deepseek_v3", "transmla"])
@pytest.mark.parametrize("window", [None, -1, 0])
def test_a_window_that_is_none(lively: MakeSource, run: Convert, window: int | None, form: str) -> None:
    """transformers takes -1 for a window of minus one; nobody means that."""
    source = lively(model_type="mistral", kv_heads=1, sliding_window=window)
    report = run(source, latent=12, rope=12, format=form, method=PLAIN, theta=10000.0)
    assert report.plan.form == form and report.plan.max_position_embeddings == 256
    unlimited = lively_model(lively_config(model_type="mistral", kv_heads=1, sliding_window=None))
    own, theirs = (load_any(one, dtype=torch.float32) for one in (report.destination, source))
    with torch.no_grad():
        wanted = unlimited(IDS).logits
        assert relative(own(IDS).logits, wanted) < 1e-3 and relative(theirs(IDS).logits, wanted) < 1e-5
        written = own.generate(IDS, max_new_tokens=6, do_sample=False)
        assert torch.equal(own(written).logits[:, IDS.shape[1] - 1 : -1].argmax(-1), written[:, IDS.shape[1] :])


@pytest.mark.parametrize(
    ("model_type", "setting"),
    [("mistral", "sliding_window"), ("gemma2", "final_logit_softcapping"), ("gemma", "pad_token_id")],
)
def test_settings_that_are_null_stay_null(
    lively: MakeSource, run: Convert, tmp_path: Path, model_type: str, setting: str
) -> None:
    """The class has another default for each of them; a model that is saved again keeps them as well."""
    source = lively(model_type=model_type, layers=2, **{setting: None})
    folder, again = run(source, latent=12, rope=8, format="transmla").destination, tmp_path / "again"
    load(folder).save_pretrained(again)
    for config in (load(folder).config, load(again).config):
        assert getattr(config.text_config, setting) is None and getattr(config, setting) is None


def test_the_auto_classes(lively: MakeSource, run: Convert, tmp_path: Path) -> None:
    """What it takes to load the own form by them without code from the folder: one call, which `import` does not make;
    and the tokenizer needs nothing but a no to the question that it would ask."""
    folder = run(lively(model_type="qwen3"), latent=12, rope=8).destination
    (folder / "modeling_transmla.py").write_text("raise SystemExit('code of the folder ran')\n", encoding="utf-8")
    code = f"""
import sys
from transformers import AutoConfig, AutoTokenizer
folder = {str(folder)!r}
print(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("Once").input_ids)
import transmla
assert "transmla.model.loading" not in sys.modules
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=False)
except ValueError:
    transmla.register()
print(type(AutoConfig.from_pretrained(folder)).__name__)
print(AutoTokenizer.from_pretrained(folder)("Once").input_ids)
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert found.returncode == 0, found.stderr
    first, config, second, model = found.stdout.splitlines()
    assert first == second == str(load_tokenizer(folder)("Once").input_ids)
    assert (config, model) == ("TransmlaConfig", "TransmlaForCausalLM")


def test_the_form_is_chosen_by_rule(lively: MakeSource) -> None:
    qwen = str(lively(model_type="qwen3"))
    planned = transmla.plan(qwen)
    assert planned.form == "transmla" and planned.obstacles == ("norms on queries and keys",)
    assert planned.summary()["obstacles"] == ["norms on queries and keys"]
    assert [verdict.engine for verdict in planned.engines if verdict.accepts] == ["transformers, own class"]
    assert any("norms on queries and keys" in note for note in planned.notes)
    # vLLM with the plugin, at the size of its kernels
    roomy = str(lively(model_type="qwen3", hidden=640, kv_heads=4, heads=8, head_dim=128, layers=1))
    with_kernels = transmla.plan(roomy, latent=512, rope=64)
    running = {verdict.engine for verdict in with_kernels.engines if verdict.accepts}
    assert running == {"transformers, own class", "vLLM (GPU)", "vLLM (CPU)"}
    with pytest.raises(UnsupportedError, match="norms on queries and keys"):
        transmla.plan(qwen, format="deepseek_v3")
    with pytest.raises(GeometryError, match="queries"):
        transmla.plan(qwen, q_latent=16)
    llama = str(lively())
    assert transmla.plan(llama).form == "deepseek_v3" and transmla.plan(llama, format="transmla").form == "transmla"


@pytest.mark.parametrize(
    ("model_type", "settings", "obstacle"),
    [
        ("llama", {"mlp_bias": True}, "biases in the MLP"),
        ("llama", {"hidden_act": "gelu"}, "an MLP with gelu"),
        ("granite", {}, "multipliers of embeddings, residuals or logits"),
        ("gemma2", {}, "capped logits"),
    ],
)
def test_obstacles(lively: MakeSource, model_type: str, settings: dict[str, Any], obstacle: str) -> None:
    assert obstacle in transmla.plan(str(lively(model_type=model_type, **settings))).obstacles


def test_a_closed_form_with_repairs(lively: MakeSource, run: Convert) -> None:
    """At half of the cache, with the defaults of the method, the repair makes the stream's error smaller."""
    source = lively(model_type="qwen3")
    plain = run(source, "plain", latent=16, rope=8, method=PLAIN)
    repaired = run(source, "repaired", latent=16, rope=8, method=ClosedForm())
    assert repaired.layers[-1].stream_loss_fitted < plain.layers[-1].stream_loss_fitted
