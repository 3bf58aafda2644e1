"""What a plan has to know of a source's class: settings, tensors, biases and norms; from the layout of its family where
config and headers leave no doubt, which takes no time, and from the class itself where they do.

In doubt is any setting that transmla/model/known_settings.py does not know, and any tensor that is not there as the
layout says. `transmla.model.skeleton.outline_of_class` is asked then, and what it says holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transmla.checkpoint.read import Source
from transmla.errors import SourceError
from transmla.families import MULTIPLIERS, Family, rope_parameters, rotary_dim
from transmla.layouts import LAYOUTS, Layout
from transmla.model.known_settings import IGNORED, is_known, is_usual_rotary

if TYPE_CHECKING:
    from transmla.model.skeleton import AttentionFacts

# every config has them; see `gqa_geometry`
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Outline:
    """What a plan has to know of a source's class.

    config:  with the defaults of the class; without `facts` of those settings alone that a plan depends on
    tensors: name and shape of every tensor that the checkpoint must have
    head:    shape of lm_head
    biased, output_bias, encoded: of the attention, see `AttentionFacts`
    facts:   of the first layer; None: the class was not asked
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]] = field(repr=False)
    head: tuple[int, ...]
    biased: bool
    output_bias: bool
    encoded: bool
    facts: AttentionFacts | None = None


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a complete config says that lm_head is the embeddings; the default differs between families."""
    return bool(config.get("tie_word_embeddings"))


def filled(config: Mapping[str, Any], complete: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the sizes that its class has, which it may leave out. complete: with all defaults"""
    wanted = ("num_key_value_heads", "head_dim", "rms_norm_eps", "intermediate_size")
    sizes = {key: complete[key] for key in wanted if complete.get(key) is not None}
    return {key: value for key, value in config.items() if value is not None} | sizes


def outline_of_headers(source: Source, family: Family) -> Outline | None:
    """The outline by the layout of the family, if the headers of the weight files are as it says; else None."""
    found = outline_of_layout(source.config, family)
    if found is None:
        return None
    try:
        source.require(found.tensors)
    except SourceError:
        return None
    return found


def outline_of_layout(config: Mapping[str, Any], family: Family) -> Outline | None:
    """The outline by the layout of the family, from the config alone; None where the class has to be asked."""
    layout = LAYOUTS.get(family.model_type)
    if layout is None:
        return None
    settings = {key: value for key, value in config.items() if key not in IGNORED}
    if not is_known(settings) or not settings.keys() >= {*_NEEDED, *layout.needed}:
        return None
    if any(key in settings and key not in layout.defaults for key in MULTIPLIERS):
        return None  # the class may pass over it
    values = dict(layout.defaults) | settings
    if "num_experts" in settings:  # the same under another name
        if settings.get("num_local_experts", settings["num_experts"]) != settings["num_experts"]:
            return None
        values["num_local_experts"] = settings["num_experts"]
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    for key, follows in (("num_key_value_heads", heads), ("head_dim", hidden // heads)):
        if key not in layout.defaults and values.get(key, follows) != follows:
            return None  # the class does not have it
        values[key] = values.get(key) or follows
    kinds = _kinds(values, layout)
    if layout.rotary_kinds and "full_attention" not in (kinds or ()):
        return None  # old configs scale the rotary embeddings of these layers alone
    if kinds is None or hidden % heads or not _is_rotary(values, layout) or not _pads(values):
        return None
    values |= {"layer_types": kinds} if layout.kinds else {}
    if layout.windows == "off":
        values["sliding_window"] = None
    return _outline(values, family, layout)


def _outline(values: dict[str, Any], family: Family, layout: Layout) -> Outline:
    sizes = _sizes(values)
    biased = {module for key, modules in layout.biases.items() if not key or values.get(key) for module in modules}
    modules = dict(layout.layer)
    for key, norms in layout.norms.items():
        modules |= norms if values.get(key) else {}
    layer = {name if name.endswith("_bias") else f"{name}.weight": sizes(letters) for name, letters in modules.items()}
    layer |= {f"{name}.bias": sizes(letters)[:1] for name, letters in modules.items() if name in biased}
    if layout.experts is not None and family.experts is not None:
        number, width, hidden = values[layout.experts[0]], values[layout.experts[1]], values["hidden_size"]
        gate, up, down = family.experts
        for expert in range(number):
            layer |= dict.fromkeys((gate.format(expert), up.format(expert)), (width, hidden))
            layer[down.format(expert)] = (hidden, width)
    ends = {"norm": (family.norm, "D")} | ({} if is_tied(values) else {"lm_head": (family.lm_head, "VD")})
    tensors = {
        f"{family.layers}.{index}.{name}": shape
        for index in range(values["num_hidden_layers"])
        for name, shape in layer.items()
    }
    tensors[f"{family.embed_tokens}.weight"] = sizes("VD")
    for name, (module, letters) in ends.items():
        tensors[f"{module}.weight"] = sizes(letters)
        if name in biased:
            tensors[f"{module}.bias"] = sizes(letters)[:1]
    inside = f"{family.attention}."
    output = inside + family.o_proj
    return Outline(
        config=values,
        tensors=tensors,
        head=sizes("VD"),
        biased=any(module.startswith(inside) and module != output for module in biased),
        output_bias=output in biased,
        encoded=any(module.startswith(inside) and "norm" in module for module in modules),
    )


def _sizes(values: Mapping[str, Any]) -> Callable[[str], tuple[int, ...]]:
    """Letters of a layout -> shape."""
    hidden, inner, heads = values["hidden_size"], values["intermediate_size"], values["num_attention_heads"]
    groups, width = values["num_key_value_heads"], values["head_dim"]
    letters = {
        "D": hidden, "I": inner, "U": 2 * inner, "V": values["vocab_size"], "d": width, "H": heads, "G": groups,
        "Q": heads * width, "K": groups * width, "A": (heads + 2 * groups) * width,
        "N": values.get("num_local_experts"),
    }  # fmt: skip
    return lambda word: tuple(letters[letter] for letter in word)


def _kinds(values: Mapping[str, Any], layout: Layout) -> list[str] | None:
    """The kinds of all layers, as in layer_types; None where the class has to be asked."""
    number, window, given = values["num_hidden_layers"], values.get("sliding_window"), values.get("layer_types")
    sliding, full = "sliding_attention", "full_attention"
    if values.get("use_sliding_window") or (layout.windows is None and window is not None):
        return None
    kinds = [full] * number
    if layout.windows == "all" and window is not None:
        kinds = [sliding] * number
    elif isinstance(layout.windows, int):
        if {values.get("sliding_window_pattern"), values.get("_sliding_window_pattern")} - {None, layout.windows}:
            return None
        kinds = [sliding if (index + 1) % layout.windows else full for index in range(number)]
    if given is None:
        return kinds
    free = layout.kinds and layout.windows not in (None, "off")
    if len(given) != number or not set(given) <= {sliding, full} or not (free or (layout.kinds and given == kinds)):
        return None
    return list(given)


def _is_rotary(values: Mapping[str, Any], layout: Layout) -> bool:
    """Whether the rotary settings are as usual."""
    old, new, rotated = values.get("rope_scaling"), values.get("rope_parameters"), values.get("no_rope_layers")
    if rotated is not None and len(rotated) != values["num_hidden_layers"]:
        return False
    if not layout.scaled and rope_parameters(values)["rope_type"] != "default":
        return False
    partly = "partial_rotary_factor" in layout.defaults or "rotary_pct" in layout.defaults
    if not partly and ("partial_rotary_factor" in values or "rotary_pct" in values):
        return False
    turning = rotary_dim(values, values["head_dim"])
    if not turning or turning % 2:
        return False  # half a pair cannot turn
    if new is None:
        # where layers differ, the class looks for the newer of the two names alone
        named = old is not None and (not layout.rotary_kinds or "rope_type" in old)
        return old is None or (named and is_usual_rotary(old, partly))
    if old is not None or not isinstance(new, Mapping):
        return False
    if layout.rotary_kinds:
        kinds = {"sliding_attention", "full_attention"}
        return set(new) == kinds and all(is_usual_rotary(one, partly) for one in new.values())
    return is_usual_rotary(new, partly)


def _pads(values: Mapping[str, Any]) -> bool:
    """Whether the embeddings have a row for what they are padded with."""
    padding = values.get("pad_token_id")
    return padding is None or 0 <= padding < values["vocab_size"]
