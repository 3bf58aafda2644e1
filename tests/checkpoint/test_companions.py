"""Tokenizer, template and licence go along; weights and code stay."""

import json
import shutil
from importlib import resources

import pytest

from transmla.checkpoint.companions import copy_companions, tokenizer
from transmla.checkpoint.read import open_source
from transmla.errors import SourceError

COPIED = [
    "LICENSE",
    "LICENSE.md",
    "NOTICE.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
]
LEFT = ["modeling_x.py", "LICENSE.py", "other.safetensors", "README.md", "training_args.bin", "LICENSE.bin"]


def test_copies_these_and_no_others(folder, tensors, tmp_path):
    path = folder(tensors)
    for name in (*COPIED, *LEFT):
        (path / name).write_text(name)
    destination = tmp_path / "out"
    destination.mkdir()
    assert copy_companions(open_source(path), destination) == COPIED
    found = {entry.name: entry.read_text() for entry in destination.iterdir()}
    assert found == {name: name for name in COPIED}
    (path / "additional_chat_templates").mkdir()
    for name in ("tools.jinja", "notes.txt"):
        (path / "additional_chat_templates" / name).write_text(name)
    assert copy_companions(open_source(path), destination) == sorted(["additional_chat_templates/tools.jinja", *COPIED])
    (copied,) = (destination / "additional_chat_templates").iterdir()
    assert copied.read_text() == "tools.jinja"


def test_links_are_followed(folder, tensors, tmp_path):
    path = folder(tensors)
    (tmp_path / "blob").write_text("{}")
    (path / "tokenizer.json").symlink_to(tmp_path / "blob")
    (tmp_path / "out").mkdir()
    copy_companions(open_source(path), tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_tokenizer_is_that_of_the_folder(folder, tensors, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = folder(tensors)
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    source = open_source(path)
    assert tokenizer(source)("b a x")["input_ids"] == [1, 0, 2]
    (tmp_path / "out").mkdir()
    assert copy_companions(source, tmp_path / "out") == ["tokenizer.json", "tokenizer_config.json"]


def test_a_sentencepiece_model_alone(folder, tensors, tmp_path):
    import sentencepiece

    text = (resources.files("transmla.data") / "stories.txt").read_text("utf-8")[:30_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "made"), vocab_size=400, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    path = folder(tensors)
    shutil.copy(tmp_path / "made.model", path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = sentencepiece.SentencePieceProcessor(str(tmp_path / "made.model"))
    for some in ("Once upon a time", "naïve"):
        assert tokenizer(open_source(path))(some).input_ids == [1, *own.encode(some)]


def test_without_a_tokenizer(folder, tensors):
    path = folder(tensors)
    with pytest.raises(SourceError, match=r"none of tokenizer\.json") as error:
        tokenizer(open_source(path))
    assert str(path) in str(error.value)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="no tokenizer that can be read"):
        tokenizer(open_source(path))


def test_code_of_the_checkpoint_is_not_run(folder, tensors, tmp_path):
    path = folder(tensors)
    (path / "tokenizer.json").write_text("{}")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "own.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(SourceError, match="no tokenizer that can be read"):
        tokenizer(open_source(path))
    assert not (tmp_path / "sprung").exists()
