"""What users of converters and of converted models have reported, each as it happened: see docs/field-reports.md.

Reports that a test elsewhere holds are not repeated here; the document names those.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

import transmla
from tests.conversion.made import EXACT, IDS, digest
from tests.families import LLAMA3, MakeSource, lively_config, sparse_source
from tests.maths.weights import relative
from transmla.conversion.flow import ConversionReport, convert
from transmla.errors import DestinationError, SourceError
from transmla.evaluation.cache import measured_bytes_per_token
from transmla.maths.attention import inverse_frequencies
from transmla.model.loading import load
from transmla.model.skeleton import source_frequencies
from transmla.targets.engines import MLX, WRONG
from transmla.targets.export import open_converted
from transmla.targets.gguf import gguf_settings

Change = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture
def copy_of(lively: MakeSource, tmp_path: Path) -> Callable[..., Path]:
    """copy_of(**settings) -> a lively source that may be changed."""

    def make(**settings: Any) -> Path:
        return Path(shutil.copytree(lively(**settings), tmp_path / "source"))

    return make


@pytest.fixture
def run(tmp_path: Path, text_file: Path) -> Callable[..., ConversionReport]:
    """A conversion to tmp_path/out, or another name."""

    def converted(source: Path, name: str = "out", **settings: Any) -> ConversionReport:
        short: dict[str, Any] = {"calibration": str(text_file), "tokens": 256, "window": 32, "refine": "off"}
        return convert(str(source), tmp_path / name, **short | settings)

    return converted


def edit_config(folder: Path, **values: Any) -> None:
    """Change keys of config.json; ... removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), encoding="utf-8")


def edit_weights(folder: Path, change: Change) -> None:
    """Change the named tensors; the file is saved without metadata."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


# --- sizes (reports 1 and 2)


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "layers", "inner", "cached", "tied"),
    [
        (2048, 16, 2, 36, 11008, 512, True),  # Qwen2.5-3B
        (3584, 28, 4, 28, 18944, 1024, False),  # Qwen2.5-7B, DeepSeek-R1-Distill-Qwen-7B
        (5120, 40, 8, 64, 27648, 2048, False),  # Qwen2.5-32B
    ],
)
def test_sizes_at_which_others_failed(
    tmp_path: Path, hidden: int, heads: int, kv_heads: int, layers: int, inner: int, cached: int, tied: bool
) -> None:
    config = lively_config(
        model_type="qwen2", hidden=hidden, heads=heads, kv_heads=kv_heads, layers=layers, head_dim=128, vocab=152064,
        tied=tied,
    )  # fmt: skip
    values = config.to_dict() | {"intermediate_size": inner}
    del values["head_dim"]
    planned = transmla.plan(str(sparse_source(tmp_path / "source", values)), latent=256, rope=64)
    assert (planned.gqa.head_dim, planned.gqa.cache_values(), planned.mla.cache_values()) == (128, cached, 320)
    queries = heads * 128
    weights = hidden * (heads * (128 + 64) + 256 + 64 + queries) + 256 * heads * (128 + 128)
    biases = 256 + 64 + hidden + heads * (128 + 64)  # of kv_a, o and the queries
    assert planned.mla.attention_weights == weights + biases


# --- nothing is lost that was there before (report 6)


def state_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_conversion_that_fails_leaves_the_source_alone(copy_of: Callable[..., Path], run: Any) -> None:
    source = copy_of(kv_heads=1)
    edit_weights(source, lambda stored: stored["lm_head.weight"][-1].fill_(float("nan")))
    before = state_of(source)
    with pytest.raises(SourceError, match="NaN or infinity"):
        run(source)
    assert state_of(source) == before
    with pytest.raises(DestinationError, match="exists"):
        convert(str(source), source)
    assert state_of(source) == before and [path.name for path in source.parent.iterdir()] == ["source"]


# --- the head (reports 7 and 8)

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
# (what the config says, what is in the file beside the embeddings)
HEADS: dict[str, tuple[dict[str, Any], Change]] = {
    "tied, no head in the file": ({}, lambda stored: None),
    "tied, the same head in the file": ({}, lambda stored: stored.update({HEAD: stored[EMBEDDINGS].clone()})),
    "tied, another head in the file": ({}, lambda stored: stored.update({HEAD: stored[EMBEDDINGS].flip(0).clone()})),
    "nothing said, another head in the file": (
        {"tie_word_embeddings": ...},
        lambda stored: stored.update({HEAD: stored[EMBEDDINGS].flip(0).clone()}),
    ),
}


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_head_is_the_one_that_transformers_takes(
    copy_of: Callable[..., Path], run: Any, model_type: str, case: str
) -> None:
    """Stock form and own form; Gemma's class ties where the config says nothing, Llama's does not."""
    source = copy_of(model_type=model_type, kv_heads=1, tied=True)
    config, change = HEADS[case]
    edit_config(source, **config)
    edit_weights(source, change)
    report = run(source, **EXACT)
    wanted = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager"))
    assert relative(logits(load(report.destination, dtype=torch.float32)), wanted) < 1e-3
    # some engines need the head in the file, and none may find two
    written = load_file(report.destination / "model.safetensors")
    other = "another" in case
    assert (HEAD in written) == (other or report.plan.form == "deepseek_v3")
    tied = json.loads((report.destination / "config.json").read_text("utf-8"))["tie_word_embeddings"]
    assert tied == (report.plan.form == "transmla" and not other)


def test_a_family_that_ties_by_default(copy_of: Callable[..., Path], run: Any) -> None:
    source = copy_of(model_type="gemma2", kv_heads=1, tied=True)
    edit_config(source, tie_word_embeddings=...)
    report = run(source, **EXACT)
    wanted = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager"))
    assert relative(logits(load(report.destination, dtype=torch.float32)), wanted) < 1e-3


def test_a_head_that_nobody_mentions(copy_of: Callable[..., Path]) -> None:
    """transformers would make a random one."""
    source = copy_of(kv_heads=1, tied=True)
    edit_config(source, tie_word_embeddings=...)
    with pytest.raises(SourceError, match=r"lm_head\.weight") as caught:
        transmla.plan(str(source))
    assert "tie_word_embeddings" in caught.value.remedy


# --- files (reports 9 to 11)


def test_weights_without_metadata(copy_of: Callable[..., Path], run: Any) -> None:
    """Read as they are, written with the metadata that loaders insist on."""
    source = copy_of(kv_heads=1)
    edit_weights(source, lambda stored: None)
    with safe_open(source / "model.safetensors", "pt") as stored:
        assert not stored.metadata()
    report = run(source, shard_bytes=60_000, **EXACT)
    files = sorted(report.destination.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        with safe_open(file, "pt") as written:
            assert written.metadata() == {"format": "pt"}


@pytest.mark.parametrize("kept_in", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_chat_template_goes_along(copy_of: Callable[..., Path], run: Any, model_type: str, kept_in: str) -> None:
    source = copy_of(model_type=model_type)
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    if kept_in == "chat_template.jinja":
        (source / kept_in).write_text(template, encoding="utf-8")
    else:
        settings = json.loads((source / kept_in).read_text("utf-8"))
        (source / kept_in).write_text(json.dumps(settings | {"chat_template": template}), encoding="utf-8")
    report = run(source, latent=8, rope=4)
    tokenizer = AutoTokenizer.from_pretrained(report.destination)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Once"}], tokenize=False)
    assert said == "<user>Once"


@pytest.mark.parametrize("do_sample", [..., False, True])
def test_a_temperature_without_sampling(copy_of: Callable[..., Path], run: Any, do_sample: Any) -> None:
    """The folder can be saved again, after any change, and engines read the temperature that the source has."""
    source = copy_of(kv_heads=1)
    values = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2} | (
        {} if do_sample is ... else {"do_sample": do_sample}
    )
    (source / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    folder = run(source, **EXACT).destination
    for number, model in enumerate((load(folder), AutoModelForCausalLM.from_pretrained(folder))):
        model.generation_config.pad_token_id = 0
        model.save_pretrained(folder.parent / f"again-{number}")
    written = json.loads((folder / "generation_config.json").read_text("utf-8"))
    assert written == values | {"do_sample": True}
    assert json.loads((source / "generation_config.json").read_text("utf-8")) == values


# --- rotary settings (report 13)


def test_old_and_new_spelling_of_the_source(lively: MakeSource, copy_of: Callable[..., Path], run: Any) -> None:
    new = lively(rope=LLAMA3 | {"rope_theta": 500000.0})
    old = copy_of(rope=LLAMA3 | {"rope_theta": 500000.0})
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    edit_config(old, rope_parameters=..., rope_theta=500000.0, rope_scaling=scaling)
    plain = lively(rope={"rope_type": "default", "rope_theta": 500000.0})
    digests = [digest(run(one, name, latent=16, rope=8).destination) for one, name in ((new, "a"), (old, "b"))]
    assert digests[0] == digests[1] != digest(run(plain, "c", latent=16, rope=8).destination)


def test_the_written_folder_is_right_under_both_readers(lively: MakeSource, run: Any) -> None:
    """Those of before transformers 5 read rope_theta and rope_scaling, and know no rope_parameters."""
    report = run(lively(rope=LLAMA3), latent=16, rope=8)
    config = json.loads((report.destination / "config.json").read_text("utf-8"))
    assert config["rope_theta"] == report.theta and "rope_parameters" not in config and "head_dim" not in config
    old = config["rope_scaling"]
    assert old["factor"] == 1.0 and old["mscale"] == old["mscale_all_dim"]
    new = DeepseekV3RotaryEmbedding(DeepseekV3Config(**config))
    assert new.attention_scaling == 1.0
    assert torch.allclose(new.inv_freq.double(), inverse_frequencies(config["rope_theta"], 8), rtol=1e-6)


def test_the_own_form_depends_on_no_spelling(lively: MakeSource, run: Any) -> None:
    """Its frequencies are written in radians; the source's settings beside them are not read any more."""
    report = run(lively(model_type="qwen3", rope=LLAMA3), latent=16, rope=8)
    config = json.loads((report.destination / "config.json").read_text("utf-8"))
    wanted = logits(load(report.destination, dtype=torch.float32))
    family, planned = report.plan.family, report.plan
    scaled_P, _ = source_frequencies(lively_config(model_type="qwen3", rope=LLAMA3), planned.gqa, family, 0)
    assert all(any(abs(found / scaled - 1) < 1e-5 for scaled in scaled_P.tolist())
               for found in config["latent_inv_freq"][0])  # fmt: skip
    edit_config(
        report.destination,
        text_config=config["text_config"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    )
    assert torch.equal(logits(load(report.destination, dtype=torch.float32)), wanted)


def test_a_folder_that_transformers_has_saved_again(lively: MakeSource, run: Any) -> None:
    """It spells the rotary settings in its own way then, which one engine does not read."""
    folder = run(lively(), latent=16, rope=8).destination
    again = folder.parent / "again"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
    saved, written = (json.loads((one / "config.json").read_text("utf-8")) for one in (again, folder))
    assert "rope_theta" not in saved and "rope_parameters" not in written
    found = {verdict.engine: verdict for verdict in transmla.doctor(again).engines}
    assert found[MLX].outcome == WRONG and "rope_theta" in found[MLX].findings[0].why
    opened = open_converted(again)
    assert opened.config["rope_theta"] == written["rope_theta"]
    assert gguf_settings(opened.config, "x") == gguf_settings(written, "x")


# --- caches and adapters (reports 5 and 21)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_cache_is_measured_to_be_the_latent(lively: MakeSource, run: Any, model_type: str) -> None:
    """In the stock class, too, which caches expanded keys and values in older releases of transformers."""
    report = run(lively(model_type=model_type), latent=16, rope=8)
    models = [load(report.destination, dtype=torch.bfloat16)]
    if report.plan.form == "deepseek_v3":
        models.append(AutoModelForCausalLM.from_pretrained(report.destination, dtype=torch.bfloat16))
    assert [measured_bytes_per_token(model) for model in models] == [3 * (16 + 8) * 2] * len(models)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_adapters_on_the_form_for_training(lively: MakeSource, run: Any, model_type: str) -> None:
    """Adapters count in decoding with a cache, where the converted class would rather absorb the weights beneath."""
    folder = run(lively(model_type=model_type), latent=16, rope=8).destination
    if model_type == "llama":
        folder = transmla.unfold(folder, folder.parent / "unfolded")
    adapters = LoraConfig(r=2, target_modules=["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], init_lora_weights=False)
    bare = logits(load(folder, dtype=torch.float32))
    torch.manual_seed(0)
    model = get_peft_model(load(folder, dtype=torch.float32), adapters).eval()
    with torch.no_grad():
        whole = model(IDS).logits
        cache = model(IDS[:, :30], use_cache=True).past_key_values
        steps = [model(IDS[:, place : place + 1], past_key_values=cache).logits for place in range(30, IDS.shape[1])]
    assert relative(torch.cat(steps, 1), whole[:, 30:]) < 1e-4 and relative(whole, bare) > 1e-2
    model.train()
    model(IDS, labels=IDS).loss.backward()
    grads = [weight.grad for name, weight in model.named_parameters() if "lora" in name]
    assert grads and all(grad is not None and torch.isfinite(grad).all() for grad in grads)


def test_the_document_names_tests_that_exist() -> None:
    root = Path(__file__).parents[1]
    document = (root / "docs" / "field-reports.md").read_text("utf-8")
    assert [int(number) for number in re.findall(r"^\| (\d+)\. ", document, re.MULTILINE)] == list(range(1, 22))
    named = re.findall(r"`(tests/\S+?\.py)::(\w+)`", document)
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in (root / file).read_text("utf-8"), f"{file}::{name}"
