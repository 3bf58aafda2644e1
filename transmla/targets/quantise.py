"""`transmla quantise`: a converted folder whose latents are easy to round, and what a coded cache has to know of them.

The function of the model stays: per layer, the rows of kv_a_proj_with_mqa are multiplied by an invertible map, and
kv_b_proj by its inverse. So the folder has the form that it had, and runs wherever it ran.

Shape legend: r kv_lora_rank, e qk_rope_head_dim, k = r + e, T tokens, S samples, B batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from transmla.checkpoint.companions import copy_companions, tokenizer
from transmla.checkpoint.destination import named_path
from transmla.checkpoint.provenance import read_provenance, write_provenance
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.write import CheckpointWriter, check_destination
from transmla.devices import named, narrow_dtype
from transmla.errors import UnsupportedError
from transmla.maths import EPS
from transmla.maths.coding import Seen, code_bases, code_levels
from transmla.maths.fold import largest_mean_square, latent_scale
from transmla.model.loading import converted_type, load
from transmla.model.modeling_transmla import UnfoldedConfig
from transmla.progress import Progress, silent
from transmla.tables import Shown
from transmla.targets.comparison import WITNESS_TOKENS, compare_logits, load_stock
from transmla.targets.stock import MODELING_FILE, modeling_source
from transmla.text.sampling import sample_from
from transmla.text.windows import calibration_tokens

BASES = ("coded", "spread")
MIX = "wikitext:2+synthetic+code"
TOKENS, WINDOW = 16384, 512


@dataclass(frozen=True)
class QuantiseReport(Shown):
    """What `quantise` has written.

    spread:     by layer, the arithmetic over the geometric mean of what the coordinates are worth, without those that
                are constant: the factor by which dealt bits lower the error
    distortion: share of the variance that is left with 0 .. 8 bits
    relative_error: of the logits of the written folder
    """

    path: Path
    tokens: int
    spread: tuple[float, ...]
    distortion: tuple[float, ...]
    relative_error: float

    def show(self, console: Console) -> None:
        from transmla.targets.show_quantise import show_quantised

        show_quantised(self, console)


def quantise(
    model: str | Path,
    out: str | Path,
    *,
    text: str = MIX,
    tokens: int = TOKENS,
    basis: str = "coded",
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> QuantiseReport:
    """Write the converted folder `model` to the new folder `out` with latents in a basis for rounding.

    text:   whose statistics are taken, a mix of texts, of which "self" is what the folder writes;  tokens: how many
    basis:  "coded" for caches with dealt bits (latent-coded3), "spread" for those with the same number for every value,
            as engines have
    device: where the model runs, forward and backward, in bfloat16 if that is fast there
    seed:   of the predictions whose gradients say what an error costs, and of the rotation of "spread"
    progress: called as progress(stage, done, total, remark)

    Raises `UnsupportedError` for a folder that is no converted one or in the form for training, `SourceError` if it
    cannot be read, `DataError` for text that is missing or too short, `DestinationError` if `out` exists or cannot be
    written, and `VerificationError` if the result computes something else; then nothing is written.
    """
    tell = progress or silent
    source = open_source(Path(model))
    config = dict(source.config)
    if config.get("model_type") == UnfoldedConfig.model_type:
        raise UnsupportedError(
            "the form for training has no cache to prepare",
            where=str(model),
            why="its next training step would change what was measured",
            remedy="fold it first: transmla fold TRAINED OUT",
        )
    device = named(device)
    converted_type(source.path)
    sections = read_provenance(source.path)
    sections.pop("format")
    check_destination(named_path(out), sum(info.num_bytes for info in source.tensors.values()))
    loaded = load(source.path, dtype=torch.float32, device=device)
    cutter = tokenizer(source)
    window = min(WINDOW, int(loaded.config.max_position_embeddings))
    sampler = partial(
        sample_from, loaded, seed=seed, progress=lambda done, total: tell("sample", done, total, "tokens")
    )
    ids_NT = calibration_tokens(text, cutter, tokens, window, sampler=sampler).ids_NT
    with CheckpointWriter(named_path(out)) as writer:
        witness_1T = ids_NT[-1:, :WITNESS_TOKENS].to(device)
        with torch.no_grad():
            wanted_TV = loaded(witness_1T, use_cache=False).logits[0].double().cpu()
        seen = _observe(loaded.to(narrow_dtype(loaded.device) or torch.float32), ids_NT, seed, tell)
        attention = _attention_prefix(config)
        del loaded, sampler
        maps, codes, spread = code_bases(seen, int(config["kv_lora_rank"]), basis, seed)
        levels, distortion = code_levels(seen, maps, codes)
        _write(source, writer, attention, maps)
        code = {
            "basis": basis,
            "layers": [{name: _short(values) for name, values in layer.items()} for layer in codes],
            "levels": [_short(values) for values in levels],
            "distortion": _short(torch.tensor(distortion)),
        }
        writer.write_json("config.json", config | {"latent_code": code})
        writer.write_text(MODELING_FILE, modeling_source())
        copy_companions(source, writer.partial)
        if (source.path / "README.md").is_file():
            writer.copy_file(source.path / "README.md")
        made = {"text": text, "tokens": ids_NT.numel(), "window": window, "basis": basis, "seed": seed}
        write_provenance(writer, **sections | {"quantised_for": made})
        error = _verify(writer.partial, witness_1T, wanted_TV, device)
        writer.commit()
    return QuantiseReport(named_path(out), ids_NT.numel(), spread, tuple(distortion), error)


def _observe(model: Any, ids_NT: Tensor, seed: int, progress: Progress) -> list[Seen]:
    """Moments of what each layer caches, and of the gradients of the model's own predictions with respect to it.

    The gradients' second moment is the Fisher information: half of it is what a small error costs in divergence.
    """
    width = int(model.config.kv_lora_rank) + int(model.config.qk_rope_head_dim)
    attentions = [module for module in model.modules() if hasattr(module, "kv_a_proj_with_mqa")]
    seen = [Seen.of(width, model.device) for _ in attentions]
    keys: dict[int, Tensor] = {}

    def watch(index: int, attention: Any) -> None:
        project = attention.project

        def watched(*args: Any, **kwargs: Any) -> Any:
            q_nope, q_rot, key_B1Tk = project(*args, **kwargs)
            keys[index] = key_B1Tk
            key_B1Tk.retain_grad()
            return q_nope, q_rot, key_B1Tk

        attention.project = watched

    for index, attention in enumerate(attentions):
        watch(index, attention)
    for weight in model.parameters():
        weight.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    for number, ids_T in enumerate(ids_NT):
        logits_TV = model(ids_T[None].to(model.device), use_cache=False).logits[0].float()
        drawn_T1 = torch.multinomial(logits_TV.detach().softmax(-1).cpu(), 1, generator=generator)
        torch.nn.functional.cross_entropy(logits_TV, drawn_T1[:, 0].to(model.device), reduction="sum").backward()
        model.get_input_embeddings().weight.grad = None
        for index, layer in enumerate(seen):
            gradient = keys[index].grad
            assert gradient is not None
            layer.add(keys[index].detach()[0, 0], gradient[0, 0])
        progress("measure latents", number + 1, len(ids_NT), "")
    for layer in seen:
        layer.finish()
    return seen


def _short(values: Tensor) -> list[float]:
    """Six digits, which is more than they are known to."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _attention_prefix(config: dict[str, Any]) -> str:
    """What the names of attention tensors begin with, with a place for the number of the layer."""
    base, module = config.get("base_module", "model"), config.get("attention_module", "self_attn")
    return f"{base}.layers.{{}}.{module}."


def _write(source: Source, writer: CheckpointWriter, attention: str, maps: list[tuple[Tensor, Tensor]]) -> None:
    """All tensors, with the map in those that write and read the latent."""
    changed: dict[str, Tensor] = {}
    names = set(source.tensors)
    for index, (map_rr, inverse_rr) in enumerate(maps):
        prefix, rank = attention.format(index), len(map_rr)

        def read(name: str, prefix: str = prefix) -> Tensor:
            return source.read(prefix + name, dtype=torch.float32).double()

        scale = 1.0
        if (norm := f"{prefix}kv_a_layernorm.weight") in names:
            # the norm multiplies by weight / sqrt(eps), and stays that far from being one
            map_rr = map_rr * (read("kv_a_layernorm.weight") / math.sqrt(EPS))
            rows = map_rr @ read("kv_a_proj_with_mqa.weight")[:rank]
            has_bias = f"{prefix}kv_a_proj_with_mqa.bias" in names  # of latents that healing has given one
            offset_r = map_rr @ read("kv_a_proj_with_mqa.bias")[:rank] if has_bias else None
            input_norm = prefix.removesuffix("self_attn.") + "input_layernorm.weight"
            gain_D = source.read(input_norm, dtype=torch.float32).double()
            scale = latent_scale(largest_mean_square(rows, gain_D, offset_r))
            changed[norm] = torch.full((rank,), math.sqrt(EPS) / scale, dtype=torch.float64)
        for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
            if prefix + name in names:
                rows = read(name)
                changed[prefix + name] = torch.cat([scale * map_rr @ rows[:rank], rows[rank:]])
        changed[f"{prefix}kv_b_proj.weight"] = read("kv_b_proj.weight") @ inverse_rr
    for name, info in source.tensors.items():
        stored = getattr(torch, info.dtype)
        writer.add_as(name, changed[name] if name in changed else source.read(name), stored)
    writer.close_shards()


@torch.no_grad()
def _verify(folder: Path, witness_1T: Tensor, wanted_TV: Tensor, device: str) -> float:
    source = open_source(folder)
    is_stock = source.config.get("model_type") == "deepseek_v3"
    loaded = load_stock(folder, device) if is_stock else load(folder, dtype=torch.float32, device=device)
    found_TV = loaded(witness_1T, use_cache=False).logits[0].double().cpu()
    return compare_logits(folder, found_TV, wanted_TV, source.dtype)
