"""`transmla generate`: stream text from a converted model or a source."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import torch

from transmla.devices import named
from transmla.errors import TransmlaError, UnsupportedError
from transmla.model.loading import load_any, load_tokenizer
from transmla.text.chats import templated


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
    cache: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Generator[str, None, None]:
    """The continuation of `prompt`, piece by piece while it is generated; closing the iterator ends the generation.

    model:          converted folder, or anything that `transmla.convert` accepts as a source
    max_new_tokens: longest continuation, in tokens
    temperature:    0 always takes the most likely token
    top_p:          probability mass to sample from
    seed:           seed of the sampling
    chat:           treat the prompt as a user's message and put it into the model's chat template
    cache:          kind of latent cache of a converted model: "latent", "latent-int8", "latent-coded3" ..., see
                    `LatentCache`; by default the one of transformers
    dtype:          a torch dtype or its name; "auto" keeps the dtype of the weights
    device:         where the model is run

    Raises `SourceError` if the model is not found, `UnsupportedError` if it cannot be loaded or has no such cache,
    `DataError` if its chat template fails, and `TransmlaError` if the device is not available, generation fails, or
    `chat` is set and the model has no chat template.
    """
    tokenizer = load_tokenizer(model)
    device = named(device)
    loaded = load_any(model, dtype=dtype, device=device)
    through = {} if cache is None else {"past_key_values": own_cache(loaded, cache, str(model))}
    inputs = _inputs(tokenizer, prompt, chat).to(loaded.device)
    streamer = _Pieces(tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    options: dict[str, Any] = sampling or {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    options |= {"max_new_tokens": max_new_tokens, "streamer": streamer, "pad_token_id": tokenizer.eos_token_id}
    failures: list[Exception] = []

    def work() -> None:
        try:
            with torch.no_grad():
                torch.manual_seed(seed)
                loaded.generate(**inputs, **options, **through)
        except Exception as error:
            failures.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while (piece := streamer.next()) is not None:
            yield piece
    finally:
        # a thread at work in torch when the process ends would abort it
        streamer.stop()
        thread.join()
    if failures:
        raise TransmlaError(
            "the model could not generate",
            where=str(model),
            why=f"{type(failures[0]).__name__}: {failures[0]}",
            remedy="try a shorter prompt, fewer tokens or --dtype float32",
        ) from failures[0]


class _Pieces:
    """A streamer of transformers' `generate` whose pieces begin with the prompt's own spacing: what is new in the text
    of all tokens, since some tokenizers take the first space from what they decode."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._text: str | None = None  # of the prompt, then of what has been said
        self._queue: Queue[str | None] = Queue()
        self._stopped = False

    def put(self, ids: torch.Tensor) -> None:
        if self._stopped:
            raise InterruptedError("nobody reads on")
        self._ids += ids.flatten().tolist()
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if self._text is None:
            self._text = text
        elif not text.endswith("\ufffd"):  # half a character
            self._say(text)

    def end(self) -> None:
        if self._text is not None:
            self._say(str(self._tokenizer.decode(self._ids, skip_special_tokens=True)))
        self._queue.put(None)

    def stop(self) -> None:
        """No more tokens are wanted."""
        self._stopped = True

    def next(self) -> str | None:
        """The next piece; None at the end."""
        return self._queue.get()

    def _say(self, text: str) -> None:
        assert self._text is not None
        if len(text) > len(self._text):
            self._queue.put(text[len(self._text) :])
            self._text = text


def own_cache(loaded: Any, kind: str, model: str, **settings: Any) -> Any:
    """An empty cache; `UnsupportedError` if the model has none of that kind. settings: of `LatentCache`"""
    if not hasattr(loaded, "latent_cache"):
        raise UnsupportedError(
            "only converted models have a latent cache",
            where="--cache",
            why=f"{model} caches keys and values",
            remedy="convert it, or leave out --cache",
        )
    try:
        return loaded.latent_cache(kind, **settings)
    except ValueError as error:
        raise UnsupportedError(
            f"the model has no cache {kind!r}",
            where="--cache",
            why=str(error),
            remedy="use latent, latent-int8, latent-int4, latent-int3 or latent-int2; with a folder of "
            "`transmla quantise` also latent-coded4, latent-coded2.5 ...",
        ) from error


def _inputs(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    remedy = "leave out --chat and write the prompt as plain text"
    if not tokenizer.chat_template:
        raise TransmlaError(
            "the model has no chat template",
            where="--chat",
            why="its tokenizer does not define how a message is formatted",
            remedy=remedy,
        )
    text = templated(tokenizer, [{"role": "user", "content": prompt}], "--chat", ask=True, remedy=remedy)
    # the template writes special tokens itself
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
