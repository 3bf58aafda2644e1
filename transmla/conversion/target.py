"""config.json of the folder that a plan writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transmla.families import rope_parameters
from transmla.targets.engines import OWN_MODEL_TYPE, own_form_sizes
from transmla.targets.stock import deepseek_v3_config

if TYPE_CHECKING:
    from transmla.conversion.plan import Plan


def target_config(
    planned: Plan, theta: float | None, inv_freq_LM: Sequence[Sequence[float]] = (), *, tied: bool | None = None
) -> dict[str, Any]:
    """config.json of the folder that is written.

    theta:       base of the rotary frequencies of a deepseek_v3 folder
    inv_freq_LM: those of each layer, in the own form
    tied:        whether lm_head is the embeddings, in the own form; None: as the source's config says
    """
    if planned.form == "deepseek_v3":
        assert theta is not None
        config = deepseek_v3_config(
            planned.outline.config, planned.mla, theta, planned.max_position_embeddings, planned.dtype
        )
        return config | {"biases_left_out": True} if planned.recipe.lossy else config
    from transmla.targets.own import own_config

    config = dict(planned.config) if tied is None else dict(planned.config) | {"tie_word_embeddings": tied}
    facts = planned.attention
    return own_config(
        config, planned.family, planned.gqa, planned.mla, inv_freq_LM, planned.dtype,
        softmax_scale=facts.scaling, softcap=facts.softcap, biased=facts.biased, encoded=facts.encoded,
        output_bias=facts.output_bias or (facts.biased and not facts.encoded),
    )  # fmt: skip


def planned_config(planned: Plan) -> dict[str, Any]:
    """As much of it as engines look at, before the rotary frequencies are chosen."""
    if planned.form == OWN_MODEL_TYPE:
        return own_form_sizes(planned.outline.config, planned.mla)
    return target_config(planned, float(rope_parameters(planned.outline.config)["rope_theta"]))
