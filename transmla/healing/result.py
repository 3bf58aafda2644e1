"""Write the healed folder: folded, verified, with provenance, model card and training curves."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmla.checkpoint.destination import disk_errors
from transmla.checkpoint.hashes import file_hashes
from transmla.checkpoint.provenance import FILE_NAME, portable, read_provenance, versions, write_provenance
from transmla.checkpoint.read import Source
from transmla.checkpoint.write import CheckpointWriter
from transmla.conversion.card import shown
from transmla.devices import release
from transmla.healing.curves import LOG_FILE, PLOT_FILE, healing_curve, write_curve
from transmla.healing.prepare import packed_texts
from transmla.healing.student import with_adapters
from transmla.healing.train import Trained
from transmla.healing.weights import is_own, weights_of
from transmla.model.loading import load
from transmla.progress import Progress
from transmla.recipe import Healing
from transmla.targets.fold import fold_into, open_unfolded
from transmla.targets.own import write_own

_GENERATION = "generation_config.json"


def write_healed(
    writer: CheckpointWriter,
    work: Path,
    parent: Source,
    settings: Healing,
    trained: Trained,
    *,
    source: str,
    num_processes: int,
    device: str,
    progress: Progress,
) -> None:
    """Fold the trained weights into the writer's folder, verify it and give it its final name.

    writer:        writes the healed folder
    work:          folder of the journal, with the unfolded model
    parent:        the converted folder that was healed
    trained:       the weights to write, and what was measured
    source:        name of the source model
    num_processes: processes that trained, for the provenance file
    device:        where the folded model is verified

    Raises `VerificationError` if the folded model does not compute what the trained one computes, and
    `DestinationError` if the folder cannot be written.
    """
    entry: dict[str, Any] = {
        "parent": {"name": parent.path.name, "files": file_hashes(sorted(parent.path.glob("*.safetensors")))},
        "source": source,
        "settings": asdict(settings),
        "texts": packed_texts(work),
        "rate": trained.rate,
        "trained_parameters": trained.num_trained,
        "processes": num_processes,
        "steps": trained.best_step,
        "tokens": trained.tokens,
        "before": trained.before,
        "after": trained.after,
        "versions": versions(),
    }
    entry = portable(entry)
    provenance = read_provenance(parent.path)
    provenance.pop("quantised_for", None)  # a code for other weights
    sections = provenance | {"healed": [*provenance.get("healed", []), entry]}
    if is_own(parent):
        sections.pop("format", None)
        make = partial(_merged, weights_of(parent, work), trained.tensors, settings.lora)
        write_own(writer, parent, make, sections, device, progress)
    else:
        folder = _write_trained(work, trained, settings, sections)
        # the model has gone before another one is loaded to be compared with
        release(device)
        fold_into(writer, open_unfolded(folder), text="wikitext", dtype=parent.dtype, device=device, progress=progress)
    card = (parent.path / "README.md").read_text("utf-8") if (parent.path / "README.md").is_file() else ""
    writer.write_text("README.md", card.rstrip() + "\n\n" + _card(entry))
    curve = portable(healing_curve(trained.log, trained.plan.tokens, list(trained.after)))
    writer.write_json(LOG_FILE, curve)
    with disk_errors(writer.partial / PLOT_FILE):
        write_curve(curve, writer.partial / PLOT_FILE)
    sections.pop("format", None)
    write_provenance(writer, **sections)  # once more: card and curves are of this run
    writer.commit()


def _write_trained(work: Path, trained: Trained, settings: Healing, sections: Any) -> Path:
    """The trained unfolded model as a folder of its own in the journal."""
    model, folder = _merged(work / "unfolded", trained.tensors, settings.lora), work / "trained"
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(work / "unfolded", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        model.save_pretrained(str(folder))
        # save_pretrained rewrites some keys of the config, and default generation settings where it could not read
        # those of the folder, so the originals are put back
        (folder / _GENERATION).unlink(missing_ok=True)
        for name in ("config.json", _GENERATION):
            if (work / "unfolded" / name).is_file():
                shutil.copyfile(work / "unfolded" / name, folder / name)
        (folder / FILE_NAME).write_text(json.dumps(sections, indent=2) + "\n", encoding="utf-8")
    return folder


def _merged(unfolded: Path, trained: dict[str, Tensor], lora: int | None) -> Any:
    """The trained model on the CPU in float32, with adapters merged; frozen weights are exactly as before."""
    model: Any = load(unfolded, dtype=torch.float32)
    if lora is None:
        model.load_state_dict(trained, strict=False)
        return model
    model = with_adapters(model, lora)
    model.load_state_dict(trained, strict=False)
    return model.merge_and_unload()


def _card(entry: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {shown(text)} | {entry['before'][text]['recovery']:.1%} | {entry['after'][text]['recovery']:.1%} |"
        for text in entry["after"]
    )
    bits = entry["settings"]["latent_bits"]
    rounded = ""
    if bits is not None:
        rounded = f"Latents were rounded as in a cache\n`latent-int{bits}`, in training and in this table. "
    return f"""## Healed

Distilled from the source on {entry["tokens"]:,} tokens ({shown(entry["settings"]["data"])}), {entry["steps"]:,} steps;
trained weights: {entry["settings"]["train"]}. {rounded}Recovery is the perplexity of the source over that of the model,
on held-out windows. The training curves are in `{LOG_FILE}` and `{PLOT_FILE}`.

| text | before | after |
|---|---:|---:|
{rows}
"""
