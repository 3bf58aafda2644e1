"""Verification sees what is wrong in the written folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.made import Convert
from tests.families import MakeSource
from transmla.conversion import flow as conversion
from transmla.errors import VerificationError


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", lambda weight: weight.flip(0)),
        ("model.layers.2.self_attn.q_proj.weight", lambda weight: weight * 2),
        ("model.layers.0.self_attn.kv_a_layernorm.weight", lambda weight: weight * 0.9),
        ("model.layers.0.input_layernorm.weight", lambda weight: weight * 128),
        ("model.layers.2.mlp.down_proj.weight", torch.zeros_like),
        ("model.embed_tokens.weight", lambda weight: weight * 3),
        ("model.norm.weight", lambda weight: weight.flip(0)),
        ("lm_head.weight", lambda weight: weight.roll(1, 0)),
    ],
)
def test_verification_sees_a_wrong_tensor(
    lively: MakeSource, run: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Any
) -> None:
    verify = conversion.verify

    def damaged(folder: Path, *args: Any) -> Any:
        stored = load_file(folder / "model.safetensors")
        stored[name] = damage(stored[name]).contiguous()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return verify(folder, *args)

    monkeypatch.setattr(conversion, "verify", damaged)
    with pytest.raises(VerificationError, match="does not compute") as caught:
        run(lively())
    assert caught.value.exit_code == 9 and "relative error" in caught.value.why
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["rope_interleave", "rope_theta", "rms_norm_eps"])
def test_verification_sees_a_wrong_config(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    make = conversion.target_config
    wrong = {"rope_interleave": False, "rope_theta": 50.0, "rms_norm_eps": 10.0}[setting]
    monkeypatch.setattr(conversion, "target_config", lambda *args, **kept: make(*args, **kept) | {setting: wrong})
    with pytest.raises(VerificationError):
        run(lively())


def test_verification_sees_what_the_class_adds_to_the_config(
    lively: MakeSource, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source without a cap of its logits, and a config from which that cannot be seen."""
    make = conversion.target_config

    def silent(*args: Any, **kept: Any) -> dict[str, Any]:
        config = make(*args, **kept)
        config["text_config"].pop("final_logit_softcapping", None)
        return config

    monkeypatch.setattr(conversion, "target_config", silent)
    with pytest.raises(VerificationError):
        run(lively(model_type="gemma2", layers=2, final_logit_softcapping=None))
