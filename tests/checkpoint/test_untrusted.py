"""Files of strangers: whatever they hold, reading them ends in a result or in one of our errors, in little memory.

docs/reliability.md has the counts. TRANSMLA_FUZZ multiplies the number of inputs.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transmla
from tests.families import lively_source
from transmla.checkpoint.companions import tokenizer
from transmla.checkpoint.read import open_source
from transmla.errors import SourceError, TransmlaError

TIMES = int(os.environ.get("TRANSMLA_FUZZ", "1"))
TRIED: Counter[str] = Counter()
STRANGE: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, "", "12", "x" * 1000, "../../etc", [], [1, 2], {}, {"a": []}, -1, 0, 1, 3, 7, 2**31, 2**63, 10**30,
     1e308, 0.5, -0.0, float("nan"), float("inf"), [[[]]] * 3, {"rope_type": "yarn"}, {"rope_type": 3},
     {"rope_theta": "a"}]
).map(copy.deepcopy)  # fmt: skip


def fuzz(examples: int) -> Callable[[Any], Any]:
    """As many inputs, the same in every run."""
    return settings(
        max_examples=examples * TIMES, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def outcome(kind: str, call: Callable[[], Any]) -> str:
    """What came of it: one of our errors, or a result."""
    TRIED[kind] += 1
    try:
        call()
    except TransmlaError as error:
        assert error.exit_code in range(1, 11) and all((error.what, error.where, error.why, error.remedy))
        return type(error).__name__
    return "result"


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20, "KiB"
    print(dict(TRIED))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_source(tmp_path_factory.mktemp("untrusted") / "model", layers=1)


@pytest.fixture(scope="module")
def victim(source: Path) -> Path:
    """A copy that the tests of this file take turns to damage."""
    return Path(shutil.copytree(source, source.with_name("victim")))


@pytest.fixture(autouse=True)
def mended(source: Path, victim: Path) -> None:
    shutil.rmtree(victim)
    shutil.copytree(source, victim)


@fuzz(150)
@given(st.data())
def test_config(source: Path, victim: Path, data: st.DataObject) -> None:
    config = json.loads((source / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(STRANGE)
    (victim / "config.json").write_text(json.dumps(config))
    outcome("config.json", lambda: transmla.plan(str(victim)))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe", b"null", b"NaN", b'{"model_type": NaN}', b"{}",
     b'"x"', b'{"model_type": "llama", "hidden_size": 1' + b"0" * 5000 + b"}"],
)  # fmt: skip
def test_config_that_is_none(victim: Path, content: bytes) -> None:
    (victim / "config.json").write_bytes(content)
    assert outcome("config.json", lambda: transmla.plan(str(victim))) in ("SourceError", "UnsupportedError")


def test_a_config_with_a_byte_order_mark(victim: Path) -> None:
    """transformers does not read one, so the tokenizer would fail."""
    content = (victim / "config.json").read_bytes()
    (victim / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    with pytest.raises(SourceError, match="byte order mark"):
        open_source(victim)


def test_a_config_of_a_hundred_megabytes(victim: Path) -> None:
    with (victim / "config.json").open("wb") as file:
        file.write(b'{"a": [')
        for _ in range(100):
            file.write(b"[],[],[],[]," * 90_000)
        file.write(b"0]}")
    assert outcome("config.json", lambda: transmla.plan(str(victim))) == "SourceError"


INDEX = "model.safetensors.index.json"


@fuzz(60)
@given(st.data())
def test_index(victim: Path, data: st.DataObject) -> None:
    names = [
        "model.safetensors",
        "/etc/passwd",
        "../victim/model.safetensors",
        "loop",
        INDEX,
        "a\\b",
        "",
        ".",
        "x\0y",
        "é" * 300,
    ]
    shard = st.one_of(st.sampled_from(names), STRANGE)
    tensor = st.sampled_from(["model.norm.weight", "lm_head.weight", "", "\0"])
    content = data.draw(
        st.one_of(STRANGE, st.fixed_dictionaries({"weight_map": st.one_of(STRANGE, st.dictionaries(tensor, shard))}))
    )
    if (victim / "model.safetensors").exists():
        (victim / "model.safetensors").rename(victim / "model-1.safetensors")
        (victim / "loop").symlink_to(victim / "loop")
    (victim / INDEX).write_text(json.dumps(content))
    assert outcome("index.json", lambda: transmla.plan(str(victim))) == "SourceError"


@fuzz(200)
@given(st.data())
def test_safetensors_header(source: Path, victim: Path, data: st.DataObject) -> None:
    content = (source / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    first = header[names[0]]["data_offsets"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
        value = data.draw(
            st.one_of(
                STRANGE, st.lists(st.integers(-(2**70), 2**70), max_size=5),
                st.sampled_from(["F64", "I32", "F8_E4M3", "Q9", first]),
            )
        )  # fmt: skip
        if key is None:
            header[name] = value
        elif isinstance(header[name], dict):
            header[name][key] = value
    if data.draw(st.booleans()):
        header["__metadata__"] = data.draw(STRANGE)
    written = json.dumps(header).encode()
    claimed = data.draw(st.sampled_from([len(written)] * 6 + [0, 1, len(written) + 5, 2**40, 2**64 - 1]))
    (victim / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + written + body)

    def read() -> None:
        opened = open_source(victim)
        transmla.plan(str(victim))
        for name in opened.tensors:
            opened.read(name)

    outcome("safetensors", read)


@pytest.mark.parametrize(
    "header",
    [b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
     b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
     b"[" * 100_000, b'{"a":{"dtype":"F32","shape":[' + b"1," * 200_000 + b'1],"data_offsets":[0,4]}}'],
)  # fmt: skip
def test_headers_that_lie(victim: Path, header: bytes) -> None:
    """A name twice, tensors that overlap, and depth."""
    (victim / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    assert outcome("safetensors", lambda: transmla.plan(str(victim))) == "SourceError"


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("block_count", 1),
        ("embedding_length", 32),
        ("attention.head_count", 2),
        ("context_length", 64),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.feed_forward_length", 32)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["<unk>", "a", "b"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
    writer.add_string("tokenizer.ggml.model", "llama")
    for name in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(name, np.zeros((3, 32) if "embd" in name else (32,), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@fuzz(300)
@given(st.data())
def test_gguf(small_gguf: bytes, victim: Path, data: st.DataObject) -> None:
    content = bytearray(small_gguf)
    numbers = st.sampled_from([0, 1, 7, 255, 2**16, 2**31 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1])
    for place in data.draw(st.lists(st.integers(4, len(content) - 9), min_size=1, max_size=4)):
        width = data.draw(st.sampled_from([1, 4, 8]))
        content[place : place + width] = (data.draw(numbers) % 256**width).to_bytes(width, "little")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    (victim / "model.gguf").write_bytes(content)

    def read() -> None:
        opened = open_source(victim / "model.gguf")
        transmla.plan(str(victim / "model.gguf"))
        for name in opened.tensors:
            opened.read(name)
        tokenizer(opened)

    outcome("gguf", read)


@pytest.mark.parametrize("place", [8, 16])
@pytest.mark.parametrize("count", [2**20, 2**40, 2**64 - 1])
def test_gguf_with_absurd_counts(small_gguf: bytes, victim: Path, place: int, count: int) -> None:
    content = bytearray(small_gguf)
    content[place : place + 8] = count.to_bytes(8, "little")
    (victim / "model.gguf").write_bytes(content)
    assert outcome("gguf", lambda: open_source(victim / "model.gguf")) == "SourceError"


@pytest.mark.parametrize("kind", [0, 1, 4, 6, 8, 9, 12, 99])
@pytest.mark.parametrize("count", [2**24, 2**62])
def test_gguf_with_absurd_arrays(victim: Path, kind: int, count: int) -> None:
    key = b"tokenizer.ggml.tokens"
    content = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IIQ", 9, kind, count) + b"\0" * 64
    (victim / "model.gguf").write_bytes(content)
    assert outcome("gguf", lambda: open_source(victim / "model.gguf")) == "SourceError"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_pickles_are_never_run(victim: Path, tmp_path: Path, form: str) -> None:
    (victim / "model.safetensors").unlink()
    target, path = tmp_path / "was run", victim / "pytorch_model.bin"
    if form == "plain":
        path.write_bytes(pickle.dumps(Evil(target)))
    else:
        torch.save({"a": Evil(target)}, path, _use_new_zipfile_serialization=form == "zip")
    assert outcome("bin", lambda: transmla.plan(str(victim))) == "SourceError" and not target.exists()
    torch.load(path, weights_only=False) if form != "plain" else pickle.loads(path.read_bytes())
    assert target.exists(), "it would have been"


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch wonders about protocols
@fuzz(60)
@given(st.data())
def test_bin(victim: Path, data: st.DataObject) -> None:
    path = victim / "pytorch_model.bin"
    if (victim / "model.safetensors").exists():
        (victim / "model.safetensors").unlink()
    torch.save({"a": torch.ones(4), "b": torch.zeros(2, 2)}, path)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    outcome("bin", lambda: transmla.plan(str(victim)))


@fuzz(100)
@given(st.data())
def test_tokenizer(source: Path, victim: Path, data: st.DataObject) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text())
        node, key = {"": content}, ""
        for _ in range(data.draw(st.integers(0, 3))):  # somewhere inside
            inner = node[key]
            keys = (
                sorted(inner)
                if isinstance(inner, dict)
                else range(min(3, len(inner)))
                if isinstance(inner, list)
                else []
            )
            if not keys:
                break
            node, key = inner, data.draw(st.sampled_from(list(keys)))
        node[key] = data.draw(STRANGE)
        (victim / name).write_text(json.dumps(content if key != "" else node[""]))

    def cut() -> None:
        tokenizer(open_source(victim))("Once upon a time")

    outcome("tokenizer", lambda: tokenizer(open_source(victim)))


def test_code_in_a_folder_of_our_own_is_never_run(
    source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converted folder and its form for training name code in auto_map, which somebody may have replaced."""
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
    settings: dict[str, Any] = {
        "refine": "off",
        "theta": 100.0,
        "tokens": 64,
        "window": 16,
        "calibration": str(text_file),
    }
    transmla.convert(str(source), tmp_path / "mla", latent=8, rope=4, **settings)
    transmla.unfold(tmp_path / "mla", tmp_path / "train")
    for folder in (tmp_path / "mla", tmp_path / "train"):
        (folder / "modeling_transmla.py").write_text(CODE.format(target=str(tmp_path / "was run")))
    assert {check.name: check.passed for check in transmla.verify(tmp_path / "train").checks}["hashes"] is False
    transmla.fold(tmp_path / "train", tmp_path / "folded", text=str(text_file))
    transmla.evaluate(tmp_path / "mla", windows=2, length=16)
    transmla.doctor(tmp_path / "mla")
    next(iter(transmla.generate(tmp_path / "mla", "Once", max_new_tokens=2)))
    assert not asked and not (tmp_path / "was run").exists()
    assert "open(" not in (tmp_path / "folded" / "modeling_transmla.py").read_text()[:200]


CODE = "open({target!r}, 'w').close()\n"


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("model_type", ["llama", "stranger"])
def test_code_in_a_folder_is_never_run(
    text_file: Path, victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, model_type: str
) -> None:
    """Nor is anybody asked."""

    def asked(*_: Any) -> str:
        raise AssertionError("it asks")

    monkeypatch.setattr("builtins.input", asked)
    target = tmp_path / "was run"
    (victim / "evil.py").write_text(CODE.format(target=str(target)))
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    values = json.loads((victim / where).read_text()) | {"auto_map": auto_map}
    if where == "config.json":
        values["model_type"] = model_type
    else:
        values["tokenizer_class"] = "T"
    (victim / where).write_text(json.dumps(values))
    found = outcome("auto_map", lambda: transmla.plan(str(victim)))
    assert found == ("UnsupportedError" if where == "config.json" and model_type == "stranger" else "result")
    outcome("auto_map", lambda: tokenizer(open_source(victim)))
    outcome(
        "auto_map",
        lambda: transmla.convert(
            str(victim), tmp_path / "out", latent=8, rope=4, refine="off", theta=100.0, calibration=str(text_file),
            tokens=64, window=16,
        ),
    )  # fmt: skip
    outcome("auto_map", lambda: transmla.evaluate(victim, windows=2, length=16))
    assert not target.exists()
    if (tmp_path / "out").exists():
        assert not list((tmp_path / "out").glob("evil*"))
        assert "evil" not in (tmp_path / "out" / "config.json").read_text()


def test_what_was_read_before_is_read_still(victim: Path) -> None:
    """The untouched folder is fine, so the errors above are not about something else."""
    assert outcome("none", lambda: transmla.plan(str(victim))) == "result"
    with pytest.raises(SourceError):
        transmla.plan(str(victim / "nowhere"))
