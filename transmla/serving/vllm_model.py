"""The classes of vLLM that run folders in the own form. Imported by vLLM alone, once it serves one."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from transmla.serving.vllm import ServedAttention, check_served


class LatentMixin:
    """What differs from a model whose attention vLLM recognises by itself."""

    model: Any
    text_config: Any
    cache_config: Any
    quant_config: Any
    logits_processor: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        settings = vllm_config.model_config
        devices = vllm_config.parallel_config.tensor_parallel_size
        check_served(settings.model, settings.hf_config, settings.max_model_len, devices)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        scaling = getattr(self.text_config, "logits_scaling", None)
        if scaling is not None and hasattr(self, "logits_processor"):  # Granite's, which vLLM takes from no config
            self.logits_processor.scale /= scaling

    def _create_attention_instances(self, prefix: str = "") -> None:
        """One `MLAAttention` for each layer of this process; it lies in the module that calls it."""
        for name, module in self.model.named_modules():
            if not isinstance(module, ServedAttention):
                continue
            # vLLM's attention takes a pair of product and bias from it
            module.kv_b_proj.return_bias = True
            module.attn = MLAAttention(
                num_heads=self.text_config.num_attention_heads,
                scale=module.scaling,
                qk_nope_head_dim=module.qk_nope_head_dim,
                qk_rope_head_dim=module.qk_rope_head_dim,
                v_head_dim=module.v_head_dim,
                q_lora_rank=None,
                kv_lora_rank=module.kv_lora_rank,
                kv_b_proj=module.kv_b_proj,
                cache_config=self.cache_config,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, f"model.{name}.attn"),
            )


class TransmlaForCausalLM(LatentMixin, TransformersForCausalLM):  # type: ignore[misc]
    """A model without experts."""


class TransmlaMoEForCausalLM(LatentMixin, TransformersMoEForCausalLM):  # type: ignore[misc]
    """A model with experts, which vLLM fuses."""
