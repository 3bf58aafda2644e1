"""`transmla unfold` and `transmla fold`: from the stock form to the one for training, and back.

The stock form hides the absence of a latent norm in scales (maths/fold.py) that no optimizer survives. The unfolded
form has ordinary scales and a model_type of its own, so that stock classes refuse it instead of computing something
else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.companions import copy_companions, tokenizer
from transmla.checkpoint.provenance import FILE_NAME, read_provenance, write_provenance
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.write import CheckpointWriter, check_destination
from transmla.errors import UnsupportedError
from transmla.maths.fold import EPS, fold_layer, latent_scale, residual_scale, unfold_layer
from transmla.model.loading import load
from transmla.model.modeling_transmla import UnfoldedConfig, UnfoldedForCausalLM
from transmla.progress import Progress, silent
from transmla.targets.comparison import WITNESS_TOKENS, compare_logits
from transmla.targets.export import open_converted
from transmla.targets.stock import ARCHITECTURE, MODELING_FILE, expected_tensors, modeling_source
from transmla.text.sources import CHARACTERS_PER_TOKEN, read_text
from transmla.text.windows import windows

NUM_WINDOWS, WINDOW = 4, 512
# config keys that differ between the two forms, in the folded one
_FOLDED = {
    "model_type": "deepseek_v3",
    "architectures": [ARCHITECTURE],
    "latent_norm_folded": True,
    "rms_norm_eps": EPS,
}
_AUTO_MAP = {"AutoModelForCausalLM": f"modeling_transmla.{ARCHITECTURE}"}
_UNFOLDED_AUTO_MAP = {
    "AutoConfig": f"modeling_transmla.{UnfoldedConfig.__name__}",
    "AutoModelForCausalLM": f"modeling_transmla.{UnfoldedForCausalLM.__name__}",
}


def unfold(model: str | Path, out: str | Path, *, dtype: str = "auto", progress: Progress | None = None) -> Path:
    """Write the converted folder `model` in the form for training to the new folder `out`.

    dtype: of the written weights, "auto" as in `model`. Raises `UnsupportedError` (other folders), `DestinationError`.
    """
    source = open_converted(Path(model))
    config = source.config
    residual = residual_scale(float(config.get("unfolded_rms_norm_eps", EPS)))
    made = dict(config) | {
        "model_type": UnfoldedConfig.model_type,
        "architectures": [UnfoldedForCausalLM.__name__],
        "auto_map": _UNFOLDED_AUTO_MAP,
        "latent_norm_folded": False,
        "rms_norm_eps": config.get("unfolded_rms_norm_eps", EPS),
    }

    def layer(_: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return unfold_layer(tensors, config["kv_lora_rank"], residual)

    with _writer(source, Path(out)) as writer:
        _write(source, writer, made, dtype, layer, 1 / residual, progress or silent)
        writer.commit()
    return Path(out)


def fold(
    model: str | Path,
    out: str | Path,
    *,
    text: str = "wikitext",
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Write the unfolded folder `model`, trained or not, in the stock form to the new folder `out`.

    text: on which the largest latent is measured, which bounds the scale of each layer;  device: where that runs
    The result is compared with `model` through the stock class before it gets its name (`VerificationError`).
    """
    source = open_unfolded(Path(model))
    with _writer(source, Path(out)) as writer:
        fold_into(writer, source, text=text, dtype=dtype, device=device, progress=progress or silent)
        writer.commit()
    return Path(out)


def fold_into(
    writer: CheckpointWriter, source: Source, *, text: str, dtype: str, device: str, progress: Progress
) -> None:
    """`fold` of what `open_unfolded` has opened, verified, without giving it its name."""
    made_tokenizer = tokenizer(source)
    ids = made_tokenizer(
        read_text(text, NUM_WINDOWS * WINDOW * CHARACTERS_PER_TOKEN, evaluation=True),
        add_special_tokens=False,
        verbose=False,
    ).input_ids
    window = min(WINDOW, source.config["max_position_embeddings"], len(ids) // 2)
    ids_NT = windows(ids, NUM_WINDOWS * window, window, name=text).ids_NT
    witness_ids = ids_NT[-1:, :WITNESS_TOKENS]
    peaks, wanted = _observe(source.path, ids_NT, witness_ids, device, progress)
    config = source.config
    residual = residual_scale(float(config["rms_norm_eps"]))

    def layer(index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scale, query_scale = (latent_scale(peak) for peak in peaks[index])
        return fold_layer(tensors, config["kv_lora_rank"], residual, scale, query_scale)

    made = _flat_rotary(config) | _FOLDED
    made |= {"auto_map": _AUTO_MAP, "unfolded_rms_norm_eps": float(config["rms_norm_eps"])}
    _write(source, writer, made, dtype, layer, residual, progress)
    _verify(writer.partial, witness_ids, wanted, device)


def _flat_rotary(config: dict[str, Any]) -> dict[str, Any]:
    """The config with `rope_theta` and `rope_scaling`, which engines read; save_pretrained merges them into one."""
    if "rope_parameters" not in config:
        return dict(config)
    rotary = dict(config["rope_parameters"])
    # head_dim is added, too, as the rotary size, which an engine could take for that of the heads
    flat = {key: value for key, value in config.items() if key not in ("rope_parameters", "head_dim")}
    return flat | {"rope_theta": rotary.pop("rope_theta"), "rope_scaling": {"type": rotary["rope_type"]} | rotary}


def open_unfolded(folder: Path) -> Source:
    """A folder of the form that `unfold` writes; `UnsupportedError` for others."""
    source = open_source(folder)
    if source.config.get("model_type") != UnfoldedConfig.model_type:
        raise UnsupportedError(
            "this is not an unfolded model",
            where=source.config_where,
            why=f"model_type is {source.config.get('model_type')!r}",
            remedy="unfold a converted folder first: transmla unfold OUT TRAIN",
        )
    source.require(expected_tensors(source.config))
    return source


def _writer(source: Source, out: Path) -> CheckpointWriter:
    check_destination(out, sum(info.num_bytes for info in source.tensors.values()))
    return CheckpointWriter(out)


def _write(
    source: Source,
    writer: CheckpointWriter,
    config: dict[str, Any],
    dtype: str,
    layer: Callable[[int, dict[str, Tensor]], dict[str, Tensor]],
    embedding: float,
    progress: Progress,
) -> None:
    """All files of the other form; embedding: factor of the embeddings."""
    stored = source.tensors["model.embed_tokens.weight"].dtype if dtype == "auto" else dtype
    number_format = getattr(torch, stored)
    names = expected_tensors(source.config)
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        tensors = {
            name.removeprefix(prefix): source.read(name, dtype=torch.float32)
            for name in names
            if name.startswith(prefix)
        }
        for name, tensor in layer(index, tensors).items():
            writer.add_as(prefix + name, tensor, number_format)
        progress("write", index + 1, config["num_hidden_layers"], "")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        factor = embedding if name == "model.embed_tokens.weight" else 1.0
        writer.add_as(name, source.read(name).float() * factor, number_format)
    writer.close_shards()
    writer.write_json("config.json", config | {"dtype": stored, "torch_dtype": stored})
    writer.write_text(MODELING_FILE, modeling_source())
    if (source.path / "README.md").is_file():
        writer.copy_file(source.path / "README.md")
    copy_companions(source, writer.partial)
    if (source.path / FILE_NAME).is_file():
        sections = read_provenance(source.path)
        sections.pop("format")
        write_provenance(writer, **sections)


@torch.no_grad()
def _observe(
    folder: Path, ids_NT: Tensor, witness_1T: Tensor, device: str, progress: Progress
) -> tuple[list[tuple[float, float]], Tensor]:
    """Largest mean square of one token's latent, and of its queries' latent, by layer; and logits of the witness."""
    model = load(folder, dtype=torch.float32, device=device)
    peaks = [[0.0, 1e-30] for _ in model.model.layers]

    def watch(index: int, which: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor], output: Tensor) -> None:
            peaks[index][which] = max(peaks[index][which], float(args[0].square().mean(-1).max()))

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.kv_a_layernorm.register_forward_hook(watch(index, 0))
        if model.config.q_lora_rank is not None:
            layer.self_attn.q_a_layernorm.register_forward_hook(watch(index, 1))
    for number, ids_T in enumerate(ids_NT):
        model(ids_T[None].to(device), logits_to_keep=1, use_cache=False)
        progress("measure latents", number + 1, len(ids_NT), "")
    logits = model(witness_1T.to(device), use_cache=False).logits[0].double().cpu()
    return [(latent, query) for latent, query in peaks], logits


@torch.no_grad()
def _verify(folder: Path, witness_1T: Tensor, wanted_TV: Tensor, device: str) -> None:
    """The written folder through the stock class, against the unfolded model."""
    from transformers import DeepseekV3ForCausalLM

    loaded: Any = DeepseekV3ForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    found_TV = loaded.to(device).eval()(witness_1T.to(device), use_cache=False).logits[0].double().cpu()
    stored = json.loads((folder / "config.json").read_text("utf-8"))["dtype"]
    compare_logits(folder, found_TV, wanted_TV, stored)
