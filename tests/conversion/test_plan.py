"""The dry run: arithmetic of caches and disks, from headers alone."""

import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import transmla
from tests.checkpoint.test_gguf_families import write as write_gguf
from tests.families import LLAMA3, MakeSource, sparse_source
from transmla.checkpoint.read import Source
from transmla.conversion.flow import convert
from transmla.conversion.plan import cache_rows, plan
from transmla.conversion.target import target_config
from transmla.errors import DestinationError
from transmla.geometry import GqaGeometry, mla_geometry
from transmla.recipe import find_recipe, load_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Source, "read", fail)
    monkeypatch.setattr(Source, "rows", fail)


def libraries(*words: str) -> set[str]:
    """Those of the slow ones that a command imports."""
    code = (
        "import sys; from transmla.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print(*{'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_headers_are_enough(tmp_path: Path) -> None:
    """A plan takes a third of a second because nothing that takes longer is imported; where there is a doubt, it is."""
    assert libraries("plan", "stories260k", "--latent", "24") == set()
    assert libraries("doctor", "stories260k") == libraries("recipes") == libraries("families") == set()
    folder = tmp_path / "llama"
    shutil.copytree(str(resources.files("transmla.data") / "stories260k"), folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"a_setting_of_tomorrow": 1}), encoding="utf-8")
    assert libraries("plan", str(folder), "--latent", "24") >= {"torch", "transformers"}


def test_headers_of_gguf_files_are_enough(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "qwen2")
    assert libraries("plan", str(tmp_path / "m.gguf"), "--latent", "12", "--rope", "8") == set()


@pytest.mark.parametrize(
    "words", [["plan", "stories260k", "--json"], ["recipes"], ["families"], ["doctor", "stories260k"]], ids=str
)
def test_what_answers_at_once(words: list[str]) -> None:
    assert libraries(*words) == set()


@pytest.mark.usefixtures("no_reading")
def test_plan_reads_headers_only(lively: MakeSource, tmp_path: Path) -> None:
    planned = plan(str(lively(shards=3)), tmp_path / "out", latent=16, rope=8)
    assert (planned.mla.kv_lora_rank, planned.mla.qk_rope_head_dim) == (16, 8)
    assert planned.cache_ratio == 24 / 48 and planned.dtype == "float32"
    assert list(tmp_path.iterdir()) == []


def test_without_reading_nothing_is_converted(
    lively: MakeSource, tmp_path: Path, text_file: Path, no_reading: None
) -> None:
    with pytest.raises(AssertionError, match="a tensor was read"):
        convert(str(lively()), tmp_path / "out", calibration=str(text_file), tokens=512, window=64)


def test_cache_rows() -> None:
    """Llama-3-8B at 512+64: values per token and layer, bytes per token over all layers."""
    source = GqaGeometry(32, 4096, 32, 8, 128)
    rows = {row.name: row for row in cache_rows(source, mla_geometry(source, 512, 64))}
    found = {name: (row.values_per_token, row.bytes_per_token) for name, row in rows.items()}
    assert found == {
        "source GQA, bf16": (2048, 131072),
        # blocks of 32 values carry a scale of two bytes: 8.5 and 4.5 bits a value
        "source, 8-bit": (2048, 69632),
        "source, 4-bit": (2048, 36864),
        "as MHA, bf16": (8192, 524288),
        "as MQA, bf16": (256, 16384),
        "MLA 512+64, bf16": (576, 36864),
    }
    assert rows["MLA 512+64, bf16"].total_bytes(131072) == 36864 * 131072


def test_notes(lively: MakeSource) -> None:
    def notes(*, latent: int = 16, **settings: Any) -> str:
        return "\n".join(plan(str(lively(**settings)), latent=latent, rope=8).notes)

    assert "not smaller" in notes(latent=40) and "not smaller" not in notes()
    assert "at 4 ranks 36 values per token and layer become 24" in notes(kv_heads=6)
    assert "tensor parallel" in notes() and "tensor parallel" not in notes(kv_heads=1)
    assert "6 turn, so 2 of the rotary key stay empty: --latent 18 --rope 6" in notes(model_type="glm4")
    assert "stay empty" not in notes()
    assert "rope scaling" not in notes()
    assert "llama3 rope scaling becomes plain frequencies of a rope_theta" in notes(rope=LLAMA3)
    assert "llama3 rope scaling becomes frequencies that each layer keeps" in notes(rope=LLAMA3, model_type="qwen3")
    assert "max_position_embeddings becomes 32" in notes(model_type="mistral", sliding_window=32)
    assert "becomes" not in notes(model_type="mistral", sliding_window=4096)


def test_what_the_class_does_not_have_is_said(lively: MakeSource, tmp_path: Path) -> None:
    """As biases of a "llamafied" model whose config does not announce them, and code that is not run."""
    folder = tmp_path / "source"
    shutil.copytree(lively(), folder)
    assert "no place" not in " ".join(transmla.plan(str(folder)).notes), "buffers and all that is known"
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        "model.layers.0.self_attn.q_proj.bias": torch.ones(72), "model.layers.2.self_attn.scale": torch.ones(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6), "model.layers.3.eh_proj.weight": torch.ones(2),
    }  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Model"}}))
    notes = " ".join(transmla.plan(str(folder)).notes)
    assert "no place for 2 tensors" in notes and "q_proj.bias, model.layers.2.self_attn.scale" in notes
    assert "code of its own, which is not run" in notes


def test_old_and_new_rope_configs_plan_alike(lively: MakeSource, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(lively(), folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}), encoding="utf-8")
    assert plan(str(folder)).mla == plan(str(lively())).mla


@pytest.mark.parametrize(
    ("stored", "wanted", "planned"),
    [
        (torch.bfloat16, "auto", "bfloat16"),
        (torch.float16, "auto", "float16"),
        (torch.float64, "auto", "float32"),
        (torch.float32, "bfloat16", "bfloat16"),
    ],
)
def test_dtype_is_that_of_the_source_unless_given(
    lively: MakeSource, stored: torch.dtype, wanted: str, planned: str
) -> None:
    assert plan(str(lively(dtype=stored)), dtype=wanted).dtype == planned


@pytest.mark.parametrize("tied", [True, False])
def test_disk_is_what_gets_written(lively: MakeSource, tmp_path: Path, text_file: Path, tied: bool) -> None:
    """Within the reserve for tokenizer, configs and journal."""
    settings: dict[str, Any] = {"calibration": str(text_file), "tokens": 512, "window": 64, "refine": "off"}
    report = convert(str(lively(tied=tied)), tmp_path / "out", **settings)
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*"))
    journal = 4 * report.plan.mla.num_hidden_layers * report.plan.mla.attention_weights
    assert written < report.plan.disk_bytes - journal < written + 2**25
    assert report.written_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_memory_grows_with_the_text(lively: MakeSource) -> None:
    few, many = (plan(str(lively()), tokens=tokens).memory_bytes for tokens in (10_000, 1_000_000))
    assert many - few == 990_000 * (2 * 48 + 72) * 4


@pytest.mark.parametrize("measured", ["llama-3-8b-2-layers", "llama-3-8b-2-layers-fast-blocks-of-1"])
def test_memory_is_what_was_measured(tmp_path: Path, measured: str) -> None:
    """At the size of a large model, in the closed form and with one layer refined at a time, on few tokens."""
    recipe = find_recipe("llama-3-8b")
    assert recipe is not None
    model = load_recipe(recipe).model
    assert model is not None
    source = sparse_source(tmp_path / "model", {**model.config, "num_hidden_layers": 2})
    report = json.loads((BENCHMARKS / f"results/wide/{measured}.json").read_text("utf-8"))
    settings = {key: value for key, value in report["settings"].items() if key != "block_layers"}
    assert plan(str(source), **settings).memory_bytes == pytest.approx(report["peak_rss_gib"] * 2**30, rel=0.05)


def test_the_source_that_writes_is_in_memory(lively: MakeSource, text_file: Path) -> None:
    def notes(**settings: Any) -> str:
        return "\n".join(plan(str(lively()), **settings).notes)

    said = "the whole source is in memory"
    assert said in notes(calibration="self") and said in notes(calibration=f"{text_file}:3+self")
    assert said in notes(sampled=64) and said not in notes(calibration=str(text_file))


def test_disk_is_checked_before_anything_is_read(
    lively: MakeSource, tmp_path: Path, no_reading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(DestinationError, match="disk is too small"):
        plan(str(lively()), tmp_path / "out")


def test_recipe_gives_way_to_arguments(lively: MakeSource, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'source = "{lively()}"\nlatent = 20\nrope = 4\ntokens = 9999\n', encoding="utf-8")
    planned = plan(str(lively(kv_heads=6)), recipe=recipe, rope=8)
    assert (planned.mla.kv_lora_rank, planned.mla.qk_rope_head_dim, planned.recipe.tokens) == (20, 8, 9999)
    assert planned.resolved.path == lively(kv_heads=6)


def test_the_embedded_model() -> None:
    planned = plan("stories260k", latent=28, rope=4)
    assert (planned.gqa.num_hidden_layers, planned.gqa.hidden_size, planned.gqa.head_dim) == (5, 64, 8)


@pytest.mark.parametrize("download", [True, False])
def test_key_value_heads_that_the_class_does_not_read(lively: MakeSource, tmp_path: Path, download: bool) -> None:
    """GPT-NeoX has as many as heads, and transformers loads a config that names fewer."""
    folder = shutil.copytree(lively(model_type="gpt_neox", hidden=72), tmp_path / "source")
    values = json.loads((folder / "config.json").read_text()) | {"num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(values))
    assert transmla.plan(str(folder), download=download).gqa.kind == "MHA"


@pytest.mark.parametrize("model_type", ["mistral", "qwen3", "phi3"])
def test_what_a_config_leaves_out_is_its_class_s(tmp_path: Path, model_type: str) -> None:
    """Sizes and epsilon have other defaults in every family; a wrong one would give a wrong model."""
    config = AutoConfig.for_model(
        model_type, hidden_size=512, num_attention_heads=32, num_hidden_layers=2, vocab_size=40000
    )
    values = config.to_dict()
    left_out = ("num_key_value_heads", "head_dim", "rms_norm_eps", "intermediate_size")
    found = transmla.plan(
        str(sparse_source(tmp_path / "short", {key: value for key, value in values.items() if key not in left_out})),
        latent=16, rope=8,
    )  # fmt: skip
    whole = transmla.plan(str(sparse_source(tmp_path / "whole", values)), latent=16, rope=8)
    assert found.gqa == whole.gqa and found.gqa.num_key_value_heads == config.num_key_value_heads
    if found.form == "deepseek_v3":
        written = target_config(found, 10000.0)
        assert written == target_config(whole, 10000.0)
        assert written["unfolded_rms_norm_eps"] == config.rms_norm_eps


def test_tokens_that_a_config_leaves_out_are_its_class_s(lively: MakeSource, tmp_path: Path) -> None:
    """deepseek_v3 has other ones by default."""
    folder = shutil.copytree(lively(), tmp_path / "source")
    values = json.loads((folder / "config.json").read_text())
    short = {key: value for key, value in values.items() if key not in ("bos_token_id", "eos_token_id")}
    (folder / "config.json").write_text(json.dumps(short))
    written = target_config(transmla.plan(str(folder), download=True, latent=16, rope=8), 10000.0)
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)
