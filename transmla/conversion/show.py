"""The summary that `transmla convert` ends with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Console

from transmla.tables import columns, size

if TYPE_CHECKING:
    from transmla.conversion.distil import BlockReport
    from transmla.conversion.flow import ConversionReport


def show_conversion(report: ConversionReport, console: Console, peak_memory: int | None = None) -> None:
    """peak_memory: of the process, in bytes; None: not known"""
    gqa, mla, heldout = report.plan.gqa, report.plan.mla, report.heldout
    table = columns("", "source", "converted", "")
    values = (gqa.cache_values(), mla.cache_values())
    table.add_row("cached values per token and layer", *map(str, values), f"{report.plan.cache_ratio - 1:+.1%}")
    rows = report.plan.cache
    table.add_row(
        "cache bytes per token, bf16", f"{rows[0].bytes_per_token:,.0f}", f"{rows[-1].bytes_per_token:,.0f}", ""
    )
    for row in rows[1:3]:
        table.add_row(f"  {row.name}", f"{row.bytes_per_token:,.0f}", "", f"{_share(row, rows[0]):+.1%}")
    table.add_row(
        f"perplexity, {heldout.num_windows} held-out calibration window{'s' if heldout.num_windows != 1 else ''}",
        f"{math.exp(heldout.source):.3f}",
        f"{math.exp(heldout.converted):.3f}",
        f"x{math.exp(heldout.converted - heldout.source):.3f}",
    )
    console.print(table)
    last = report.layers[-1]
    refined = {
        f"refined, layers {block.first_layer}-{block.last_layer}": _refined(block, block is report.blocks[-1])
        for block in report.blocks
    }
    lost = [layer.query_loss for layer in report.layers if layer.query_loss is not None]
    narrow = (
        {f"queries, rank {mla.q_lora_rank}": f"{sum(lost) / len(lost):.2%} of their energy dropped"} if lost else {}
    )
    facts = {
        **_searched(report),
        **_split(report),
        "rope_theta": _theta(report),
        "stream error": f"{last.stream_loss_fitted:.2%} fitted windows, {last.stream_loss_heldout:.2%} held out",
        **narrow,
        **refined,
        **_rounded(report),
        "verified": f"{_form(report)}, relative error {report.verification.relative_error:.1e}",
        "calibration": f"{report.num_calibration_tokens:,} tokens of {report.plan.recipe.mix}{_begin(report)}",
        **_cost(report, peak_memory),
        "written": f"{report.destination}  ({size(report.written_bytes)}, {report.plan.dtype})",
    }
    for name, value in facts.items():
        console.print(f"{name:<24} {value}", highlight=False, markup=False, soft_wrap=True)


def _refined(block: BlockReport, last: bool) -> str:
    what = "KL in nats" if last else "stream error"
    found = f"held-out {what} {block.loss_before:.4f} -> {block.loss_after:.4f}, {block.steps} steps"
    if block.steps < block.planned:
        found += f" of {block.planned}, until the loss or a gradient was not finite"
    return found if block.taken else f"{found}; discarded, since it is no better"


def _rounded(report: ConversionReport) -> dict[str, str]:
    """Where it was refined for a packed cache."""
    bits = report.plan.recipe.latent_bits
    if bits is None:
        return {}
    return {"latents": f"rounded as in a cache latent-int{bits}, in the refinement and the perplexity here"}


def _cost(report: ConversionReport, peak_memory: int | None) -> dict[str, str]:
    if peak_memory is None:
        return {"time": f"{report.seconds:.0f} s"}
    return {"time, peak memory": f"{report.seconds:.0f} s, {size(peak_memory)}"}


def _begin(report: ConversionReport) -> str:
    """Where it is not the usual half of the windows."""
    which = {"half": "", "all": "all", "none": "no"}[report.plan.recipe.begin]
    return f", {which} windows behind a begin token" if which else ""


def _searched(report: ConversionReport) -> dict[str, str]:
    """The latent that was searched for, and what each size that was tried came to."""
    if not report.tried:
        return {}
    mla, budget = report.plan.mla, report.plan.recipe.budget
    tried = sorted(report.tried, key=lambda one: one.kv_lora_rank)
    ratios = ", ".join(f"{one.kv_lora_rank} x{one.ratio:.3f}" for one in tried)
    return {"latent + rope": f"{mla.kv_lora_rank}+{mla.qk_rope_head_dim}, within {budget:.1%}; tried {ratios}"}


def _split(report: ConversionReport) -> dict[str, str]:
    """The division of the cache that was chosen, and the others."""
    if not report.splits:
        return {}
    chosen = report.plan.mla.qk_rope_head_dim
    ordered = sorted(report.splits, key=lambda one: (one.qk_rope_head_dim != chosen, one.loss))
    sizes = [f"{one.kv_lora_rank}+{one.qk_rope_head_dim} {one.loss:.2%}" for one in ordered]
    return {"latent + rope": f"{sizes[0]} error of the attention; {', '.join(sizes[1:])}".rstrip("; ")}


def _share(row: Any, base: Any) -> float:
    return float(row.bytes_per_token / base.bytes_per_token - 1)


def _theta(report: ConversionReport) -> str:
    if report.theta is None:
        return "frequencies of each layer, chosen from the source's"
    return f"{report.theta:g}" + (" (chosen by measured error)" if report.theta_losses else "")


def _form(report: ConversionReport) -> str:
    """The class that computed the same from the written folder."""
    if report.plan.form == "deepseek_v3":
        return "stock deepseek_v3 class"
    return f"{report.plan.family.model_type} class with latent attention"
