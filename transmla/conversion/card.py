"""README.md of a converted folder: what it is, how to run it, what it must not be used for."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from typing import Any

from transmla.conversion.plan import Plan
from transmla.conversion.target import planned_config
from transmla.targets.engines import OWN, OWN_MODEL_TYPE, PLUGIN, STOCK, command_of
from transmla.text.mixes import parse_mix

_TAGS = ("transmla", "mla", "multi-head-latent-attention", "kv-cache")
# shipped texts that are parts of public data sets
_DATASETS = {"wikitext": "Salesforce/wikitext"}


def model_card(planned: Plan, sections: dict[str, Any]) -> str:
    """Markdown behind YAML; sections are those of transmla.json."""
    gqa, mla, heldout = planned.gqa, planned.mla, sections["heldout"]
    name = shown(planned.resolved.name if planned.resolved.revision else planned.resolved.path.name)
    folded = planned.form == "deepseek_v3"
    return f"""{_front_matter(planned)}
# {name}, converted to multi-head latent attention

Converted by transmla from {name}. {_refined(sections)}{_rounded(planned)} The licence is that of the source model.

{_INFERENCE if folded else ""}| | source | this model |
|---|---|---|
| attention | {gqa.kind}, {gqa.num_key_value_heads} key/value heads of {gqa.head_dim} | MLA |
| `kv_lora_rank` + `qk_rope_head_dim` | | {mla.kv_lora_rank} + {mla.qk_rope_head_dim} |
| cached values per token and layer | {gqa.cache_values()} | {mla.cache_values()} ({planned.cache_ratio - 1:+.1%}) |
| perplexity, {heldout["num_windows"]} held-out calibration windows | {_perplexity(heldout["source"])} | \
{_perplexity(heldout["converted"])} |

## Cache

{_cache(planned)}

## Use

{_commands(planned)}

{_python(folded)}

## Limits

{_limits(planned)}{_whole(planned)}{_begin(sections)}- Perplexity on calibration windows says little of tasks, other \
texts and long contexts: `transmla eval` measures them.
- `transmla.json` says what this was made from, with which text, and the loss of every layer.
"""


def shown(name: str) -> str:
    """A name of a file or dataset in Markdown: one line, nothing that HTML or a table would take for its own."""
    return html.escape(" ".join(name.split()), quote=False).replace("|", r"\|").replace("`", "'")


def _front_matter(planned: Plan) -> str:
    """YAML: what the hub reads. JSON strings are YAML strings."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if planned.resolved.revision:
        lines += [f"base_model: {json.dumps(planned.resolved.name)}", "base_model_relation: finetune"]
    lines += _licence(planned.resolved.path)
    lines += ["tags:", *(f"- {tag}" for tag in _TAGS)]
    names = [part.name for part in parse_mix(planned.recipe.mix, "--calibration")]
    hub = [_DATASETS.get(name, name) for name in names]
    if found := [name for name in hub if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()]:
        lines += ["datasets:", *(f"- {json.dumps(name)}" for name in dict.fromkeys(found))]
    return "\n".join([*lines, "---"])


def _licence(source: Path) -> list[str]:
    """As the source's own card says it."""
    card = source / "README.md"
    text = card.read_text("utf-8", errors="replace") if source.is_dir() and card.is_file() else ""
    head = text.partition("---\n")[2].partition("\n---")[0] if text.startswith("---\n") else ""
    found = [line for line in head.splitlines() if re.match(r"license(_name|_link)?: *\S", line)]
    return found or ["license: other", "license_name: that-of-the-source-model"]


def _cache(planned: Plan) -> str:
    rows, context = planned.cache, 32768
    shown = [*rows[:3], rows[-1]]
    lines = ["| cache | bytes per token | of source | a context of 32K |", "|---|---:|---:|---:|"]
    for row in shown:
        label = f"**{row.name}**" if row is rows[-1] else row.name
        share = row.bytes_per_token / rows[0].bytes_per_token
        size = row.total_bytes(context) / 2**20
        lines.append(f"| {label} | {row.bytes_per_token:,.0f} | {share:.1%} | {size:,.1f} MiB |")
    return "\n".join(lines)


def _commands(planned: Plan) -> str:
    lines = ["| engine | command |", "|---|---|"]
    for verdict in planned.engines:
        if verdict.accepts and verdict.engine not in (STOCK, OWN):
            lines.append(f"| {verdict.engine} | `{command_of(verdict.engine, planned_config(planned))}` |")
    if planned.form == OWN_MODEL_TYPE and any(
        verdict.accepts and verdict.engine in PLUGIN for verdict in planned.engines
    ):
        lines += ["", "vLLM needs `pip install PATH/TO/transmla` (a checkout) beside it."]
    refusing = [verdict.engine for verdict in planned.engines if not verdict.accepts]
    refused = f"\n\nNot run by {', '.join(refusing)}; `transmla doctor OUT` says why." if refusing else ""
    return (f"OUT is this folder.\n\n{chr(10).join(lines)}" if len(lines) > 2 else "") + refused


def _python(folded: bool) -> str:
    if folded:
        return """```python
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("OUT")                          # stock deepseek_v3 class, no remote code
AutoModelForCausalLM.from_pretrained("OUT", trust_remote_code=True)  # same function, latent cache, absorbed decode
```"""
    return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained("OUT", trust_remote_code=True)
AutoTokenizer.from_pretrained("OUT", trust_remote_code=False)  # left out, it asks, since it reads the config first
```

Without code from the folder: `transmla.load("OUT")`, or the same lines without `trust_remote_code` after
`transmla.register()`."""


_INFERENCE = """> **For inference only.** Do not train this folder, nor a LoRA adapter on it: one step of an ordinary
> optimiser wrecks it, and the stock class does not say so. `transmla unfold OUT TRAIN` makes a form that any
> trainer may train, `transmla fold TRAINED OUT2` brings it back; `transmla heal` does both around a distillation.

"""


_LEFT_OUT = (
    "- The attention of the source has biases and this model has none (`--lossy`), so that engines without them run\n"
    "  it. What they add is read from the input, of which one direction is nearly constant: no size makes that exact.\n"
)


def _limits(planned: Plan) -> str:
    if planned.form == "deepseek_v3":
        folded = (
            "- The latent rows of `kv_a_proj_with_mqa` are about 1e-5 in size, because the norm that stock engines\n"
            "  put on the latent has to act as a linear map: so it must not be trained. Prefer bfloat16 to float16.\n"
        )
        return folded + (_LEFT_OUT if planned.recipe.lossy else "")
    return (
        f"- This is the {planned.family.model_type} class of transformers with latent attention in place of its own\n"
        "  (`modeling_transmla.py`). Engines other than transformers and, with transmla installed, vLLM have no\n"
        "  class for it; deepseek_v3, which they have, cannot express the source's "
        f"{', '.join(planned.obstacles) or 'class, which was asked for'}.\n"
        "- Its weights are of ordinary size, so any trainer may train it; `transmla heal` distils it from the source.\n"
    )


def _refined(sections: dict[str, Any]) -> str:
    # blocks that did not gain are as they were
    blocks = [block for block in sections["distilled_blocks"] if block["loss_after"] < block["loss_before"]]
    if not blocks:
        return "Closed form, no gradient steps."
    tokens = blocks[-1]["windows"] * sections["calibration"]["window"]
    steps = sum(block["steps"] for block in blocks)
    return f"Attention weights refined against the source on {tokens:,} tokens of calibration text ({steps:,} steps)."


def _rounded(planned: Plan) -> str:
    """What it was refined for, if that is a packed cache."""
    bits = planned.recipe.latent_bits
    if bits is None:
        return ""
    return f" Latents were rounded as in a cache `latent-int{bits}`, in the refinement and in the perplexity below."


def _whole(planned: Plan) -> str:
    whole = planned.source.whole
    if whole is None:
        return ""
    return f"- This is the language model of a {whole.model_type} alone, which takes text and no pictures or sound.\n"


def _begin(sections: dict[str, Any]) -> str:
    """What the calibration windows began with, of a tokenizer that puts something first."""
    begin = sections["calibration"]["begin"]
    if not begin["tokens"]:
        return ""
    which = {"half": "Half of the calibration windows of plain text", "all": "All calibration windows"}[
        begin["windows"]
    ]
    ids = ", ".join(map(str, begin["tokens"]))
    return f"- {which} began with what the tokenizer puts first (token {ids}); so should prompts.\n"


def _perplexity(nats: float) -> str:
    # a wrecked conversion is still described
    return f"{math.exp(nats):.3f}" if nats < 100 else f"exp({nats:.0f})"
