"""What goes along with the weights: tokenizer, chat template, generation settings, licence. Never code."""

import shutil
from pathlib import Path
from typing import Any

from transmla.checkpoint.read import Source
from transmla.errors import SourceError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_OTHER_FILES = ("chat_template.jinja", "chat_template.json", "generation_config.json")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def copy_companions(source: Source, destination: Path) -> list[str]:
    """Copy them into an existing folder and return their names; a GGUF file's tokenizer is unpacked."""
    if source.format == "gguf":
        saved = tokenizer(source).save_pretrained(destination)
        return sorted({Path(name).name for name in saved if Path(name).is_file()})
    names = [name for name in (*TOKENIZER_FILES, *_OTHER_FILES) if (source.path / name).is_file()]
    for pattern in ("LICENSE*", "NOTICE*"):
        names += [
            file.name
            for file in source.path.glob(pattern)
            if file.is_file() and file.suffix.lower() in ("", ".txt", ".md", ".rst")
        ]
    for name in names:
        shutil.copyfile(source.path / name, destination / name)
    return sorted(names)


def tokenizer(source: Source) -> Any:
    """The tokenizer of the source, as transformers makes it, without running code from the checkpoint."""
    from transformers import AutoTokenizer

    folder, options = source.path, {}
    if source.format == "gguf":
        folder, options = source.path.parent, {"gguf_file": source.path.name}
    elif not any((folder / name).is_file() for name in _VOCABULARIES):
        raise _no_tokenizer(source, f"none of {', '.join(_VOCABULARIES)} is there")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # damaged files make tokenizers raise plain Exception
        reason = (str(error).splitlines() or [""])[0]
        raise _no_tokenizer(source, f"{type(error).__name__}: {reason}") from error


def _no_tokenizer(source: Source, why: str) -> SourceError:
    return SourceError(
        "the source has no tokenizer that can be read",
        where=str(source.path),
        why=why,
        remedy="add tokenizer.json and tokenizer_config.json of the model to its folder",
    )
