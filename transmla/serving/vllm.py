"""The plugin that vLLM loads: what a folder in the own form is to it. Nothing here needs vLLM but `register`.

vLLM runs the source's class, as its modeling backend for transformers does with any class; queries, latent and rotary
key are made here, and vLLM's latent attention caches and reads them (`vllm_model.py`).

Shape legend: see transmla/maths/__init__.py. T tokens of all requests of a step.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from transmla.model.modeling_transmla import ConvertedAttention, TransmlaConfig, TransmlaModel
from transmla.targets.engines import attention_window

logger = logging.getLogger(__name__)
DENSE, EXPERTS = "TransmlaForCausalLM", "TransmlaMoEForCausalLM"


def register() -> None:
    """Tell vLLM of folders in the own form: their config, the sizes of their cache, and the classes that run them.

    vLLM calls it in each of its processes (entry point `vllm.general_plugins`), whichever model it serves: a release
    whose insides have moved gets a warning, since it serves all other models.
    """
    try:
        from transformers import AutoConfig, AutoModel
        from vllm import ModelRegistry
        from vllm.transformers_utils import model_arch_config_convertor as sizes

        class LatentSizes(sizes.ModelArchConfigConvertorBase):  # type: ignore[misc]
            """One latent and one rotary key per token, where the source's config has heads."""

            def is_deepseek_mla(self) -> bool:
                return True

        sizes.MODEL_ARCH_CONFIG_CONVERTORS[ServedConfig.model_type] = LatentSizes
    except (ImportError, AttributeError) as error:
        logger.warning("transmla: this vLLM does not serve folders of model_type transmla (%s)", error)
        return
    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    AutoModel.register(ServedConfig, ServedModel, exist_ok=True)
    for name in (DENSE, EXPERTS):
        ModelRegistry.register_model(name, f"transmla.serving.vllm_model:{name}")


class ServedConfig(TransmlaConfig):
    """The config of a folder in the own form, flat: vLLM looks for the sizes of the cache among those of the text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.text_config is not None and num_experts(self.text_config):
            self.architectures = [EXPERTS]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Itself: what it does not set is that of the source."""
        return self


def num_experts(config: Any) -> int:
    """Experts of a layer by the source's config, 0 if it has none."""
    return int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)


class ServedAttention(ConvertedAttention):
    """Queries, latent and rotary key; cache, kernels and the absorbed products are vLLM's.

    attn: vLLM's `MLAAttention` of the layer; it takes queries [T, H, n + e], latents [T, r], rotary keys [T, 1, e] and
          the shape of its output, [T, H v]
    """

    attn: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        """Output of the attention block [1, T, D]."""
        q_nope_1HTn, q_rot_1HTe, key_11Tk = self.project(hidden_states, position_embeddings)
        q_THq = torch.cat((q_nope_1HTn, q_rot_1HTe), dim=-1)[0].transpose(0, 1)
        latent_Tr, rope_Te = key_11Tk[0, 0].split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        shape = (q_THq.shape[0], q_THq.shape[1] * self.v_head_dim)
        return self.o_proj(self.attn(q_THq, latent_Tr, rope_Te[:, None], output_shape=shape)[None]), None


class ServedModel(TransmlaModel):
    """The source's class without its head, with attention that vLLM serves."""

    config_class = ServedConfig
    attention = ServedAttention

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the source's class; vLLM compiles for the arguments that are named here."""
        return super().forward(input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs)


def check_served(model: str, config: Any, max_model_len: int, tensor_parallel_size: int) -> None:
    """Raises `ValueError` for what vLLM's latent attention cannot do.

    model:         the name that messages have;  config: `ServedConfig`
    max_model_len: tokens of the longest request
    """
    if config.softcap is not None:
        raise ValueError(
            f"transmla: {model} caps its attention scores at {config.softcap:g}, and vLLM's latent attention caps "
            "none; run it with transformers"
        )
    window = attention_window(config.text_config.to_dict())
    if window is not None and max_model_len > window:
        raise ValueError(
            f"transmla: layers of {model} attend to the last {window} tokens only, and vLLM's latent attention to all; "
            f"serve it with --max-model-len {window}, or run it with transformers"
        )
    if tensor_parallel_size > 1:
        raise ValueError(
            f"transmla: {model} cannot be divided among {tensor_parallel_size} devices, since its attention has one "
            "latent for all heads and is not written in parts; leave out --tensor-parallel-size"
        )
