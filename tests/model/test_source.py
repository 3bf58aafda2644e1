"""A layer in pieces computes what the Hugging Face layer computes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import transmla
from tests.conversion.pieces import in_pieces, model_and_layer
from tests.families import LINEAR, LLAMA3, YARN, lively_config, lively_source
from tests.maths.weights import relative
from transmla.checkpoint.read import open_source, read_config
from transmla.families import FAMILIES
from transmla.geometry import gqa_geometry
from transmla.model.layer import SourceLayer
from transmla.model.loading import load_source
from transmla.model.skeleton import Stored, layer_tensors, skeleton, source_config, source_frequencies
from transmla.model.source import SourceModel

ROPES = {"default": None, "linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}


def run(layer: SourceLayer, x_TD: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer.through(x_TD, layer.attention)


def stock(model: Any, x_TD: torch.Tensor, index: int = 1) -> torch.Tensor:
    """As the model runs its layer, with the layer's own mask and angles."""
    seen: list[torch.Tensor] = []
    base = model.get_submodule(FAMILIES[model.config.model_type].layers.rpartition(".")[0])

    def instead(_: Any, args: Any, kwargs: Any) -> Any:
        stream_BTD = x_TD[None].clone()
        if args:
            return (stream_BTD, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": stream_BTD}

    def after(_: Any, __: Any, out: Any) -> None:
        seen.append(out if isinstance(out, torch.Tensor) else out[0])

    handles = [
        base.layers[index].register_forward_pre_hook(instead, with_kwargs=True),
        base.layers[index].register_forward_hook(after),
    ]
    with torch.no_grad():
        model(torch.zeros(1, len(x_TD), dtype=torch.long))
    for handle in handles:
        handle.remove()
    return seen[0].view_as(x_TD)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_layer_is_that_of_transformers(model_type: str, rope: str) -> None:
    model, layer = model_and_layer(model_type=model_type, rope=ROPES[rope])
    x_TD = 0.5 * torch.randn(40, 48, generator=torch.Generator().manual_seed(3))
    expected = stock(model, x_TD)
    assert relative(run(layer, x_TD), expected) < 1e-5
    plain = replace(layer, gqa=replace(layer.gqa, inv_freq_P=torch.zeros(6)))
    assert relative(run(plain, x_TD), expected) > 1e-2


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_the_layer_of_transformers(model_type: str, index: int) -> None:
    """In a window longer than any sliding one, and with the plain weights beside the modules that they stand for."""
    heads = {"kv_heads": 6} if model_type == "gpt_neox" else {}
    model, layer = model_and_layer(index, model_type=model_type, head_dim=8, **heads)
    x_TD = 0.5 * torch.randn(40, 48, generator=torch.Generator().manual_seed(3))
    expected = stock(model, x_TD, index)
    assert relative(run(layer, x_TD), expected) < 1e-5
    x_TD = layer.into_attention(x_TD)
    q, k, v = layer.heads(x_TD)
    inputs_TF = layer.inputs(x_TD)
    for found, weight in ((k, layer.gqa.k_GdD), (v, layer.gqa.v_GdD)):
        assert relative(torch.einsum("TF,GdF->GTd", inputs_TF, weight), found) < 1e-6
    read = "HTd,Hed->HTe" if layer.gqa.encoded else "Td,Hed->HTe"
    assert relative(torch.einsum(read, q if layer.gqa.encoded else inputs_TF, layer.gqa.q_HdD), q) < 1e-6


@pytest.mark.parametrize("model_type", ["glm4", "phi", "gpt_neox", "stablelm", "minimax_m2"])
def test_a_factor_of_values_that_turn_leaves_the_others(model_type: str) -> None:
    heads = {"kv_heads": 6} if model_type == "gpt_neox" else {}
    rope = YARN | {"partial_rotary_factor": 0.5}
    model, layer = model_and_layer(1, model_type=model_type, head_dim=8, rope=rope, **heads)
    x_TD = 0.5 * torch.randn(40, 48, generator=torch.Generator().manual_seed(3))
    assert layer.rotary_factor > 1.1 and layer.rotary_dim == 4
    assert relative(run(layer, x_TD), stock(model, x_TD)) < 1e-5


def without(layer: SourceLayer, oddity: str) -> SourceLayer:
    gqa = layer.gqa
    changed: dict[str, Any] = {
        "window": {"gqa": replace(gqa, window=None)},
        "softcap": {"gqa": replace(gqa, softcap=None)},
        "scale": {"gqa": replace(gqa, scaling=8**-0.5)},
        "rotation": {"gqa": replace(gqa, inv_freq_P=torch.zeros_like(gqa.inv_freq_P))},
        "layout": {"order_d": torch.arange(8)},
    }
    return replace(layer, **changed[oddity])


@pytest.mark.parametrize(
    ("model_type", "oddity"),
    [
        ("gemma2", "window"), ("gemma2", "softcap"), ("gemma2", "scale"), ("gemma3_text", "window"),
        ("granite", "scale"), ("cohere", "layout"), ("glm4", "layout"), ("phi3", "layout"), ("qwen3", "rotation"),
        ("smollm3", "rotation"),
    ],
)  # fmt: skip
def test_oddities_matter(model_type: str, oddity: str) -> None:
    model, layer = model_and_layer(0, model_type=model_type, head_dim=8)
    x_TD = 0.5 * torch.randn(40, 48, generator=torch.Generator().manual_seed(3))
    assert relative(run(without(layer, oddity), x_TD), stock(model, x_TD, 0)) > 1e-3


def test_layers_without_rotation() -> None:
    _, turning = model_and_layer(0, model_type="smollm3")
    _, standing = model_and_layer(1, model_type="smollm3")
    assert turning.gqa.inv_freq_P.all() and not standing.gqa.inv_freq_P.any()


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_heads_are_read_in_order(kv_heads: int) -> None:
    model, layer = model_and_layer(kv_heads=kv_heads)
    x_TD = torch.randn(12, 48, generator=torch.Generator().manual_seed(3))
    assert layer.gqa.k_GdD.shape == (kv_heads, 12, 48)
    assert relative(run(layer, x_TD), stock(model, x_TD)) < 1e-5


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_scaled_frequencies_are_those_of_transformers(rope: str) -> None:
    config = lively_config(rope=ROPES[rope])
    geometry = gqa_geometry(config.to_dict(), "config.json")
    found_P, factor = source_frequencies(config, geometry, FAMILIES["llama"], 0)
    model, layer = model_and_layer(rope=ROPES[rope])
    rotary = model.model.rotary_emb
    assert relative(found_P, rotary.inv_freq) < 1e-6
    assert factor == rotary.attention_scaling and (factor != 1.0) == (rope == "yarn")
    assert layer.gqa.scaling == pytest.approx(12**-0.5) and layer.rotary_factor == factor
    plain_P, _ = source_frequencies(lively_config(), geometry, FAMILIES["llama"], 0)
    assert relative(found_P, plain_P) > 0.01


def test_frequencies_of_a_gguf_file_are_divided_by_its_factors() -> None:
    """There, llama3 scaling is a list of divisors and the rope type says nothing."""
    config = lively_config()
    geometry = gqa_geometry(config.to_dict(), "config.json")
    plain_P, _ = source_frequencies(config, geometry, FAMILIES["llama"], 0)
    divided_P, factor = source_frequencies(config, geometry, FAMILIES["llama"], 0, [1.0, 1.0, 2.0, 4.0, 8.0, 8.0])
    assert factor == 1.0
    assert (plain_P / divided_P).tolist() == pytest.approx([1.0, 1.0, 2.0, 4.0, 8.0, 8.0])


def test_everything_but_attention_is_kept_as_it_is() -> None:
    model, layer = model_and_layer()
    state = model.model.layers[1].state_dict()
    assert set(layer.other_tensors) == {name for name in state if "self_attn" not in name}
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.other_tensors.items())


def test_names_and_shapes_of_a_layer() -> None:
    found = layer_tensors(FAMILIES["llama"], skeleton(lively_config()), 2)
    assert found["self_attn.k_proj.weight"] == Stored((24, 48), ("model.layers.2.self_attn.k_proj.weight",))
    assert found["self_attn.o_proj.weight"].part_shape == (48, 72)
    assert len(found) == 9


def test_experts_are_read_one_by_one() -> None:
    found = layer_tensors(FAMILIES["mixtral"], skeleton(lively_config(model_type="mixtral")), 1)
    both, down = found["mlp.experts.gate_up_proj"], found["mlp.experts.down_proj"]
    assert both.shape == (4, 128, 48) and both.part_shape == (64, 48) and down.part_shape == (48, 64)
    assert both.parts[:3] == tuple(
        f"model.layers.1.block_sparse_moe.experts.{name}.weight" for name in ("0.w1", "0.w3", "1.w1")
    )
    values = {name: torch.full(both.part_shape, float(place)) for place, name in enumerate(both.parts)}
    whole = both.assembled(values.__getitem__)
    assert whole.shape == both.shape and whole[1, 0, 0] == 2 and whole[1, 64, 0] == 3 and whole[3, 127, 47] == 7


def test_source_config_ignores_code_of_the_checkpoint() -> None:
    values = lively_config().to_dict() | {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "llama"}
    config = source_config(values)
    assert config.model_type == "llama" and not hasattr(config, "auto_map")


@pytest.mark.parametrize(("model_type", "setting"), [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")])
def test_a_setting_that_is_left_out_is_the_default_of_the_class(tmp_path: Path, model_type: str, setting: str) -> None:
    lively_source(tmp_path, model_type=model_type)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in read_config(path).items() if key != setting}), "utf-8")
    source, ids_1T = open_source(tmp_path), torch.arange(3, 43)[None]
    with torch.no_grad():
        wanted = load_source(source)(ids_1T).logits[0]
    assert relative(in_pieces(source, ids_1T), wanted) < 1e-5


@pytest.mark.parametrize(
    "stray",
    [{"embedding_multiplier": 3.0}, {"residual_multiplier": 0.5}, {"logit_scale": 0.5}, {"logits_scaling": 2.0},
     {"final_logit_softcapping": 3.0}],
    ids=str,
)  # fmt: skip
def test_settings_of_other_families_mean_nothing(tmp_path: Path, stray: dict[str, float]) -> None:
    """Left over in the config of a model that was exported as a Llama; its class does not look at them."""
    lively_source(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read_config(path) | stray), "utf-8")
    source, ids_1T = open_source(tmp_path), torch.arange(3, 43)[None]
    with torch.no_grad():
        wanted = load_source(source)(ids_1T).logits[0]
    assert relative(in_pieces(source, ids_1T), wanted) < 1e-5
    assert transmla.plan(str(tmp_path)).form == "deepseek_v3"


def test_the_next_layer_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(lively_source(tmp_path, layers=2))
    family, geometry = FAMILIES["llama"], gqa_geometry(source.config, "config.json")
    model = SourceModel(source, family, geometry, torch.device("cpu"))
    announced: list[list[str]] = []
    monkeypatch.setattr(source, "announce", lambda names: announced.append(sorted(names)))
    model.layer(0)
    model.layer(1)
    assert announced == [sorted(name for name in source.tensors if name.startswith("model.layers.1."))]
