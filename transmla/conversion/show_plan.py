"""What `transmla plan` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transmla.tables import columns, size
from transmla.targets.show_doctor import engines_table

if TYPE_CHECKING:
    from transmla.conversion.plan import Plan

CONTEXTS = {"4K": 4096, "32K": 32768, "128K": 131072}


def show_plan(plan: Plan, console: Console) -> None:
    gqa, mla = plan.gqa, plan.mla
    console.print(
        f"[bold]{escape(plan.resolved.name)}[/]  {plan.family.model_type}, {plan.source.format}", highlight=False
    )
    geometry = columns("", "source", "converted")
    geometry.add_row("attention", f"{gqa.kind}, {gqa.num_key_value_heads} KV heads", "MLA")
    geometry.add_row("layers, hidden size", f"{gqa.num_hidden_layers}, {gqa.hidden_size}", "same")
    geometry.add_row("query heads", str(gqa.num_attention_heads), "same")
    geometry.add_row("head_dim", str(gqa.head_dim), f"nope {mla.qk_nope_head_dim}, v {mla.v_head_dim}")
    geometry.add_row("kv_lora_rank + qk_rope_head_dim", "", f"{mla.kv_lora_rank} + {mla.qk_rope_head_dim}")
    if plan.recipe.budget is not None:
        geometry.add_row("increase of perplexity", "", f"at most {plan.recipe.budget:.1%}")
    if mla.stock_q_lora_rank:
        geometry.add_row("q_lora_rank", "", str(mla.stock_q_lora_rank))
    geometry.add_row("cached values per token and layer", str(gqa.cache_values()), str(mla.cache_values()))
    geometry.add_row("max_position_embeddings", "", f"{plan.max_position_embeddings:,}")
    geometry.add_row("weights", "", plan.dtype)
    console.print(geometry)
    if plan.splits:
        console.print(_splits_table(plan))
    console.print(_cache_table(plan))
    console.print("[dim]values per layer, bytes of all layers[/]", highlight=False)
    console.print(engines_table(plan.engines))
    console.print(
        f"needs at least {size(plan.memory_bytes)} of memory and {size(plan.disk_bytes)} of disk", highlight=False
    )
    for note in plan.notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)


def _splits_table(plan: Plan) -> Table:
    table = columns("latent + rope", "engines that run it")
    for split in plan.splits:
        table.add_row(f"{split.mla.kv_lora_rank} + {split.mla.qk_rope_head_dim}", "; ".join(split.engines))
    return table


def _cache_table(plan: Plan) -> Table:
    own = plan.cache[0].bytes_per_token
    table = columns("cache per token", "values", "bytes", "of source", *(f"at {name}" for name in CONTEXTS))
    for row in plan.cache:
        totals = (size(row.total_bytes(context)) for context in CONTEXTS.values())
        share = f"{row.bytes_per_token / own:.1%}"
        table.add_row(row.name, str(row.values_per_token), f"{row.bytes_per_token:,.0f}", share, *totals)
    return table
