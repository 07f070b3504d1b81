"""Feature extractors: any CNN of timm as a torch.fx graph of plain layers, cut behind its last feature map.

Teacher and student are built here. The graph form is what everything later stands on: batch norm is folded in it,
quantizers are put into it, ONNX is written from it.
"""

import copy
import difflib
import logging
import math
from collections.abc import Sequence

import timm
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from uadtool.errors import UadtoolError

DEFAULT_TEACHER = "tf_efficientnet_lite0"
REDUCTIONS = (4, 8, 16)
"""Feature maps are taken at these fractions of the input size (STFPM: "conv2_x, conv3_x, conv4_x" of a ResNet)."""
SIZE_STEP = 16
"""Of what ``train`` takes sides of images as multiples."""

POSITION_GRID = "position_grid"
"""Key in the ``meta`` of a vision transformer's graph: (height, width) of its position embedding."""

log = logging.getLogger("uadtool")


class PaddedConv2d(nn.Conv2d):
    """A convolution that first pads by constants (left, right, top, bottom).

    It replaces TensorFlow's "same" convolutions, whose padding depends on the input size, for one input size:
    torch.fx cannot trace the computation of the padding, and as constants it ends in ONNX's Conv itself.
    """

    pads: tuple[int, int, int, int]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self.pads))


class LayerNorm(nn.LayerNorm):
    """Of the last axis, in operations that TensorRT 8.5 has; runtimes with a kernel for it find it in these."""

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias


class Tracer(fx.Tracer):
    """Keeps our layers whole, and batch norms with a built-in activation (timm's BatchNormAct2d), until folded."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = (PaddedConv2d, LayerNorm, nn.BatchNorm2d)
        return isinstance(m, layers) or super().is_leaf_module(m, module_qualified_name)


def build_backbone(name: str, image_size: tuple[int, int], strides: Sequence[int] = REDUCTIONS) -> fx.GraphModule:
    """Build timm's ``name`` with random weights as a graph: image [N, 3, H, W] -> feature maps at these strides.

    Only layers that a feature map needs are in it. Parameter names are those of timm, of which some networks have the
    first dots as underscores.

    Raises:
        UadtoolError: timm has no such model, it has no feature maps at those strides, it cannot be traced, or a batch
            norm in it cannot be folded.
    """
    check_name(name)
    try:
        stages: list[int] = timm.create_model(name, features_only=True).feature_info.reduction()  # type: ignore
        indices = [stages.index(stride) for stride in strides]
        model = timm.create_model(name, features_only=True, out_indices=indices)
        _make_padding_constant(model, image_size)
        backbone = plain_graph(model, name)
        if not any(True for _ in backbone.parameters()):
            raise ValueError("timm takes its feature maps by hooks")
    except Exception as error:  # timm raises many types for models without pyramid features, torch.fx its own
        raise UadtoolError(f"{name!r} cannot serve as teacher, it is no CNN with feature maps at strides "
                           f"{tuple(strides)} that torch.fx can trace: {str(error).splitlines()[0]}") from error
    fold_batch_norm(copy.deepcopy(backbone).eval())  # what cannot be folded is refused now, not after training
    return backbone


def check_name(name: str) -> None:
    """Require that timm has a model of this name.

    Raises:
        UadtoolError: it has none.
    """
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5))
        raise UadtoolError(f"timm {timm.__version__} has no model {name!r}" + (f"; it has {near}" if near else ""))


def check_size(name: str, image_size: tuple[int, int], stride: int) -> None:
    """Require that both sides are multiples of the ``stride`` that ``name``, a teacher or a method, has.

    Raises:
        UadtoolError: they are not; it names a size that is.
    """
    if any(length % stride for length in image_size):
        step = math.lcm(stride, SIZE_STEP)
        near = max(1, round(image_size[0] / step)) * step
        raise UadtoolError(f"with {name!r} both sides of the image size must be multiples of {stride}; "
                           f"take --image-size {near}")


def plain_graph(model: nn.Module, name: str) -> fx.GraphModule:
    """Trace a model to a graph of plain layers: no identities, nothing that its result does not need, nothing in place.

    Raises:
        Exception: torch.fx raises many types for models that it cannot trace.
    """
    tracer = Tracer()
    graph = tracer.trace(model)
    network = fx.GraphModule(tracer.root, graph, class_name=name)
    remove_identities(network)
    graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    network.recompile()
    for module in network.modules():
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010 - no field of nn.Module for the type checker
    return network


def behind(backbone: fx.GraphModule, count: int) -> fx.GraphModule:
    """Cut off what gives the first ``count`` feature maps, in place: the last of these -> the other feature maps.

    What remains has the names that it had.

    Raises:
        UadtoolError: later feature maps need more than that one.
    """
    graph = backbone.graph
    image, *_, output = graph.nodes
    last = output.args[0][count - 1]
    with graph.inserting_before(last):
        last.replace_all_uses_with(graph.placeholder("features"))
    output.args = (output.args[0][count:],)
    graph.eliminate_dead_code()
    if image.users:
        raise UadtoolError(f"{type(backbone).__name__} cannot be cut behind feature map {count}: later layers read "
                           "earlier ones, too; take another network")
    graph.erase_node(image)
    backbone.delete_all_unused_submodules()
    backbone.recompile()
    return backbone


def remove_identities(network: fx.GraphModule) -> None:
    """Let the readers of each ``nn.Identity`` read its input, in place."""
    for node in list(network.graph.nodes):
        if node.op == "call_module" and isinstance(network.get_submodule(node.target), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)


@torch.no_grad()
def feature_shapes(backbone: fx.GraphModule, image_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(channels, height, width) of each feature map; leaves the backbone in evaluation mode."""
    return [(f.shape[1], f.shape[2], f.shape[3]) for f in backbone.eval()(torch.zeros(1, 3, *image_size))]


def _make_padding_constant(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Replace every convolution with dynamic "same" padding by one with constant padding for this input size."""
    same = {name: m for name, m in model.named_modules() if type(m).__name__ == "Conv2dSame"}
    sizes: dict[str, tuple[int, int]] = {}
    hooks = [m.register_forward_pre_hook(lambda _, inputs, name=name: sizes.update({name: inputs[0].shape[-2:]}))
             for name, m in same.items()]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, *image_size))
    for hook in hooks:
        hook.remove()
    for name, conv in same.items():
        pads: list[int] = []
        for axis in (1, 0):  # F.pad starts with the last axis
            size, stride = sizes[name][axis], conv.stride[axis]
            extent = (conv.kernel_size[axis] - 1) * conv.dilation[axis] + 1
            total = max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
            pads += [total // 2, total - total // 2]
        padded = PaddedConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, 0, conv.dilation,
                              conv.groups, conv.bias is not None)
        padded.load_state_dict(conv.state_dict())
        padded.pads = (pads[0], pads[1], pads[2], pads[3])
        model.set_submodule(name, padded)


def fold_batch_norm(backbone: fx.GraphModule) -> fx.GraphModule:
    """Fold each batch norm into the convolution before it, in place; a batch norm's built-in activation stays.

    The graph must be in evaluation mode: folding uses the running statistics.

    Raises:
        UadtoolError: a batch norm does not follow a convolution of which it is the only reader.
    """
    modules = dict(backbone.named_modules())
    for node in list(backbone.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before, norm = node.args[0], modules[node.target]
        conv = modules.get(before.target) if before.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d) or len(before.users) > 1:
            raise UadtoolError(f"batch norm {node.target} does not follow a convolution; this backbone is unsupported")
        fused = fuse_conv_bn_eval(conv, norm)
        backbone.set_submodule(before.target, fused)
        activation = getattr(norm, "act", nn.Identity())
        if isinstance(activation, nn.Identity):
            node.replace_all_uses_with(before)
            backbone.graph.erase_node(node)
        else:
            backbone.set_submodule(node.target, activation)
    backbone.delete_all_unused_submodules()
    backbone.recompile()
    return backbone


def normalization(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (of pixel values in 0..1, per RGB channel) that timm's ``name`` expects."""
    config = timm.get_pretrained_cfg(name)
    return (list(config.mean), list(config.std)) if config else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
