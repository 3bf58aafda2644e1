"""The own form of a converted model: the source's transformers class with latent attention in it.

For models that stock deepseek_v3 cannot express. config.json is the source's with the sizes of the latent attention
around it; tensors keep the names of the source's class, but for those of the attention. There is no norm on the latent,
so nothing is folded: the form for inference is the form for training.

Shape legend: see transmla/maths/__init__.py. F values of all keys and values of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from transmla.checkpoint.companions import copy_companions
from transmla.checkpoint.destination import disk_errors
from transmla.checkpoint.provenance import write_provenance
from transmla.checkpoint.read import Source, open_source
from transmla.checkpoint.store import understood
from transmla.checkpoint.write import CheckpointWriter
from transmla.devices import release
from transmla.errors import UnsupportedError
from transmla.families import Family, rotary_dim
from transmla.geometry import GqaGeometry, MlaGeometry
from transmla.maths.attention import MlaWeights
from transmla.model.loading import register
from transmla.model.modeling_transmla import (
    TransmlaConfig,
    TransmlaForCausalLM,
    TransmlaForSequenceClassification,
    TransmlaModel,
)
from transmla.model.skeleton import skeleton
from transmla.progress import Progress
from transmla.targets.comparison import WITNESS_TOKENS, compare_logits
from transmla.targets.engines import OWN_MODEL_TYPE
from transmla.targets.stock import MODELING_FILE, modeling_source

MODEL_TYPE = OWN_MODEL_TYPE
ARCHITECTURE = TransmlaForCausalLM.__name__


def own_config(
    source: Mapping[str, Any],
    family: Family,
    gqa: GqaGeometry,
    mla: MlaGeometry,
    inv_freq_LM: Sequence[Sequence[float]],
    dtype: str,
    *,
    softmax_scale: float,
    softcap: float | None,
    biased: bool,
    encoded: bool,
    output_bias: bool,
) -> dict[str, Any]:
    """config.json of the converted folder, as a dict.

    source: complete config of the source, with the defaults of its class
    inv_freq_LM: rotary frequencies of each layer, in radians per position
    dtype:  of the weights: "float32", "bfloat16" or "float16"
    The others: see `TransmlaConfig`, and `GqaWeights` for `biased` and `encoded`.
    """
    # null as well, which the class would take for its default if it were left out
    kept = {key: value for key, value in source.items() if key not in _NOT_OF_THE_MODEL}
    kept |= {"dtype": dtype, "architectures": source.get("architectures")}
    classes = dict(_CLASSES)
    if CONFIG_MAPPING[family.model_type] in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        classes["AutoModelForSequenceClassification"] = TransmlaForSequenceClassification
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "auto_map": {auto: f"modeling_transmla.{made.__name__}" for auto, made in classes.items()},
        "text_config": kept,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "latent_inv_freq": [list(layer) for layer in inv_freq_LM],
        "latent_encoder": "features" if encoded else "input",
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "base_module": family.layers.rpartition(".")[0],
        "attention_module": family.attention,
        "output_projection": family.o_proj,
        "source_rotary_dim": rotary_dim(source, gqa.head_dim),
        "query_bias": biased and not encoded,
        "rope_bias": biased and not encoded,
        "output_bias": output_bias,
        "tie_word_embeddings": bool(source.get("tie_word_embeddings")),
        "bos_token_id": source.get("bos_token_id"),
        "eos_token_id": source.get("eos_token_id"),
        "pad_token_id": source.get("pad_token_id"),
        "dtype": dtype,
    }


# Auto class -> what it loads a folder with; the source's class must have such a head where there is one more
_CLASSES: dict[str, type] = {
    "AutoConfig": TransmlaConfig,
    "AutoModel": TransmlaModel,
    "AutoModelForCausalLM": TransmlaForCausalLM,
}
# names and paths of whoever saved the model, remote code, and what transformers adds to every config
_NOT_OF_THE_MODEL = frozenset(
    {"_name_or_path", "auto_map", "transformers_version", "torch_dtype", "dtype", "quantization_config"}
)


def own_attention(mla: MlaWeights, order_d: Tensor, turning: int = 0, factor: float = 1.0) -> dict[str, Tensor]:
    """Tensors of one attention block by their names in it, in the dtype of `mla`.

    order_d: places of the values of a head in the source's own layout
    turning: number of values of a head that turn, and `factor` that comes with turning: see `SourceLayer`
    """
    tensors = {
        "kv_b_proj.weight": torch.cat([mla.k_up_Hnr, mla.v_up_Hvr], dim=1).flatten(0, 1),
        "o_proj.weight": mla.o_DHv,
        "kv_a_proj_with_mqa.weight": torch.cat([mla.kv_down_rD, mla.k_rope_eD]),
    }
    if mla.o_bias_D is not None:
        tensors["o_proj.bias"] = mla.o_bias_D
    if mla.encoder is None:
        tensors["q_proj.weight"] = torch.cat([mla.q_nope_HnD, mla.q_rope_HeD], dim=1).flatten(0, 1)
        if mla.q_nope_bias_Hn is not None and mla.q_rope_bias_He is not None and mla.k_rope_bias_e is not None:
            tensors["q_proj.bias"] = torch.cat([mla.q_nope_bias_Hn, mla.q_rope_bias_He], dim=1).flatten()
            none_r = mla.k_rope_bias_e.new_zeros(len(mla.kv_down_rD))
            tensors["kv_a_proj_with_mqa.bias"] = torch.cat([none_r, mla.k_rope_bias_e])
        return tensors
    # the encoder gives heads in the source's layout and without the factor, the weights were made for others
    back_d = order_d.argsort()
    factor_d = torch.ones(len(order_d)).to(mla.k_up_Hnr)
    factor_d[:turning] = factor
    head_dim, value_dim = len(order_d), mla.v_up_Hvr.shape[1]
    down_kF = tensors["kv_a_proj_with_mqa.weight"]
    groups = down_kF.shape[1] // (head_dim + value_dim)
    keys_kGd = down_kF[:, : groups * head_dim].unflatten(1, (groups, head_dim))[..., back_d] * factor_d
    tensors["kv_a_proj_with_mqa.weight"] = torch.cat([keys_kGd.flatten(1), down_kF[:, groups * head_dim :]], dim=1)
    tensors["kv_b_proj.weight"] = torch.cat([mla.k_up_Hnr[:, back_d] * factor_d[:, None], mla.v_up_Hvr], dim=1).flatten(
        0, 1
    )
    tensors["q_rope_proj"] = mla.q_rope_HeD[..., back_d] * factor_d
    return tensors | {f"encoder.{name}": value for name, value in mla.encoder.items()}


def own_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a folder with this config.json; a tied head is none of them."""
    register()  # a class that nobody has loaded yet
    values = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "auto_map")}
    model = skeleton(TransmlaConfig(**values))
    tied = set(model.all_tied_weights_keys) if config.get("tie_word_embeddings") else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def open_own(folder: Path) -> Source:
    """The opened folder, if it has the own form and all tensors.

    Raises `UnsupportedError` for a folder of another form, and `SourceError` for one that cannot be read or lacks
    tensors.
    """
    source = open_source(folder)
    if source.config.get("model_type") != MODEL_TYPE:
        raise UnsupportedError(
            "this is not a folder in the form of its source's class",
            where=source.config_where,
            why=f"model_type is {source.config.get('model_type')!r}, not {MODEL_TYPE!r}",
            remedy="pass a folder that `transmla convert` has written in this form",
        )
    with understood(source.config_where):
        source.require(own_tensors(source.config))
    return source


@torch.no_grad()
def write_own(
    writer: CheckpointWriter,
    parent: Source,
    make: Callable[[], Any],
    sections: Mapping[str, Any],
    device: str,
    progress: Progress,
) -> None:
    """Write trained weights of a folder in the own form, and verify them; the caller commits the writer.

    writer:   of the new folder
    parent:   the folder that was trained, of which everything but the weights is kept
    make:     gives the trained model, float32 on the CPU, which nobody else holds
    sections: of the provenance file;  device: where the result is run
    progress: called as progress(stage, done, total, remark)

    Raises `VerificationError` if the written folder does not compute what the model computes, and `DestinationError` if
    it cannot be written or read back.
    """
    model = make()
    state, names = model.state_dict(), own_tensors(parent.config)
    stored = parent.dtype
    for number, name in enumerate(names):
        writer.add_as(name, state[name], getattr(torch, stored))
        progress("write", number + 1, len(names), "")
    writer.close_shards()
    # what a coded cache has to know was measured on other weights
    writer.write_json("config.json", {key: value for key, value in parent.config.items() if key != "latent_code"})
    writer.write_text(MODELING_FILE, modeling_source())
    copy_companions(parent, writer.partial)
    write_provenance(writer, **sections)
    ids_1T = torch.arange(WITNESS_TOKENS)[None] * 7 % int(parent.config["text_config"]["vocab_size"])
    wanted_TV = model(ids_1T, use_cache=False).logits[0]
    del model, state
    release(device)  # before another one is loaded to be compared with
    with disk_errors(writer.partial):
        found: Any = TransmlaForCausalLM.from_pretrained(
            str(writer.partial), dtype=torch.float32, local_files_only=True
        )
    found_TV = found.to(device).eval()(ids_1T.to(device), use_cache=False).logits[0].cpu()
    compare_logits(writer.partial, found_TV, wanted_TV, stored)
