"""The GGUF file: a float64 model written from llama.cpp's description of deepseek2 computes from it what the stock
class computes from the folder, and a naive tokenizer cuts text as the folder's own does."""

import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

import transmla
from transmla.checkpoint.gguf import write as write_gguf
from transmla.checkpoint.gguf.vocab import add_vocab, read_vocab
from transmla.errors import DestinationError, TransmlaError, UnsupportedError, VerificationError

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "mla"
    transmla.convert("smoke", folder)
    return folder


def value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def weights(reader: GGUFReader) -> dict[str, Tensor]:
    """Dequantised, in float64, with the dimensions in PyTorch's order."""
    return {
        tensor.name.removesuffix(".weight"): torch.tensor(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float64
        ).reshape(*(int(size) for size in reversed(tensor.shape)))
        for tensor in reader.tensors
    }


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x_TPe: Tensor, theta: float) -> Tensor:
    """Neighbouring values are a pair; pair m turns with theta^(-2m/e) per token."""
    size = x_TPe.shape[-1]
    angles = torch.arange(len(x_TPe), dtype=torch.float64)[:, None, None] * theta ** (
        -torch.arange(0, size, 2, dtype=torch.float64) / size
    )
    even, odd = x_TPe[..., 0::2], x_TPe[..., 1::2]
    turned = torch.stack([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], -1)
    return turned.flatten(-2)


def deepseek2_logits(path: Path, ids_T: Tensor) -> Tensor:
    """llama.cpp's deepseek2 graph: multi-query attention with the latent as key and value, all layers dense."""
    reader = GGUFReader(path)
    w = weights(reader)
    get = {key.removeprefix("deepseek2."): value(reader, key) for key in reader.fields if key.startswith("deepseek2.")}
    heads, eps = get["attention.head_count"], get["attention.layer_norm_rms_epsilon"]
    rank, rope, theta = get["attention.kv_lora_rank"], get["rope.dimension_count"], get["rope.freq_base"]
    width = get["attention.key_length_mla"]
    x = w["token_embd"][ids_T]
    future = torch.ones(len(ids_T), len(ids_T)).triu(1).bool()
    for index in range(get["block_count"]):
        block = {name.split(".", 2)[2]: tensor for name, tensor in w.items() if name.startswith(f"blk.{index}.")}
        normed = rms_norm(x, block["attn_norm"], eps)
        q = (normed @ block["attn_q"].T).view(len(x), heads, width)
        down = normed @ block["attn_kv_a_mqa"].T
        latent = rms_norm(down[:, :rank], block["attn_kv_a_norm"], eps)
        key = torch.cat([rotate(down[:, None, rank:], theta)[:, 0], latent], -1)
        absorbed = torch.einsum("thn,hrn->thr", q[..., : width - rope], block["attn_k_b"])
        query = torch.cat([rotate(q[..., width - rope :], theta), absorbed], -1)
        scores = torch.einsum("thk,sk->hts", query, key) / math.sqrt(width)
        attended = scores.masked_fill(future, -math.inf).softmax(-1) @ latent
        x = x + torch.einsum("htr,hvr->thv", attended, block["attn_v_b"]).flatten(1) @ block["attn_output"].T
        normed = rms_norm(x, block["ffn_norm"], eps)
        gated = torch.nn.functional.silu(normed @ block["ffn_gate"].T) * (normed @ block["ffn_up"].T)
        x = x + gated @ block["ffn_down"].T
    assert get["leading_dense_block_count"] == get["block_count"] and get["attention.head_count_kv"] == 1
    return rms_norm(x, w["output_norm"], eps) @ w["output"].T


IDS = torch.arange(3, 43) * 11 % 509


def stock_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(IDS[None]).logits[0]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("type", "tolerance", "bits"), [("f32", 1e-5, 32), ("bf16", 2e-2, 16), ("f16", 2e-3, 16), ("q8_0", 3e-2, 8.5)]
)
def test_deepseek2_computes_what_the_folder_computes(
    converted: Path, tmp_path: Path, type: str, tolerance: float, bits: float
) -> None:
    out = tmp_path / "model.gguf"
    report = transmla.export(converted, out, type=type)
    assert relative(deepseek2_logits(out, IDS), stock_logits(converted)) < tolerance
    assert report.num_bytes == out.stat().st_size and report.values_per_token == (32, 32)
    matrices = sum(tensor.n_elements for tensor in GGUFReader(out).tensors if len(tensor.shape) > 1)
    assert matrices * bits / 8 < report.num_bytes < matrices * bits / 8 + 90_000
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_comparison_can_fail(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of kv_b exchanged, which no shape shows."""
    import transmla.targets.export as exporting

    def swapped(config: Any) -> Any:
        for entry in exporting_tensors(config):
            yield (
                entry if "attn_v_b" not in entry.name else type(entry)(entry.name, entry.source, entry.shape, key_half)
            )

    def key_half(kv_b: Tensor) -> Tensor:
        return kv_b.view(8, 16, 24)[:, :8]

    exporting_tensors = exporting.gguf_tensors
    monkeypatch.setattr(exporting, "gguf_tensors", swapped)
    transmla.export(converted, tmp_path / "model.gguf", type="f32")
    assert relative(deepseek2_logits(tmp_path / "model.gguf", IDS), stock_logits(converted)) > 0.1


def sentencepiece(text: str, reader: GGUFReader) -> list[int]:
    """Merge the pair of neighbours whose joined token scores highest, until none is left; then bytes."""
    tokens = {token: place for place, token in enumerate(value(reader, "tokenizer.ggml.tokens"))}
    scores = value(reader, "tokenizer.ggml.scores")
    if value(reader, "tokenizer.ggml.add_space_prefix"):
        text = " " + text
    pieces = list(text.replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in itertools.pairwise(pieces)]
        known = [place for place, pair in enumerate(pairs) if pair in tokens]
        if not known:
            break
        place = max(known, key=lambda place: (scores[tokens[pairs[place]]], -place))
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    ids = [value(reader, "tokenizer.ggml.bos_token_id")] if value(reader, "tokenizer.ggml.add_bos_token") else []
    for piece in pieces:
        ids += [tokens[piece]] if piece in tokens else [tokens[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return ids


@pytest.mark.parametrize(
    "text", ["Once upon a time, there was a little girl named Lily.", "  two spaces\nand a line", "Ünïcode 🚀 4711", ""]
)
def test_text_is_cut_as_the_folder_cuts_it(
    converted: Path, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    transmla.export(converted, tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    if text:  # of nothing, SentencePiece makes nothing, not even the leading space
        assert sentencepiece(text, reader) == AutoTokenizer.from_pretrained(converted)(text).input_ids
    kinds = value(reader, "tokenizer.ggml.token_type")
    assert [kinds[place] for place in (0, 1, 3)] == [
        gguf.TokenType.UNKNOWN,
        gguf.TokenType.CONTROL,
        gguf.TokenType.BYTE,
    ]
    assert value(reader, "tokenizer.ggml.eos_token_id") == 2
    assert not caplog.records


def byte_level(*steps: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "added_tokens": [
            {"id": 3, "content": "<|end|>", "special": True},
            {"id": 4, "content": "<tool>", "special": False},
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)},
        "decoder": {"type": "ByteLevel"},
    }  # fmt: skip


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
NO_CUT = BYTES | {"use_regex": False}
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA_3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class NoBegin:
    """A tokenizer without special tokens."""

    bos_token_id = eos_token_id = unk_token_id = sep_token_id = pad_token_id = cls_token_id = mask_token_id = None
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
    chat_template = None


@pytest.mark.parametrize(
    ("steps", "pre"),
    [
        ([BYTES], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, BYTES], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated"}, NO_CUT], "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA_3.replace("{1,3}", "")}}, NO_CUT], "qwen2"),
        ([{"type": "Split", "pattern": {"Regex": "[a-z]"}}, NO_CUT], None),
        # llama.cpp would cut once more or once less
        ([{"type": "Split", "pattern": {"Regex": LLAMA_3}}, BYTES], None),
        ([{"type": "Split", "pattern": {"Regex": LLAMA_3}}, {"type": "Digits", "individual_digits": True}], None),
        ([NO_CUT], None),
        ([{"type": "Digits", "individual_digits": True}, NO_CUT], None),
        ([{"type": "ByteLevel", "add_prefix_space": True}], None),
        ([{"type": "Whitespace"}], None),
        ([], None),
    ],
)
def test_pre_tokenizer_is_read_off(tmp_path: Path, steps: list[dict[str, Any]], pre: str | None) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level(*steps)))
    if pre is None:
        with pytest.raises(UnsupportedError, match="tokenizer cannot be written"):
            read_vocab(tmp_path, 6, NoBegin())
        return
    vocab = read_vocab(tmp_path, 6, NoBegin())
    assert (vocab.kind, vocab.pre, vocab.add_begin) == ("gpt2", pre, False)
    assert vocab.tokens == ["a", "b", "ab", "<|end|>", "<tool>", "[PAD5]"]
    kind = gguf.TokenType
    assert vocab.types == [kind.NORMAL] * 3 + [kind.CONTROL, kind.USER_DEFINED, kind.UNUSED]


def test_the_file_has_what_transformers_reads_from_the_folder(converted: Path, tmp_path: Path) -> None:
    """Of templates, special and added tokens in several files, some of which the gguf package reads before others."""
    folder = tmp_path / "mla"
    shutil.copytree(converted, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    settings |= {"chat_template": "old", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 512}))
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 5]}))
    (folder / "chat_template.jinja").write_text("new")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UnsupportedError, match="has no row among the 512 embeddings"):
        read_vocab(folder, 512, tokenizer)
    vocab = read_vocab(folder, 520, tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert {start, end} == {512, 513} and tokenizer.eos_token_id == end
    assert (vocab.tokens[start], vocab.tokens[end]) == ("<|im_start|>", "<|im_end|>")
    assert vocab.types[end] == gguf.TokenType.CONTROL and vocab.types[514] == gguf.TokenType.UNUSED
    for template in ("new", {"default": "new", "tool_use": "tools"}):
        tokenizer.chat_template = template
        writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "deepseek2")
        add_vocab(writer, folder, read_vocab(folder, 520, tokenizer))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        reader = GGUFReader(tmp_path / "vocab.gguf")
        assert value(reader, "tokenizer.ggml.eos_token_id") == end
        assert value(reader, "tokenizer.ggml.bos_token_id") == tokenizer.bos_token_id == 1
        assert value(reader, "tokenizer.chat_template") == "new"
    assert value(reader, "tokenizer.chat_template.tool_use") == "tools"


def test_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    """As a [PAD] that was added and never given an embedding."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level(BYTES)))
    with pytest.raises(UnsupportedError, match=r"'<tool>' has no row among the 4 embeddings"):
        read_vocab(tmp_path, 4, NoBegin())


def test_refusals(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken.gguf"
    taken.write_text("mine")
    for out in (taken, tmp_path, tmp_path / "missing" / "model.gguf"):
        with pytest.raises(DestinationError):
            transmla.export(converted, out)
    assert taken.read_text() == "mine"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UnsupportedError, match="needs llama"):
        transmla.export(converted, tmp_path / "model.gguf", type="q4_k_m")
    for wrong in ({"type": "q5"}, {"to": "ollama"}):
        with pytest.raises(UnsupportedError, match="cannot export"):
            transmla.export(converted, tmp_path / "model.gguf", **wrong)
    for unfit in ({"size": "512+64"}, {"to": "vllm", "type": "f16"}):
        with pytest.raises(UnsupportedError, match="cannot be combined with"):
            transmla.export(converted, tmp_path / "model.gguf", **unfit)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]


def test_nothing_is_left_half_written(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(TransmlaError, match="disk is full"):
        transmla.export(converted, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_f16_cannot_hold() -> None:
    with pytest.raises(VerificationError, match="f16"):
        write_gguf._encode(torch.tensor([[7e4] * 32]), gguf.GGMLQuantizationType.F16, "blk.0.attn_q.weight")


def test_the_quantiser_program_is_used(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that copies: what it is given is a whole float32 file, what it writes becomes the result."""
    program = tmp_path / "bin" / write_gguf.QUANTISER
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$3" = q4_k_m ] && cp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    report = transmla.export(converted, tmp_path / "model.gguf", type="q4_k_m")
    assert report.quantiser == write_gguf.QUANTISER
    # latent rows stand in the file as float16
    assert relative(deepseek2_logits(tmp_path / "model.gguf", IDS), stock_logits(converted)) < 1e-3
    program.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    with pytest.raises(DestinationError, match="broken"):
        transmla.export(converted, tmp_path / "other.gguf", type="q4_k_m")
    assert not (tmp_path / "other.gguf").exists()


def test_ids_of_no_token_are_left_out(converted: Path, tmp_path: Path) -> None:
    """As -1, by which the first LLaMA models mean that there is no padding."""
    shutil.copytree(converted, tmp_path / "mla")
    path = tmp_path / "mla" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": -1, "eos_token_id": 10**6}))
    transmla.export(tmp_path / "mla", tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    ids = {key: value(reader, key) for key in reader.fields if key.endswith("_token_id")}
    assert ids["tokenizer.ggml.bos_token_id"] == 1 and all(0 <= place < 512 for place in ids.values())
