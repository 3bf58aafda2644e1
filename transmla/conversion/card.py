"""README.md of a converted folder: what it is, how to load it, what it must not be used for."""

from __future__ import annotations

import html
import math
from typing import Any

from transmla.conversion.plan import Plan


def model_card(planned: Plan, sections: dict[str, Any]) -> str:
    """Markdown; sections are those of transmla.json."""
    gqa, mla, heldout = planned.gqa, planned.mla, sections["heldout"]
    name = shown(planned.resolved.name if planned.resolved.revision else planned.resolved.path.name)
    return f"""# {name}, converted to multi-head latent attention

Converted by transmla from {name}. {_refined(sections)} The licence is that of the source model.

| | source | this model |
|---|---|---|
| attention | {gqa.kind}, {gqa.num_key_value_heads} key/value heads of {gqa.head_dim} | MLA |
| `kv_lora_rank` + `qk_rope_head_dim` | | {mla.kv_lora_rank} + {mla.qk_rope_head_dim} |
| cached values per token and layer | {gqa.cache_values()} | {mla.cache_values()} ({planned.cache_ratio - 1:+.1%}) |
| perplexity, {heldout["num_windows"]} held-out calibration windows | {_perplexity(heldout["source"])} | \
{_perplexity(heldout["converted"])} |

{_STOCK if planned.form == "deepseek_v3" else _own(planned)}{_begin(sections)}- \
`transmla.json` says what this was made from, with which text, and the loss of every layer.
"""


def shown(name: str) -> str:
    """A name of a file or dataset in Markdown: one line, nothing that HTML or a table would take for its own."""
    return html.escape(" ".join(name.split()), quote=False).replace("|", r"\|").replace("`", "'")


_STOCK = """## Use

```python
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(FOLDER)                          # stock deepseek_v3 class, no remote code
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  # same function, latent cache, absorbed decode
```

## Limits

- For inference. The latent rows of `kv_a_proj_with_mqa` are about 1e-6 in size, because the norm that stock engines
  put on the latent has to act as a linear map; one step of an ordinary optimiser destroys them. `transmla unfold` makes
  a form that any trainer may train, `transmla fold` brings it back; `transmla heal` does both around a distillation.
"""


def _own(planned: Plan) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=False)  # left out, it asks, since it reads the config first
```

Without code from the folder: `transmla.load(FOLDER)`, or the same lines without `trust_remote_code` after
`transmla.register()`.

This is the {planned.family.model_type} class of transformers with latent attention in place of its own
(`modeling_transmla.py`): it caches the latent and decodes in latent space.

## Limits

- Engines other than transformers have no class for it. deepseek_v3, which they have, cannot express the source's
  {", ".join(planned.obstacles) or "class, which was asked for"}.
- Its weights are of ordinary size, so any trainer may train it; `transmla heal` distils it from the source.
"""


def _refined(sections: dict[str, Any]) -> str:
    # blocks that did not gain are as they were
    blocks = [block for block in sections["distilled_blocks"] if block["loss_after"] < block["loss_before"]]
    if not blocks:
        return "Closed form, no gradient steps."
    tokens = blocks[-1]["windows"] * sections["calibration"]["window"]
    steps = sum(block["steps"] for block in blocks)
    return f"Attention weights refined against the source on {tokens:,} tokens of calibration text ({steps:,} steps)."


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
