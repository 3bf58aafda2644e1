"""What vLLM is given of a folder in the own form, without vLLM: its own attention is replaced by plain products.

The engine itself: tests/targets/test_engines_run.py.
"""

import pickle
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion.made import IDS
from tests.conversion.test_own_form import in_float64, sizes_of
from tests.families import lively_config, lively_model
from tests.maths.weights import relative
from transmla.families import FAMILIES
from transmla.model.modeling_transmla import TransmlaForCausalLM
from transmla.serving.vllm import DENSE, EXPERTS, ServedConfig, ServedModel, check_served

ROOT = Path(__file__).parents[2]


class Engine:
    """vLLM's attention as far as a text that fits into one step goes: all tokens at once, nothing cached before."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __call__(
        self, q_THq: torch.Tensor, latent_Tr: torch.Tensor, rope_T1e: torch.Tensor, output_shape: tuple[int, int]
    ) -> torch.Tensor:
        attention = self.attention
        nope, tokens = attention.qk_nope_head_dim, len(q_THq)
        up_Hbr = attention.kv_b_proj.weight.unflatten(0, (-1, nope + attention.v_head_dim))
        q_THr = torch.einsum("thn,hnr->thr", q_THq[..., :nope], up_Hbr[:, :nope])
        scores_HTS = torch.einsum("thr,sr->hts", q_THr, latent_Tr)
        scores_HTS += torch.einsum("the,se->hts", q_THq[..., nope:], rope_T1e[:, 0])
        later_TS = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights_HTS = (scores_HTS * attention.scaling).masked_fill(later_TS, -torch.inf).softmax(-1)
        out_THv = torch.einsum("hts,sr,hvr->thv", weights_HTS, latent_Tr, up_Hbr[:, nope:])
        assert out_THv.flatten(1).shape == output_shape
        return out_THv.flatten(1)


def served(own: Any) -> ServedModel:
    """The same weights in the class that vLLM makes; own: a model in the own form."""
    values = {
        key: value for key, value in own.config.to_dict().items() if key not in ("model_type", "auto_map", "dtype")
    }
    config = ServedConfig(**values)
    config._attn_implementation = "eager"
    model = ServedModel(config).double().eval()
    base = own.config.base_module
    source = own.get_submodule(base)
    found = source.state_dict()
    assert set(model.state_dict()) == set(found)
    model.load_state_dict(found)
    model.rotary_emb.inv_freq = source.rotary_emb.inv_freq
    if config.text_config.to_dict().get("num_experts") or config.text_config.to_dict().get("num_local_experts"):
        model.__dict__["_inner"].set_experts_implementation("eager")
    for layer in model.layers:
        attention = getattr(layer, own.config.attention_module)
        attention.attn = Engine(attention)
    return model


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "gemma2"])
def test_served_is_the_own_class(model_type: str, request: pytest.FixtureRequest) -> None:
    """Every family but Gemma 2, whose soft cap is refused; a text as long as the windows, which hold all of it."""
    ids_1T, places_1T = IDS[:1], torch.arange(IDS.shape[1])[None]
    config = lively_config(**sizes_of(model_type))
    if getattr(config, "sliding_window", None):
        config.sliding_window = ids_1T.shape[1]
    own, _ = in_float64(lively_model(config).double(), latent=6)
    request.getfixturevalue("nothing_rounds")
    model = served(own)
    # vLLM puts its own in the place of this one
    assert model.get_input_embeddings().weight.shape == (512, config.hidden_size)
    with torch.no_grad():
        wanted = own.get_submodule(own.config.base_module)(ids_1T).last_hidden_state
        assert relative(model(input_ids=ids_1T, position_ids=places_1T).last_hidden_state, wanted) < 1e-9
        # positions are those that vLLM names
        assert relative(model(input_ids=ids_1T, position_ids=3 * places_1T).last_hidden_state, wanted) > 1e-4


def served_config(**source: Any) -> ServedConfig:
    sizes = {"kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return ServedConfig(text_config=lively_config(**source).to_dict(), architectures=[DENSE], **sizes)


def test_the_config_is_flat() -> None:
    """What vLLM asks of it, in the process that read it and in the next one."""
    config = served_config(model_type="qwen3")
    for one in (config, pickle.loads(pickle.dumps(config))):
        text = one.get_text_config()
        assert text is one and (text.kv_lora_rank, text.qk_rope_head_dim) == (6, 4)
        assert (text.num_attention_heads, text.num_hidden_layers, text.vocab_size) == (6, 3, 512)


@pytest.mark.parametrize(
    ("model_type", "name"), [("qwen3", DENSE), ("qwen3_moe", EXPERTS), ("mixtral", EXPERTS), ("minimax_m2", EXPERTS)]
)
def test_experts_have_a_class_of_their_own(model_type: str, name: str) -> None:
    assert served_config(model_type=model_type).architectures == [name]
    assert TransmlaForCausalLM.__name__ == DENSE


def test_what_vllm_cannot_do_is_refused() -> None:
    check_served("out", served_config(model_type="qwen3"), 10**6, 1)
    with pytest.raises(ValueError, match="--tensor-parallel-size"):
        check_served("out", served_config(model_type="qwen3"), 256, 2)
    capped = served_config(model_type="gemma2")
    capped.softcap = 5.0
    with pytest.raises(ValueError, match="out caps its attention scores at 5"):
        check_served("out", capped, 8, 1)
    windowed = served_config(model_type="gemma3_text", sliding_window=200)
    check_served("out", windowed, 200, 1)
    with pytest.raises(ValueError, match="--max-model-len 200"):
        check_served("out", windowed, 201, 1)
    # Qwen's config has a window that its class does not use
    check_served("out", served_config(model_type="qwen2", sliding_window=8, use_sliding_window=False), 256, 1)


# a vLLM that keeps what it is told
_FAKE = """
import sys, types
vllm, tools, sizes = (types.ModuleType(name) for name in ("vllm", "tools", "sizes"))
class Base:
    def is_deepseek_mla(self):
        return False
class ModelRegistry:
    told = {}
    register_model = told.__setitem__
vllm.ModelRegistry, tools.model_arch_config_convertor = ModelRegistry, sizes
sizes.ModelArchConfigConvertorBase, sizes.MODEL_ARCH_CONFIG_CONVERTORS = Base, {}
sys.modules |= {"vllm": vllm, "vllm.transformers_utils": tools}
sys.modules["vllm.transformers_utils.model_arch_config_convertor"] = sizes
"""


def in_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_plugin_tells_vllm() -> None:
    """The function that pyproject.toml names, and what it leaves behind; vLLM's own module is not imported for it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, name = settings["entry-points"]["vllm.general_plugins"]["transmla"].partition(":")
    assert callable(getattr(import_module(module), name))
    done = in_new_process(
        f"{_FAKE}\n"
        f"from {module} import {name}, ServedConfig, ServedModel\n"
        f"{name}()\n"
        "from transformers import AutoConfig, AutoModel\n"
        "assert sizes.MODEL_ARCH_CONFIG_CONVERTORS['transmla']().is_deepseek_mla()\n"
        f"assert set(ModelRegistry.told) == {{'{DENSE}', '{EXPERTS}'}}\n"
        "assert all(str(told).startswith('transmla.serving.vllm_model:') for told in ModelRegistry.told.values())\n"
        "assert AutoConfig.for_model('transmla').__class__ is ServedConfig\n"
        "assert AutoModel._model_mapping[ServedConfig] is ServedModel\n"
        "assert 'transmla.serving.vllm_model' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_a_vllm_that_has_changed_serves_what_it_served() -> None:
    done = in_new_process(
        f"{_FAKE}\ndel sizes.MODEL_ARCH_CONFIG_CONVERTORS\nfrom transmla.serving.vllm import register\nregister()\n"
        "assert not ModelRegistry.told\n"
    )
    assert done.returncode == 0, done.stderr
    assert "this vLLM does not serve folders of model_type transmla" in done.stderr
