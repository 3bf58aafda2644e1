"""The tokenizer of a folder as GGUF metadata: what llama.cpp needs in order to cut text as the folder does.

llama.cpp knows two kinds that decoder models use. `llama` merges SentencePiece tokens by score; `gpt2` merges bytes by
a list, after a pre-tokenizer that is compiled in and named by `tokenizer.ggml.pre`. Which one a tokenizer.json needs
is read off its pre-tokenizer, not guessed from the model's name.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from transmla.errors import UnsupportedError

# ByteLevel's own pattern, which is used when no pattern of the model stands before it
_GPT2 = "gpt-2"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
# tokens with a part to play, as both name them
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# regular expression of a Split in tokenizer.json -> the name under which llama.cpp has it
_SPLITS = {
    rf"{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}": "llama-bpe",
    rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}": "qwen2",
    rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}": "tekken",
}


@dataclass(frozen=True)
class GgufVocab:
    """kind: "llama" or "gpt2";  pre: name of the pre-tokenizer;  one entry of each list per row of the embedding.

    scores: of merges, higher first ("llama" only);  add_space_prefix: whether text starts as if after a space
    add_begin: whether a begin token is put first
    special: rows of "bos", "eos" and the like, as transformers knows them;  template: of chats, or one for each use
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    add_space_prefix: bool | None
    add_begin: bool
    special: dict[str, int]
    template: str | dict[str, str] | None


def read_vocab(folder: Path, vocab_size: int, tokenizer: Any) -> GgufVocab:
    """The vocabulary of tokenizer.json in `folder`, padded to `vocab_size`; `UnsupportedError` for other kinds.

    tokenizer: of the folder, as transformers makes it of all its files; it has added tokens, special ones and templates
               that tokenizer.json need not have, and shows what is put first
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _unknown(folder, "there is no tokenizer.json", "save the tokenizer with a fast tokenizer of transformers")
    content = json.loads(path.read_text("utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise _unknown(path, f"its model is {model.get('type')}, and only BPE is known", "")
    tokens, types = _tokens(content, vocab_size, path, tokenizer)
    begin = tokenizer.bos_token_id
    add_begin = begin is not None and tokenizer("", verbose=False).input_ids[:1] == [begin]
    rows = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in _SPECIAL}
    special = {kind: int(row) for kind, row in rows.items() if row is not None and row < vocab_size}
    template = tokenizer.chat_template
    if not model.get("byte_fallback"):
        pre = _pre_tokenizer(content, path)
        return GgufVocab("gpt2", pre, tokens, types, None, None, add_begin, special, template)
    scores, space = _scores(model, tokens), _adds_space(content)
    return GgufVocab("llama", "default", tokens, types, scores, space, add_begin, special, template)


class _SpecialVocab(gguf.SpecialVocab):
    """Without ids below zero, by which the first LLaMA models mean that there is no such token."""

    def _set_special_token(self, typ: str, tid: Any) -> None:
        if not isinstance(tid, int) or tid >= 0:
            super()._set_special_token(typ, tid)


def add_vocab(writer: gguf.GGUFWriter, folder: Path, vocab: GgufVocab) -> None:
    """Write it, with special tokens and chat template."""
    writer.add_tokenizer_model(vocab.kind)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.scores is not None:
        writer.add_token_scores(vocab.scores)
    if vocab.add_space_prefix is not None:
        writer.add_add_space_prefix(vocab.add_space_prefix)
    with _silent():
        special = _SpecialVocab(folder, load_merges=vocab.kind == "gpt2", n_vocab=len(vocab.tokens))
    special.add_special_token["bos"] = vocab.add_begin
    # it reads files in another order than transformers
    special.special_token_ids |= vocab.special
    if isinstance(vocab.template, dict):
        special.chat_template = [{"name": name, "template": text} for name, text in vocab.template.items()]
    elif vocab.template is not None:
        special.chat_template = vocab.template
    special.add_to_gguf(writer, quiet=True)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without warnings of the gguf package about templates of pairs of texts, which models that write do not have."""
    logger = logging.getLogger("gguf.vocab")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _tokens(content: Mapping[str, Any], vocab_size: int, where: Path, tokenizer: Any) -> tuple[list[str], list[int]]:
    """Text and type of every row; rows without a token are unused."""
    known = tokenizer.added_tokens_decoder
    added = [{"id": row, "content": one.content, "special": one.special} for row, one in known.items()]
    added += [one for one in content.get("added_tokens") or [] if one["id"] not in known]
    rows = {**content["model"]["vocab"], **{one["content"]: one["id"] for one in added}}
    if without := sorted(text for text, row in rows.items() if row >= vocab_size):
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        why = f"the token {without[0]!r}{more} has no row among the {vocab_size:,} embeddings"
        raise _unknown(where, why, "take it out of the tokenizer, or resize the source's embeddings and convert again")
    tokens = [f"[PAD{row}]" for row in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    unknown = content["model"].get("unk_token")
    for text, row in content["model"]["vocab"].items():
        tokens[row], types[row] = text, int(_type(text, unknown))
    for one in added:
        row, text = one["id"], one["content"]
        special = gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
        tokens[row], types[row] = text, int(gguf.TokenType.UNKNOWN if text == unknown else special)
    return tokens, types


def _type(text: str, unknown: str | None) -> gguf.TokenType:
    if text == unknown:
        return gguf.TokenType.UNKNOWN
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """SentencePiece merges the pair whose joined token scores highest, BPE the one that comes first in the list: minus
    the place of the first merge that makes a token. Tokens that nothing merges to are never chosen."""
    first: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        first.setdefault("".join(pair), place)
    return [-float(first[text]) if text in first else -1e6 for text in tokens]


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether the text gets a leading space: a Prepend among the normalizers, or Metaspace."""
    steps = _steps(content.get("normalizer"), "normalizers")
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    spaces = [step for step in _steps(content.get("pre_tokenizer"), "pretokenizers") if step.get("type") == "Metaspace"]
    return any(step.get("prepend_scheme", "always") != "never" for step in spaces)


def _pre_tokenizer(content: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name of what cuts the text before bytes are merged."""
    cuts = []
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "Split":
            pattern = step["pattern"].get("Regex", "")
            if pattern not in _SPLITS:
                raise _unknown(path, f"llama.cpp has no pre-tokenizer {pattern!r}", "")
            cuts.append(_SPLITS[pattern])
        elif kind == "Digits" and step.get("individual_digits"):
            cuts.append(kind)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            cuts += [_GPT2] if step.get("use_regex", True) else []
        else:
            raise _unknown(path, f"llama.cpp has no pre-tokenizer like its {kind}", "")
    if cuts == ["Digits", _GPT2]:
        return "smollm"
    if len(cuts) != 1 or cuts == ["Digits"]:
        raise _unknown(path, f"llama.cpp has none that cuts by {' and then '.join(cuts) or 'nothing'}", "")
    return cuts[0]


def _steps(entry: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    if entry is None:
        return []
    return list(entry[inside]) if entry.get("type") == "Sequence" else [entry]


def _unknown(where: Path, why: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(
        "the tokenizer cannot be written as GGUF",
        where=str(where),
        why=why,
        remedy=remedy
        or "known are SentencePiece with byte fallback, and byte-level BPE as in GPT-2, SmolLM2, Llama 3, "
        "Mistral (tekken) and Qwen2",
    )
