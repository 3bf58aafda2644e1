"""What a plan remarks on: consequences of sizes and settings that its tables do not show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transmla.checkpoint.store import first_few
from transmla.conversion.levels import LEAST_PER_FEATURE
from transmla.families import rotary_dim
from transmla.geometry import GqaGeometry, MlaGeometry
from transmla.text.mixes import needs_source

if TYPE_CHECKING:
    from transmla.conversion.plan import Plan

# which older versions of transformers have saved along with the weights
_BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


def remarks(planned: Plan, candidates: tuple[int, ...], num_divisions: int) -> list[str]:
    """One sentence each.

    candidates:    latents that `latent="auto"` tries, ascending
    num_divisions: ways to divide the cache that `rope="auto"` chooses from
    """
    settings, gqa, mla = planned.recipe, planned.gqa, planned.mla
    wanted = LEAST_PER_FEATURE * mla.widest
    said: list[str] = []
    if (whole := planned.source.whole) is not None:
        said.append(
            f"of {whole.model_type} the language model alone is converted, and the result takes text alone; left out: "
            + (", ".join(whole.left_out) or "nothing that has weights")
        )
    if unknown := _unknown(planned):
        said.append(
            f"transformers' {planned.family.model_type} has no place for {len(unknown)} tensors in its layers; "
            f"they are left out: {first_few(unknown)}"
        )
    if "AutoModelForCausalLM" in (planned.source.config.get("auto_map") or {}):
        said.append(
            f"the source brings code of its own, which is not run: it is taken for what transformers calls "
            f"{planned.family.model_type}"
        )
    if candidates:
        said.append(
            f"--latent auto: the smallest of {len(candidates)} sizes, {candidates[0]} to {candidates[-1]}, whose "
            f"perplexity stays within {settings.budget:.1%}; up to {len(candidates).bit_length()} conversions"
        )
    if num_divisions:
        said.append(
            f"--rope auto: {num_divisions} ways to divide {mla.cache_values()} cached values, of which convert takes "
            "the one with the smallest error in a few layers; all else here is for the first"
        )
    if planned.form != "deepseek_v3" and planned.obstacles:
        missing = ", ".join(planned.obstacles)
        said.append(f"written as {planned.family.model_type} with latent attention: deepseek_v3 has no {missing}")
    if settings.lossy:
        said.append(
            "--lossy: the folder has no biases; what they add is read from the input, of which one direction is nearly "
            "constant. Not exact at any size, but for engines without biases; `transmla eval` says what it costs"
        )
    if mla.query_bias:
        said.append(_query_bias(mla))
    turning = rotary_dim(planned.outline.config, gqa.head_dim)
    if mla.qk_rope_head_dim > turning:
        room = min(mla.cache_values() - turning, gqa.cache_values(), gqa.hidden_size)
        said.append(
            f"of {gqa.head_dim} values of a head {turning} turn, so {mla.qk_rope_head_dim - turning} of the rotary key "
            f"stay empty: --latent {room} --rope {turning} has use for them"
        )
    if settings.begin != "half":
        which = "every" if settings.begin == "all" else "no"
        said.append(f"{which} calibration window starts with the begin token, where the tokenizer puts one first")
    if settings.num_tokens < wanted:
        said.append(
            f"{settings.num_tokens:,} calibration tokens are few for regressions over {mla.widest:,} features: "
            f"{wanted:,} and more let each layer repair what was lost before it"
        )
    if settings.refine != "off":
        said.append("refinement takes as many layers at once as fit into half of the free memory")
    if settings.latent_bits is not None:
        said.append(
            f"refined and measured with latents as the cache latent-int{settings.latent_bits} holds them, the newest "
            f"{settings.latent_recent} tokens exact: losses are not comparable with those of exact latents"
        )
    if needs_source(settings.mix, settings.sampled):
        said.append(
            "while it writes calibration text, the whole source is in memory, in addition to the memory given here"
        )
    if mla.cache_values() >= gqa.cache_values():
        said.append(
            f"this cache is not smaller: {mla.cache_values()} values per token and layer, source {gqa.cache_values()}"
        )
    if gqa.num_key_value_heads > 1:
        said.append(_tensor_parallel(gqa, mla))
    return said


def _query_bias(mla: MlaGeometry) -> str:
    constant, fitted = mla.stock_attention_weights - mla.attention_weights, mla.attention_weights
    return (
        f"deepseek_v3 has no bias for queries: q_lora_rank {mla.stock_q_lora_rank} with a constant in it takes "
        f"{constant:,} weights a layer beside the attention's {fitted:,}, and no cache; --format transmla needs none, "
        "and convert --lossy makes a folder without biases, for all engines"
    )


def _tensor_parallel(gqa: GqaGeometry, mla: MlaGeometry) -> str:
    ranks = min(4, gqa.num_key_value_heads)
    return (
        f"tensor parallel: key/value heads are split over ranks, a latent is on every rank; "
        f"at {ranks} ranks {gqa.cache_values() // ranks} values per token and layer become {mla.cache_values()}"
    )


def _unknown(planned: Plan) -> list[str]:
    """Weights within the layers that the class does not have: biases that the config does not announce, for one."""
    layers, expected = planned.family.layers, planned.outline.tensors
    number = planned.gqa.num_hidden_layers
    found = []
    for name in planned.source.tensors:
        if name.startswith(f"{layers}.") and name not in expected and not name.endswith(_BUFFERS):
            index = name[len(layers) + 1 :].partition(".")[0]
            # layers behind the last one predict several tokens at once
            if index.isdigit() and int(index) < number:
                found.append(name)
    return found
