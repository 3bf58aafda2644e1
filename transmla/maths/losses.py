"""What refinement minimises: distance of streams, distance of predictions.

Legend: T tokens (of any number of texts), D hidden_size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

# Rows of logits that fit into the caches of a CPU core: twice as fast as 512.
CHUNK = 128


def stream_error(found_TD: Tensor, target_TD: Tensor) -> Tensor:
    """Squared distance of each token's stream over the token's own energy, mean over tokens (method, section 4).

    What reads the stream is an RMSNorm, so an error counts relative to its token; otherwise a handful of tokens with
    massive activations would own the loss.
    """
    error_T = (found_TD - target_TD).square().mean(-1) / energy(target_TD)
    return error_T.mean()


def energy(stream_TD: Tensor) -> Tensor:
    """Mean square of each token [T], not quite zero: a token whose embedding is zero may stay so through all layers."""
    return stream_TD.square().mean(-1).clamp_min(torch.finfo(stream_TD.dtype).tiny)


def kl_divergence(found_TD: Tensor, target_TD: Tensor, head_VD: Tensor) -> Tensor:
    """KL(target || found) of the next-token distributions in nats, mean over tokens (Hinton et al., 1503.02531).

    found_TD, target_TD: behind the final norm, float32; only `found_TD` gets a gradient
    head_VD:             lm_head; the products run in its dtype, the softmax in float32

    Logits exist for a few tokens at a time: the gradient is computed along with the loss.
    """
    loss: Tensor = _Kl.apply(found_TD, target_TD, head_VD)  # type: ignore[no-untyped-call]
    return loss


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found_TD: Tensor, target_TD: Tensor, head_VD: Tensor) -> Tensor:
        grad_TD = torch.empty_like(found_TD)
        total = found_TD.new_zeros(())
        with torch.autocast(found_TD.device.type, enabled=False):
            for start in range(0, len(found_TD), CHUNK):
                part = slice(start, start + CHUNK)
                found, target = (
                    (x_TD[part].to(head_VD.dtype) @ head_VD.T).to(found_TD.dtype).log_softmax(-1)
                    for x_TD in (found_TD, target_TD)
                )
                likely = target.exp()
                total += (likely * (target - found)).sum()
                grad_TD[part] = (found.exp_() - likely).to(head_VD.dtype) @ head_VD
        ctx.save_for_backward(grad_TD / len(found_TD))
        return total / len(found_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grads[0], None, None
