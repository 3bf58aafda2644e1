"""The weights that are trained: those of the unfolded form of a deepseek_v3 folder, or of the own form as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transmla.checkpoint.read import Source, open_source
from transmla.progress import Progress
from transmla.targets.export import open_converted
from transmla.targets.fold import unfold
from transmla.targets.own import MODEL_TYPE, open_own


def open_trainable(folder: Path) -> Source:
    """The opened converted folder, of either form; raises as `open_converted` and `open_own` do."""
    return open_own(folder) if is_own(open_source(folder)) else open_converted(folder)


def is_own(converted: Source) -> bool:
    """Whether a converted folder has the form of its source's class, which is trained as it is."""
    return bool(converted.config.get("model_type") == MODEL_TYPE)


def context_of(config: Mapping[str, Any]) -> int:
    """Longest context of a converted folder, in tokens."""
    return int(config.get("text_config", config)["max_position_embeddings"])


def prepare_weights(converted: Source, work: Path, progress: Progress) -> None:
    """Unfold a deepseek_v3 folder into the journal's folder `work`, unless an earlier run has done so."""
    if not is_own(converted) and not (work / "unfolded").is_dir():
        unfold(converted.path, work / "unfolded", dtype="float32", progress=progress)


def weights_of(converted: Source, work: Path) -> Path:
    """The folder that is trained."""
    return converted.path if is_own(converted) else work / "unfolded"
