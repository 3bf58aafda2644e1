"""What is written: dtypes, shards, provenance, tokenizer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from tests.conversion.made import EXACT, Convert, digest, logits, weights
from tests.families import MakeSource
from tests.maths.weights import relative
from transmla.conversion import card
from transmla.conversion.flow import default_destination
from transmla.conversion.plan import plan
from transmla.maths.closed_form import ClosedForm


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_written_in_another_dtype(lively: MakeSource, run: Convert, dtype: str) -> None:
    source = lively(kv_heads=1)
    report = run(source, dtype=dtype, **EXACT)
    assert {str(value.dtype) for value in weights(report.destination).values()} == {f"torch.{dtype}"}
    assert relative(logits(report.destination), logits(source)) < 0.05
    config = json.loads((report.destination / "config.json").read_text("utf-8"))
    assert config["dtype"] == config["torch_dtype"] == dtype


def test_one_shard_and_ten_hold_the_same(lively: MakeSource, run: Convert) -> None:
    one = run(lively(), "one").destination
    ten = run(lively(), "ten", shard_bytes=60_000).destination
    assert len(list(one.glob("*.safetensors"))) == 1 and len(list(ten.glob("*.safetensors"))) >= 8
    whole, dealt = weights(one), weights(ten)
    assert whole.keys() == dealt.keys() and all(torch.equal(whole[name], dealt[name]) for name in whole)
    assert torch.equal(logits(one), logits(ten))


def test_the_output_explains_itself(lively: MakeSource, run: Convert) -> None:
    source = lively()
    report = run(source, latent=16, rope=8, seed=5)
    made = json.loads((report.destination / "transmla.json").read_text("utf-8"))
    assert made["source"]["name"] == source.name and made["source"]["revision"] is None
    assert made["source"]["files"] == {"model.safetensors": digest(source)}
    assert made["recipe"] | {"latent": 16, "rope": 8, "seed": 5, "window": 64, "dtype": "float32"} == made["recipe"]
    assert made["geometry"]["gqa"]["num_key_value_heads"] == 2 and made["geometry"]["mla"]["kv_lora_rank"] == 16
    assert made["method"]["output_ridge"] == ClosedForm().output_ridge
    assert {"transmla", "torch", "transformers", "safetensors", "python"} <= made["versions"].keys()
    assert made["calibration"]["tokens"] == 512 and len(made["calibration"]["sha256"]) == 64
    assert made["rope_theta"]["chosen"] == report.theta
    assert [layer["layer"] for layer in made["layers"]] == [0, 1, 2]
    assert made["layers"][1]["latent_loss"] == report.layers[1].latent_loss
    assert [layer["latent_scale"] for layer in made["layers"]] == list(report.latent_scales)
    assert made["heldout"]["source"] == report.heldout.source
    text = (report.destination / "README.md").read_text("utf-8")
    assert "16 + 8" in text and "for inference" in text.lower() and "no gradient steps" in text
    head, body = yaml.safe_load(text.split("---\n")[1]), text.split("---\n", 2)[2]
    assert head["library_name"] == "transformers" and "transmla" in head["tags"] and "base_model" not in head
    assert body.index("Do not train") < body.index("## Use"), "said first"
    assert "llama-server -m OUT.gguf" in text and "vllm serve" not in text, "only what runs this size"
    assert "4-bit" in text and "Not run by vLLM (GPU)" in text and str(report.destination.parent) not in text


def test_everything_that_goes_along(lively: MakeSource, run: Convert, text_file: Path) -> None:
    source = lively()
    folder = run(source).destination
    text = text_file.read_text("utf-8")[:500]
    before, after = (AutoTokenizer.from_pretrained(path)(text).input_ids for path in (source, folder))
    assert before == after and len(after) > 100
    assert (folder / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert (folder / "modeling_transmla.py").is_file()
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


def test_default_destination(lively: MakeSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_destination(plan("stories260k", latent=24, rope=4)) == Path("stories260k-mla-24-4")
    assert default_destination(plan(str(lively()), latent=24, rope=4)) == Path("model-mla-24-4")
    monkeypatch.chdir(lively())
    assert default_destination(plan(".", latent=24, rope=4)) == Path("model-mla-24-4")


def test_what_the_hub_reads_of_a_card(tmp_path: Path) -> None:
    """The source's name where it has one there, its licence as its own card says it, and public texts."""

    def front(**resolved: Any) -> dict[str, Any]:
        planned: Any = SimpleNamespace(
            resolved=SimpleNamespace(path=tmp_path, **resolved), recipe=SimpleNamespace(mix="wikitext:3+me/texts+self")
        )
        found: dict[str, Any] = yaml.safe_load(card._front_matter(planned).strip("-"))
        return found

    here = front(name="a", revision=None)
    assert (here["license"], here["license_name"]) == ("other", "that-of-the-source-model")
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlicense_link: LICENSE\n---\nlicense: none\n")
    there = front(name="me/model", revision="main")
    assert (there["license"], there["license_link"]) == ("mit", "LICENSE") and "license_name" not in there
    assert (there["base_model"], there["base_model_relation"]) == ("me/model", "finetune")
    assert there["datasets"] == ["Salesforce/wikitext", "me/texts"]
