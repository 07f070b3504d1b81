"""Encoders: a timm CNN or vision transformer as a torch.fx graph, from an image to feature maps."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, fx, nn

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.backbones import (
    POSITION_GRID,
    LayerNorm,
    build_backbone,
    check_name,
    check_size,
    plain_graph,
)

TRANSFORMERS = ("vision_transformer", "deit")
"""timm's modules of plain vision transformers."""


def build_encoder(name: str, image_size: tuple[int, int], strides: Sequence[int]) -> fx.GraphModule:
    """Build timm's ``name`` with random weights as a graph: image [N, 3, H, W] -> feature maps, finest first.

    A CNN gives feature maps at these strides. A vision transformer, ``vit_*`` or ``deit_*``, gives two maps at the
    stride of its patches: the means of the lower and of the upper half of its middle layers, without class and
    register tokens. Parameters have timm's names.

    Raises:
        UadtoolError: as ``build_backbone``, or the image size is not a multiple of the largest stride.
    """
    check_name(name)
    if timm.models.is_model_in_modules(name, TRANSFORMERS):
        return _build_transformer(name, image_size)
    encoder = build_backbone(name, image_size, strides)
    check_size(name, image_size, strides[-1])
    return encoder


def _build_transformer(name: str, image_size: tuple[int, int]) -> fx.GraphModule:
    network: Any = timm.create_model(name, img_size=image_size, dynamic_img_size=False)
    check_size(name, image_size, network.patch_embed.patch_size[0])
    network.patch_embed.img_size = None  # keeps the check of the size out of the graph
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Dropout):
            network.set_submodule(path, nn.Identity())
        elif isinstance(module, nn.LayerNorm):
            norm = LayerNorm(module.normalized_shape, module.eps)
            norm.load_state_dict(module.state_dict())
            network.set_submodule(path, norm)
        elif hasattr(module, "fused_attn"):
            module.fused_attn = False
    try:
        traced = plain_graph(_MiddleLayers(network), name)
    except Exception as error:  # torch.fx raises many types
        raise UadtoolError(f"{name!r} cannot serve as teacher: torch.fx cannot trace it: "
                           f"{str(error).splitlines()[0]}") from error
    for node in traced.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = str(node.target).removeprefix("network.")
    encoder = fx.GraphModule(traced.get_submodule("network"), traced.graph, class_name=name)
    encoder.meta[POSITION_GRID] = network.patch_embed.grid_size
    return encoder


class _MiddleLayers(nn.Module):
    """Image -> means of the patch tokens of the lower and of the upper middle layers, as maps.

    The middle excludes the first and the last sixth, as in Dinomaly: layers 3 to 10 of 12.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        depth = len(network.blocks)
        self.layers = list(range(depth // 6, depth - depth // 6))

    def forward(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.network.forward_intermediates(
            image, indices=self.layers, stop_early=True, intermediates_only=True)
        half = len(maps) // 2
        return [torch.stack(group).mean(0) for group in (maps[:half], maps[half:])]
