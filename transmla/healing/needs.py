"""What healing needs of the disk, from file headers alone."""

from __future__ import annotations

import math

from transmla.checkpoint.read import Source
from transmla.conversion.needs import COMPANION_BYTES, DTYPE_BYTES
from transmla.healing.prepare import CACHED_TOP_K
from transmla.healing.weights import is_own
from transmla.recipe import Healing

# of one trained value in a checkpoint of the optimizer: two moments in float32
_OPTIMIZER_BYTES = 8
# the newest checkpoint, the best one, and the one that is written before an older one goes
_CHECKPOINTS = 3
# of a token in a window: id, position and label;  of one kept prediction: probability and id
_TOKEN_BYTES, _PREDICTION_BYTES = 12, 6
# what is never trained
_ENDS = ("embed_tokens.weight", "lm_head.weight")


def disk_bytes(converted: Source, settings: Healing, sharded: bool = False) -> int:
    """At the worst moment: the unfolded model, the trained one and checkpoints in float32, windows, and the result.

    sharded: over processes; then checkpoints hold all weights, not those alone that are trained
    """
    values = {name: math.prod(info.shape) for name, info in converted.tensors.items()}
    whole = 4 * sum(values.values())
    attention = f".{converted.config.get('attention_module', 'self_attn')}."
    chosen = [name for name in values if attention in name or (settings.train == "all" and not name.endswith(_ENDS))]
    trained = sum(values[name] for name in chosen)
    if settings.lora is None:
        checkpoint = (whole if sharded else 4 * trained) + _OPTIMIZER_BYTES * trained
    else:  # two narrow matrices for each wide one
        shapes = [converted.tensors[name].shape for name in chosen]
        adapters = sum(settings.lora * sum(shape) for shape in shapes if len(shape) == 2)
        checkpoint = (4 + _OPTIMIZER_BYTES) * adapters
    result = sum(values.values()) * DTYPE_BYTES.get(converted.dtype, 4)
    copies = 0 if is_own(converted) else 2 * whole  # unfolded, before and after training
    distinct = min(settings.distinct or settings.tokens, settings.tokens)
    windows = _TOKEN_BYTES * distinct
    if settings.cached:
        windows += _PREDICTION_BYTES * (settings.top_k or CACHED_TOP_K) * distinct
    return copies + _CHECKPOINTS * checkpoint + result + windows + COMPANION_BYTES
