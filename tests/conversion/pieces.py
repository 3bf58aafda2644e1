"""A layer of a lively model twice: as Hugging Face runs it and as the converter reads it."""

from typing import Any

import torch
from torch import Tensor

from tests.families import lively_config, lively_model
from transmla.checkpoint.read import Source
from transmla.conversion.streams import Streams
from transmla.families import FAMILIES
from transmla.geometry import gqa_geometry
from transmla.model.layer import SourceLayer, build_layer
from transmla.model.skeleton import complete_config, skeleton
from transmla.model.source import SourceModel

CPU = torch.device("cpu")


def model_and_layer(index: int = 1, device: torch.device = CPU, **settings: Any) -> tuple[Any, SourceLayer]:
    """The model stays on the CPU, the layer is on the device. settings: those of `families.lively_config`"""
    config = lively_config(layers=2, vocab=97, **settings)
    model = lively_model(config)
    family, geometry, bare = (
        FAMILIES[config.model_type],
        gqa_geometry(config.to_dict(), "config.json"),
        skeleton(config),
    )
    tensors = model.get_submodule(family.layers)[index].state_dict()
    tensors = {name: value.to(device) for name, value in tensors.items()}
    return model, build_layer(family, bare, geometry, index, tensors)


def random_streams(
    windows: int = 4,
    tokens: int = 10,
    hidden: int = 48,
    heldout: int = 1,
    noise: float = 0.3,
    gap: int = 0,
    device: torch.device = CPU,
) -> Streams:
    """A source stream and a converted one that differs from it by noise. gap: positions that every second window, from
    the first one on, skips in its middle"""
    generator = torch.Generator().manual_seed(5)
    source_NTD = torch.randn(windows, tokens, hidden, generator=generator)
    converted_NTD: Tensor = source_NTD + noise * torch.randn(source_NTD.shape, generator=generator)
    positions_NT = torch.arange(tokens).repeat(windows, 1)
    positions_NT[::2, tokens // 2 :] += gap
    return Streams(source_NTD, converted_NTD, heldout, device, None, positions_NT=positions_NT)


def in_pieces(source: Source, ids_1T: Tensor) -> Tensor:
    """Logits [T, V] as the converter computes them, layer by layer."""
    geometry = gqa_geometry(complete_config(source.config), "config.json")
    found = SourceModel(source, FAMILIES[source.config["model_type"]], geometry, CPU)
    with torch.no_grad():
        (stream_TD,) = found.embed(ids_1T)
        for index in range(geometry.num_hidden_layers):
            layer = found.layer(index)
            stream_TD = layer.through(stream_TD, layer.attention)
        return found.ends(torch.float32).logits(stream_TD)
