"""From the last hidden states of a model to its logits: lm_head, and what some families do around it.

Legend: N tokens of any number of texts, D hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla.maths.attention import with_one


@dataclass(frozen=True)
class Head:
    """lm_head as one matrix.

    weight_VD: [V, D], or [V, D + 1] where it has a bias, which is the last column
    scale:     what logits are multiplied with
    softcap:   logits are softcap * tanh(logit / softcap) (Gemma 2, 2408.00118, section 2); None: as they are
    biased:    whether there is a bias
    """

    weight_VD: Tensor
    scale: float = 1.0
    softcap: float | None = None
    biased: bool = False

    def inputs(self, normed_ND: Tensor) -> Tensor:
        """What `weight_VD` is multiplied with, from what the final norm gives."""
        read_ND = with_one(normed_ND) if self.biased else normed_ND
        return read_ND if self.scale == 1.0 else read_ND * self.scale

    def capped(self, logits_NV: Tensor) -> Tensor:
        """Logits as the model gives them."""
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)

    def logits(self, normed_ND: Tensor) -> Tensor:
        """From what the final norm gives, in the dtype of the weight or that of autocast."""
        return self.capped(torch.nn.functional.linear(self.inputs(normed_ND).to(self.weight_VD.dtype), self.weight_VD))


def head_of(model: Any) -> Head:
    """The head of a transformers causal language model."""
    values = model.config.get_text_config().to_dict()
    lm_head = model.get_output_embeddings()
    weight_VD = lm_head.weight
    if lm_head.bias is not None:
        weight_VD = torch.cat([weight_VD, lm_head.bias[:, None]], dim=1)
    return Head(weight_VD, logit_scale(values), values.get("final_logit_softcapping"), lm_head.bias is not None)


def logit_scale(config: Mapping[str, Any]) -> float:
    """What logits are multiplied with, before they are capped."""
    return float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
