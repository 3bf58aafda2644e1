"""Speculative decoding in transformers: the converted model drafts for its source, and the source for it.

Greedy output does not depend on the draft, so every verification step (several query tokens against a filled cache,
rejected ones cropped away) has to compute what one-by-one decoding computes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import transmla
from transmla.model.loading import load_any, load_tokenizer

PROMPTS = ["Once upon a time, there was a", "The dog was sad because", "Lily and Tom"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speculative") / "mla"
    transmla.convert("smoke", folder)
    return folder


def greedy(model: Any, ids: torch.Tensor, **kwargs: Any) -> list[int]:
    with torch.no_grad():
        found: torch.Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, pad_token_id=0, **kwargs
        )
    return found[0].tolist()


class Counting:
    """How often a model was called with how many tokens."""

    def __init__(self, model: Any) -> None:
        self.widths: list[int] = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.widths.append(kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("stock", [False, True], ids=["own class", "stock class"])
@pytest.mark.parametrize("converted_drafts", [True, False])
def test_the_draft_does_not_change_the_text(converted: Path, stock: bool, converted_drafts: bool) -> None:
    latent: Any = (
        AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32) if stock
        else transmla.load(converted, dtype=torch.float32)
    )  # fmt: skip
    source = load_any("stories260k", dtype=torch.float32)
    target, draft = (source, latent) if converted_drafts else (latent, source)
    tokenizer, counted = load_tokenizer("stories260k"), Counting(target)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = greedy(target, ids)
        counted.widths.clear()
        assert greedy(target, ids, assistant_model=draft) == alone
        # fewer steps than tokens: drafts were checked several at once, and some of them were right
        assert max(counted.widths[1:]) > 1 and len(counted.widths) < len(alone) - ids.shape[1]
