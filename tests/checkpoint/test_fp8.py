"""Checkpoints in 8-bit floats with scales are read as the products that they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import transmla
from tests.families import MakeSource
from transmla.checkpoint.read import open_source
from transmla.errors import SourceError, UnsupportedError
from transmla.model.loading import load_source

BLOCK = [16, 10]


def quantised(source: Path, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A copy of a source with its projections in float8; returns what its tensors stand for."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    stored, meant = {}, {}
    for name, value in load_file(source / "model.safetensors").items():
        stored[name] = meant[name] = value.to(torch.bfloat16)
        if not name.endswith("proj.weight"):
            continue
        rows, columns = value.shape
        blocks = (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
        scales = torch.rand(blocks, generator=torch.Generator().manual_seed(1)) + 0.5
        stored[name], stored[name + "_scale_inv"] = (value / 0.01).to(torch.float8_e4m3fn), scales * 0.01
        meant[name] = torch.empty_like(value)
        for row in range(rows):
            for column in range(columns):
                scale = stored[name + "_scale_inv"][row // BLOCK[0], column // BLOCK[1]]
                meant[name][row, column] = stored[name][row, column].float() * scale
    settings = {"quant_method": "fp8", "weight_block_size": BLOCK} | changes
    config = json.loads((source / "config.json").read_text("utf-8")) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


def test_weights_are_products(lively: MakeSource, tmp_path: Path) -> None:
    meant = quantised(lively(model_type="qwen3", layers=1), tmp_path / "fp8")
    source = open_source(tmp_path / "fp8")
    assert set(source.tensors) == set(meant)
    for name, value in meant.items():
        assert torch.equal(source.read(name, dtype=torch.float32), value.float()), name
    name = "model.layers.0.mlp.up_proj.weight"
    index = torch.tensor([3, 40])
    assert torch.equal(source.rows(name, index), meant[name][index])


def test_it_converts_to_what_its_products_convert_to(lively: MakeSource, text_file: Path, tmp_path: Path) -> None:
    meant = quantised(lively(model_type="qwen3", layers=1), tmp_path / "fp8")
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in (tmp_path / "fp8").glob("*.json"):
        (plain / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    found = []
    for name in ("fp8", "plain"):
        settings: dict[str, Any] = {"calibration": str(text_file), "tokens": 512, "window": 64, "refine": "off"}
        transmla.convert(str(tmp_path / name), tmp_path / f"{name}-mla", latent=12, rope=8, **settings)
        found.append(load_file(tmp_path / f"{name}-mla" / "model.safetensors"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    written = json.loads((tmp_path / "fp8-mla" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in json.dumps(written)


@pytest.mark.parametrize("on_hopper", [False, True])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": -1}, {"logit_scale": 0.5}], ids=str)
def test_the_source_is_dequantised_on_every_machine(
    lively: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_hopper: bool, changes: dict[str, Any]
) -> None:
    """Where a GPU has such floats, transformers would keep them and ask for kernels."""
    monkeypatch.setitem(globals(), "BLOCK", [8, 8])  # transformers wants blocks that divide the sizes
    meant = quantised(lively(model_type="qwen3", layers=1), tmp_path / "fp8", modules_to_not_convert=["lm_head"])
    config = tmp_path / "fp8" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | changes), "utf-8")
    if on_hopper:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    model = load_source(open_source(tmp_path / "fp8"), dtype=torch.float32)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) > 7 and all(type(module) is torch.nn.Linear for module in linear)
    found = model.state_dict()
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        assert torch.allclose(found[name].float(), meant[name].float(), rtol=1e-2)
    if not on_hopper:
        for dtype in (torch.float32, "bfloat16", "auto"):
            one = load_source(open_source(tmp_path / "fp8"), dtype=dtype)
            assert len({weight.dtype for weight in one.parameters()}) == 1
            with torch.no_grad():
                assert one(torch.arange(3, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("damage", ["missing", "wrong shape"])
def test_scales_that_do_not_fit(lively: MakeSource, tmp_path: Path, damage: str) -> None:
    quantised(lively(model_type="qwen3", layers=1), tmp_path / "fp8")
    file, name = tmp_path / "fp8" / "model.safetensors", "model.layers.0.self_attn.q_proj.weight_scale_inv"
    tensors = load_file(file)
    tensors = {key: value for key, value in tensors.items() if key != name} | (
        {} if damage == "missing" else {name: tensors[name][:1]}
    )
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SourceError, match="q_proj"):
        open_source(tmp_path / "fp8")


@pytest.mark.parametrize("changes", [{"weight_block_size": None}, {"quant_method": "modelopt"}], ids=str)
def test_other_packings_are_refused(lively: MakeSource, tmp_path: Path, changes: dict[str, Any]) -> None:
    quantised(lively(model_type="qwen3", layers=1), tmp_path / "fp8", **changes)
    with pytest.raises(UnsupportedError, match="quantised"):
        transmla.plan(str(tmp_path / "fp8"))
