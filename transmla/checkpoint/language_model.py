"""The language model inside a multimodal one: its config and its tensors, as if it had been saved alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transmla.checkpoint.store import RenamedStore, WeightStore, understood
from transmla.families import INNER, WRAPPERS

# what its tensors are called inside, by the versions of transformers that saved the whole, and alone: the first that
# fits
PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
    ("lm_head.", "lm_head."),
)
# settings that may stand in the whole's config, and hold there unless the language model's own says otherwise
_SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")


@dataclass(frozen=True)
class Whole:
    """The multimodal model that a source is the language model of.

    model_type: of the whole, as in config.json
    left_out:   names of its other parts, as in the checkpoint
    """

    model_type: str
    left_out: tuple[str, ...]


def language_model(config: dict[str, Any], store: WeightStore) -> tuple[dict[str, Any], WeightStore, Whole | None]:
    """Config and tensors of the language model inside, if the table of wrappers has it; else all as it was given.

    config: the parsed config.json;  store: the tensors that lie beside it
    """
    inner = config.get("text_config")
    model_type = str(config.get("model_type"))
    if model_type not in WRAPPERS or not isinstance(inner, Mapping):
        return config, store, None
    family = INNER.get(str(inner.get("model_type")), inner.get("model_type"))
    names = {alone: name for name in store.tensors if (alone := _alone(name)) is not None}
    if family not in WRAPPERS[model_type] or not names:
        return config, store, None
    said = [{key: one[key] for key in _SHARED if one.get(key) is not None} for one in (config, inner)]
    found = _complete(inner) | said[0] | said[1]
    # a head that is there may be another matrix, whatever the configs say: they differ, and so do their defaults
    found |= {"model_type": family, "tie_word_embeddings": not any(name.startswith("lm_head.") for name in names)}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(settings := found.get(key), Mapping):
            found[key] = _of_text(settings)
    others = dict.fromkeys(_part(name) for name in store.tensors if name not in names.values())
    return found, RenamedStore(store, names, others=False), Whole(model_type, tuple(others))


def _alone(name: str) -> str | None:
    """What a tensor is called in the language model by itself; None if it is not one of it."""
    for prefix, alone in PREFIXES:
        if name.startswith(prefix):
            return alone + name.removeprefix(prefix)
    return None


def _part(name: str) -> str:
    return name.removeprefix("model.").partition(".")[0]


def _complete(inner: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of its own class, which published configs leave out, sizes among them; those of the family may
    be others. `SourceError` for what the class does not take."""
    from transformers import AutoConfig

    left_out = ("auto_map", "model_type", "torch_dtype", "quantization_config")
    values = {key: value for key, value in inner.items() if key not in left_out}
    with understood("text_config of config.json"):
        found: dict[str, Any] = AutoConfig.for_model(str(inner.get("model_type")), **values).to_dict()
    return found


def _of_text(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings without those for the rows and columns of a picture: tokens of text have one position."""
    found = {key: value for key, value in settings.items() if not key.startswith("mrope")}
    return found | {key: "default" for key in ("type", "rope_type") if found.get(key) == "mrope"}
