"""Feature extractors: a timm CNN as a torch.fx graph of plain layers that ends at its last feature map.

Teacher and student are built here. All later steps use the graph: it gets batch norm folded and quantizers inserted,
and ONNX is written from it.
"""

import copy
import difflib
import math
from collections.abc import Sequence

import timm
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from uadtool.errors import UadtoolError
from uadtool.lab.detectors.patch_memory import PatchMemory

DEFAULT_TEACHER = "tf_efficientnet_lite0"
REDUCTIONS = (4, 8, 16)
"""Strides of the feature maps (STFPM: "conv2_x, conv3_x, conv4_x" of a ResNet)."""
SIZE_STEP = 16
"""``train`` accepts image sides that are multiples of this."""
POSITION_GRID = "position_grid"
"""Key in the ``meta`` of a vision transformer's graph: (height, width) of its position embedding."""


class PaddedConv2d(nn.Conv2d):
    """A convolution that first pads by constants (left, right, top, bottom).

    It replaces TensorFlow's "same" convolutions, whose padding depends on the input size. torch.fx cannot trace the
    computation of the padding; constants become part of ONNX's Conv.
    """

    pads: tuple[int, int, int, int]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self.pads))


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, in operations that TensorRT 8.5 has. Other runtimes fuse them to their kernel."""

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias


class Tracer(fx.Tracer):
    """Keeps our layers, and batch norms with a built-in activation (timm's BatchNormAct2d), as single modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = (PaddedConv2d, LayerNorm, PatchMemory, nn.BatchNorm2d)
        return isinstance(m, layers) or super().is_leaf_module(m, module_qualified_name)


def traced(module: nn.Module) -> fx.GraphModule:
    """The module as a graph that shares its layers and buffers; a new one, even if it is one already."""
    graph = copy.deepcopy(module.graph) if isinstance(module, fx.GraphModule) else Tracer().trace(module)
    return fx.GraphModule(module, graph, class_name=type(module).__name__)


def build_backbone(name: str, image_size: tuple[int, int], strides: Sequence[int] = REDUCTIONS) -> fx.GraphModule:
    """Build timm's ``name`` with random weights as a graph: image [N, 3, H, W] -> feature maps at these strides.

    The graph has only the layers that a feature map needs. Parameters have timm's names; in some networks the first
    dots are underscores.

    Raises:
        UadtoolError: timm has no such model, the model has no feature maps at those strides, it cannot be traced, or
            one of its batch norms cannot be folded.
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
    except Exception as error:  # timm and torch.fx raise many types
        raise UadtoolError(f"{name!r} cannot serve as teacher: it is not a CNN with feature maps at strides "
                           f"{tuple(strides)} that torch.fx can trace: {str(error).splitlines()[0]}") from error
    fold_batch_norm(copy.deepcopy(backbone).eval())  # refuse an unsuitable network before training, not after
    return backbone


def check_name(name: str) -> None:
    """Require that timm has a model of this name.

    Raises:
        UadtoolError: timm has no such model; the message names similar models.
    """
    if not timm.is_model(name):
        similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5))
        raise UadtoolError(f"timm {timm.__version__} has no model {name!r}"
                           + (f"; it has {similar}" if similar else ""))


def check_size(name: str, image_size: tuple[int, int], stride: int) -> None:
    """Require that both sides are multiples of the ``stride`` of ``name``, a teacher or a method.

    Raises:
        UadtoolError: they are not; the message names a valid size.
    """
    if any(length % stride for length in image_size):
        step = math.lcm(stride, SIZE_STEP)
        nearest = max(1, round(image_size[0] / step)) * step
        raise UadtoolError(f"with {name!r} both sides of the image size must be multiples of {stride}; "
                           f"take --image-size {nearest}")


def plain_graph(model: nn.Module, name: str) -> fx.GraphModule:
    """Trace a model to a graph of plain layers, without identities, dead code and in-place activations.

    Raises:
        Exception: torch.fx cannot trace the model; it raises many types.
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
            setattr(module, "inplace", False)  # noqa: B010 - not a field of nn.Module for the type checker
    return network


def cut_after(backbone: fx.GraphModule, count: int) -> fx.GraphModule:
    """Remove the layers of the first ``count`` feature maps, in place. The last of these becomes the input.

    The remaining layers keep their names.

    Raises:
        UadtoolError: later feature maps need other inputs than that feature map.
    """
    graph = backbone.graph
    image, *_, output = graph.nodes
    last = output.args[0][count - 1]
    with graph.inserting_before(last):
        last.replace_all_uses_with(graph.placeholder("features"))
    output.args = (output.args[0][count:],)
    graph.eliminate_dead_code()
    if image.users:
        raise UadtoolError(f"{type(backbone).__name__} cannot be cut after feature map {count}: later layers also read "
                           "earlier ones; take another network")
    graph.erase_node(image)
    backbone.delete_all_unused_submodules()
    backbone.recompile()
    return backbone


def remove_identities(network: fx.GraphModule) -> None:
    """Remove every ``nn.Identity``, in place."""
    for node in list(network.graph.nodes):
        if node.op == "call_module" and isinstance(network.get_submodule(node.target), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)


@torch.no_grad()
def feature_shapes(backbone: fx.GraphModule, image_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(channels, height, width) of each feature map; leaves the backbone in evaluation mode."""
    shapes = [features.shape for features in backbone.eval()(torch.zeros(1, 3, *image_size))]
    return [(channels, height, width) for _, channels, height, width in shapes]


def _make_padding_constant(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Replace every convolution with dynamic "same" padding by a ``PaddedConv2d`` for this input size."""
    same_convs = {name: module for name, module in model.named_modules() if type(module).__name__ == "Conv2dSame"}
    sizes: dict[str, tuple[int, int]] = {}
    hooks = [conv.register_forward_pre_hook(lambda _, inputs, name=name: sizes.update({name: inputs[0].shape[-2:]}))
             for name, conv in same_convs.items()]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, *image_size))
    for hook in hooks:
        hook.remove()
    for name, conv in same_convs.items():
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

    The graph must be in evaluation mode, because folding uses the running statistics.

    Raises:
        UadtoolError: a batch norm does not follow a convolution, or is not its only reader.
    """
    modules = dict(backbone.named_modules())
    for node in list(backbone.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        conv_node, norm = node.args[0], modules[node.target]
        conv = modules.get(conv_node.target) if conv_node.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d) or len(conv_node.users) > 1:
            raise UadtoolError(f"batch norm {node.target} does not follow a convolution; this backbone is unsupported")
        backbone.set_submodule(conv_node.target, fuse_conv_bn_eval(conv, norm))
        activation = getattr(norm, "act", nn.Identity())
        if isinstance(activation, nn.Identity):
            node.replace_all_uses_with(conv_node)
            backbone.graph.erase_node(node)
        else:
            backbone.set_submodule(node.target, activation)
    backbone.delete_all_unused_submodules()
    backbone.recompile()
    return backbone


def normalization(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixel values in 0..1, per RGB channel, that timm's ``name`` expects."""
    config = timm.get_pretrained_cfg(name)
    return (list(config.mean), list(config.std)) if config else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
