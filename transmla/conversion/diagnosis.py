"""`transmla doctor` for whatever a user names: converted folders and files, and sources that are not converted yet."""

from __future__ import annotations

from pathlib import Path

from transmla.checkpoint.gguf.describe import describe_gguf
from transmla.checkpoint.provenance import FILE_NAME
from transmla.checkpoint.read import open_source
from transmla.checkpoint.resolve import local
from transmla.conversion.plan import plan
from transmla.families import FAMILIES
from transmla.targets import doctor as converted
from transmla.targets.doctor import Diagnosis


def doctor(model: str | Path) -> Diagnosis:
    """What each engine does with `model`: run it, refuse it, or compute something else.

    model: a converted folder, a GGUF file of one, or any other folder with latent attention; a source that is not
           converted yet is planned with the defaults, and the diagnosis is that of what `transmla.convert` would write
    Reads config, the headers of the weight files and the tokenizer.

    Raises `SourceError` for what cannot be read, and `UnsupportedError` for models that cannot be converted.
    """
    if not _is_source(Path(model)):
        return converted.doctor(model)
    planned = plan(str(model))
    geometry = f"{planned.mla.kv_lora_rank}+{planned.mla.qk_rope_head_dim}"
    name = Path(planned.resolved.name)
    return Diagnosis(name, geometry, planned.mla.cache_values(), planned.dtype, planned.engines, "source")


def _is_source(path: Path) -> bool:
    """Whether it names something that `convert` takes: a family of the table, or what is not a path at all."""
    found = local(str(path))
    if found is None:
        return True
    path = found
    if path.suffix.lower() == ".gguf" and path.is_file():
        known = {family.gguf_architecture for family in FAMILIES.values()}
        return describe_gguf(path).architecture in known
    if (path / FILE_NAME).is_file():
        return False
    return path.is_dir() and open_source(path).config.get("model_type") in FAMILIES
