"""What goes along with the weights: tokenizer, chat template, generation settings, licence. Never code."""

import json
from pathlib import Path
from typing import Any

from transmla.checkpoint.destination import disk_errors
from transmla.checkpoint.gguf.words import corrected
from transmla.checkpoint.read import Source
from transmla.checkpoint.store import readable, source_errors
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
_GENERATION = "generation_config.json"
# a folder with the templates of chats beside the default one
TEMPLATES = "additional_chat_templates"
_OTHER_FILES = ("chat_template.jinja", "chat_template.json", _GENERATION)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def copy_companions(source: Source, destination: Path) -> list[str]:
    """Copy them into an existing folder and return their names; a GGUF file's tokenizer is unpacked."""
    if source.format == "gguf":
        cutter = tokenizer(source)
        with disk_errors(destination):
            saved = cutter.save_pretrained(destination)
        return sorted({Path(name).name for name in saved if Path(name).is_file()})
    names = [name for name in (*TOKENIZER_FILES, *_OTHER_FILES) if (source.path / name).is_file()]
    names += _licences(source.path)
    with source_errors(source.path):
        names += [f"{TEMPLATES}/{file.name}" for file in (source.path / TEMPLATES).glob("*.jinja") if file.is_file()]
    for name in names:
        content = readable(source.path / name)
        with disk_errors(destination / name):
            (destination / name).parent.mkdir(exist_ok=True)
            (destination / name).write_bytes(_let_sample(content) if name == _GENERATION else content)
    return sorted(names)


def _licences(folder: Path) -> list[str]:
    with source_errors(folder):
        return [
            file.name
            for pattern in ("LICENSE*", "NOTICE*")
            for file in folder.glob(pattern)
            if file.is_file() and file.suffix.lower() in ("", ".txt", ".md", ".rst")
        ]


def tokenizer_files(source: Source) -> list[Path]:
    """The files beside the weights that say how text becomes tokens."""
    if source.format == "gguf":
        return []
    return [source.path / name for name in TOKENIZER_FILES if (source.path / name).is_file()]


def _let_sample(content: bytes) -> bytes:
    """A generation config with do_sample set where it gives a temperature and the like without it.

    Engines sample with that temperature all the same; transformers decodes greedily, and refuses to save the model once
    any other setting of it has changed. A file that is wrong in another way stays as it is.
    """
    from transformers import GenerationConfig

    try:
        values = json.loads(content)
        if not values.get("do_sample") and not _is_valid(GenerationConfig(**values)):
            sampling = values | {"do_sample": True}
            if _is_valid(GenerationConfig(**sampling)):
                return (json.dumps(sampling, indent=2) + "\n").encode("utf-8")
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    return content


def _is_valid(settings: Any) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def tokenizer(source: Source) -> Any:
    """The tokenizer of the source, as transformers makes it, without running code from the checkpoint."""
    from transformers import AutoTokenizer

    folder, options = source.path, {}
    if source.format == "gguf":
        folder, options = source.path.parent, {"gguf_file": source.path.name}
    elif not any((folder / name).is_file() for name in _VOCABULARIES):
        raise _no_tokenizer(source, f"none of {', '.join(_VOCABULARIES)} is there")
    try:
        cutter = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
        wrong = corrected(source.path, cutter) if source.format == "gguf" else None
    except BaseException as error:  # damaged files make tokenizers raise plain Exception, and panic
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise _no_tokenizer(source, f"{type(error).__name__}: {reason}") from error
    if wrong is not None:
        raise _no_tokenizer(source, wrong, "convert the folder with safetensors that the file was made from")
    return cutter


def _no_tokenizer(
    source: Source, why: str, remedy: str = "add tokenizer.json and tokenizer_config.json of the model to its folder"
) -> SourceError:
    return SourceError("the source has no tokenizer that can be read", where=str(source.path), why=why, remedy=remedy)
