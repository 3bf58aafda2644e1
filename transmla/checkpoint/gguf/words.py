"""The tokenizer that transformers makes of a .gguf file, beside what the file itself says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transmla.checkpoint.gguf.read import open_gguf

# llama.cpp's names of ways to cut text before merges: every digit for itself, the rest as GPT-2 does it
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
# as GPT-2 does it
_PLAIN = (None, "", "default", "gpt-2")
_CONTROL, _USER_DEFINED = 3, 4


def corrected(path: Path, tokenizer: Any) -> str | None:
    """Let the tokenizer cut text as the file says, in place; what is wrong with it beyond that, or None.

    transformers takes GPT-2's way to cut text where it does not know the one that is named, and gives special tokens
    new ids where it does not find them in the vocabulary.
    """
    reader = open_gguf(path)

    def value(name: str) -> Any:
        field = reader.get_field(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    cuts = value("pre")
    if value("model") == "gpt2" and cuts not in _PLAIN and not _is_known(cuts):
        if cuts not in _SINGLE_DIGITS:
            return f"its text is cut by {cuts!r} before tokens are looked for, which transformers does not know"
        from tokenizers import pre_tokenizers

        digits, bytes_of = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of])
    words, types = value("tokens") or [], value("token_type") or []
    named = {value(f"{name}_token_id") for name in ("bos", "eos", "eot")} - {None}
    for row, word in enumerate(words):
        kind = types[row] if row < len(types) else None
        is_marker = kind == _CONTROL or (kind == _USER_DEFINED and word.startswith("<") and word.endswith(">"))
        if is_marker or row in named:
            found = tokenizer.convert_tokens_to_ids(word)
            if found != row:
                return f"transformers reads {word!r} as token {found}, and the file has it as {row}"
    return None


def _is_known(cuts: Any) -> bool:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # of another release, which may know others
        return True
    return cuts in GGUF_PRE_TOKENIZER_SPLITS
