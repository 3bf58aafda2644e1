"""Latent rows of the folded form at a hidden size of blocks of 256: too small for the scales of quantised blocks.

llama.cpp keeps the scale of a block of q8_0, and that of a super-block of the K-quants, as float16, which ends at 6e-8.
"""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFReader

import transmla
from tests.checkpoint.test_gguf_write import stock_logits, weights
from tests.families import MakeSource
from transmla.checkpoint.gguf.write import Quantiser
from transmla.errors import UnsupportedError
from transmla.targets import export as exporting
from transmla.targets.engines import LLAMA_CPP

HIDDEN, NAME = 2048, "blk.0.attn_kv_a_mqa"


@pytest.fixture(scope="module")
def converted(lively: MakeSource, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "mla"
    source = lively(hidden=HIDDEN, layers=2, heads=4, kv_heads=2, head_dim=16)
    transmla.convert(
        str(source), folder, latent=32, rope=8, refine="off", theta=100.0, calibration=str(text_file), tokens=512,
        window=64,
    )  # fmt: skip
    return folder


def six_bits(rows: np.ndarray) -> np.ndarray:
    """Rows through q6_k: 16 values share a scale of 8 bits, 256 of them a float16 that these are multiples of."""
    blocks = rows.reshape(-1, 16, 16)
    scales = np.abs(blocks).max(-1, keepdims=True) / 31
    shared = (scales.max(1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    steps = shared * np.round(np.divide(scales, shared, out=np.zeros_like(scales), where=shared > 0))
    levels = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
    return (steps * np.clip(np.round(levels), -32, 31)).reshape(rows.shape)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def latent_rows(folder: Path, tmp_path: Path) -> np.ndarray:
    """Of the first layer, whose rows are the smallest."""
    transmla.export(folder, tmp_path / "exact.gguf", type="f32")
    return rows_of(tmp_path / "exact.gguf")


def rows_of(path: Path) -> np.ndarray:
    rows: np.ndarray = weights(GGUFReader(path))[NAME].float().numpy()[:32]
    return rows


def eight_bits(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = gguf.quants.dequantize(gguf.quants.quantize(rows, GgmlType.Q8_0), GgmlType.Q8_0)
    return found


def test_blocks_would_destroy_them(converted: Path, tmp_path: Path) -> None:
    rows = latent_rows(converted, tmp_path)
    assert error(eight_bits(rows), rows) > 4 * error(eight_bits(rows * 1024) / 1024, rows)
    assert error(six_bits(rows), rows) > 0.8 and error(six_bits(rows * 1024) / 1024, rows) < 0.03


def test_eight_bits_keep_them(converted: Path, tmp_path: Path) -> None:
    exact = latent_rows(converted, tmp_path)
    report = transmla.export(converted, tmp_path / "eight.gguf", type="q8_0")
    assert report.kept[f"{NAME}.weight"] in ("f16", "f32")
    types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(tmp_path / "eight.gguf").tensors}
    assert types[f"{NAME}.weight"].name.lower() == report.kept[f"{NAME}.weight"]
    assert types["blk.0.attn_q.weight"] == GgmlType.Q8_0
    assert error(rows_of(tmp_path / "eight.gguf"), exact) < 2e-3


@pytest.mark.parametrize("keeps", [True, False])
def test_what_a_quantiser_made_of_them_is_replaced(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    """A stand-in that rounds like q6_k and writes float32."""

    def run(given: Path, out: Path) -> None:
        reader, writer = GGUFReader(given), gguf.GGUFWriter(out, "deepseek2")
        for tensor in reader.tensors:
            data = np.array(tensor.data)
            matrix = data.ndim > 1 and data.shape[-1] % 256 == 0
            writer.add_tensor(tensor.name, six_bits(data) if matrix else data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    exact = latent_rows(converted, tmp_path)
    monkeypatch.setattr(exporting, "find_quantiser", lambda _: Quantiser("rounding", run))
    if not keeps:
        monkeypatch.setattr("transmla.checkpoint.gguf.write._too_small", lambda *_: {})
    report = transmla.export(converted, tmp_path / "six.gguf", type="q6_k")
    reader = GGUFReader(tmp_path / "six.gguf")
    assert report.quantiser == "rounding" and not (tmp_path / "six.gguf.partial").exists()
    assert bool(report.kept) == keeps == (error(rows_of(tmp_path / "six.gguf"), exact) < 2e-3)
    # the others are what the quantiser made of them
    gate = weights(GGUFReader(tmp_path / "exact.gguf"))["blk.1.ffn_gate"].float().numpy()
    assert np.array_equal(weights(reader)["blk.1.ffn_gate"].float().numpy(), six_bits(gate))
    if keeps:
        assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q6_K
        assert reader.fields["tokenizer.ggml.tokens"].contents()[:2] == ["<unk>", "<s>"]


def test_doctor_says_so(converted: Path) -> None:
    (verdict,) = (one for one in transmla.doctor(converted).engines if one.engine == LLAMA_CPP)
    assert verdict.accepts and "attn_kv_a_mqa at f16" in verdict.note


def test_a_depth_that_llama_cpp_mistakes_is_refused(lively: MakeSource, text_file: Path, tmp_path: Path) -> None:
    """26 layers with a latent of the queries."""
    source = lively(layers=26, heads=2, kv_heads=1, head_dim=8, hidden=16)
    transmla.convert(
        str(source), tmp_path / "out", latent=8, rope=4, q_latent=8, refine="off", theta=100.0,
        calibration=str(text_file), tokens=64, window=16,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="convert without --q-latent"):
        transmla.export(tmp_path / "out", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    assert torch.isfinite(stock_logits(tmp_path / "out")).all()
