"""New graphs from a ``QuantizationPlan``: with observers, with quantizers, in fp16. They share the float layers."""

import copy
from collections.abc import Callable, Collection, Iterable

from torch import fx, nn

from uadtool.lab.detectors.contract import EXAMPLES, Detector, nearest_prototype
from uadtool.lab.quantization.modules import Quantizable
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.targets import Target


def observe(plan: QuantizationPlan, make: Callable[[str], nn.Module]) -> fx.GraphModule:
    """The graph with ``make(name)``, as ``points.NAME``, at every point for all readers."""
    return _with_points(plan, make, ((node, reader) for node in plan.points for reader in node.users))


def insert_quantizers(plan: QuantizationPlan, make: Callable[[str], nn.Module], target: Target,
                      float_layers: Collection[str] = ()) -> fx.GraphModule:
    """The graph with ``make(name)``, as ``points.NAME``, where integer kernels of the target read or write.

    Args:
        float_layers: names of layers that stay float, in fp16 if the target computes in fp16.
    """
    model = _with_points(plan, make, plan.quantized_edges(target, float_layers))
    float_operations = plan.operations() - plan.integer_operations(float_layers)
    return _compute_in_half(model, float_operations) if target.half else model


def in_half_precision(plan: QuantizationPlan) -> fx.GraphModule:
    """The graph with layers, pools, additions and activations in fp16; attention, norms, score head in fp32."""
    return _compute_in_half(_copy(plan), plan.operations()).eval()


def _copy(plan: QuantizationPlan) -> fx.GraphModule:
    """The plan's graph, to be changed; nodes keep their names."""
    model = fx.GraphModule(plan.traced, copy.deepcopy(plan.traced.graph), class_name=type(plan.detector).__name__)
    if isinstance(plan.detector, Detector):  # no node reads these two
        model.register_buffer(EXAMPLES, plan.detector.get_buffer(EXAMPLES))
        model.sizes = plan.detector.sizes
    return model


def _with_points(plan: QuantizationPlan, make: Callable[[str], nn.Module],
                 edges: Iterable[tuple[fx.Node, fx.Node]]) -> fx.GraphModule:
    """The graph with ``make(name)`` between these points and readers."""
    model, readers = _copy(plan), dict[fx.Node, list[fx.Node]]()
    for node, reader in edges:
        readers.setdefault(node, []).append(reader)
    model.points = nn.ModuleDict({name: make(name) for name in dict.fromkeys(plan.points[node] for node in readers)})
    copies = {node.name: node for node in model.graph.nodes}
    for node in readers:
        source = copies[node.name]
        with model.graph.inserting_after(source):
            inserted = model.graph.call_module(f"points.{plan.points[node]}", (source,))
        for reader in readers[node]:
            copies[reader.name].replace_input_with(source, inserted)
    model.recompile()
    return model


def _compute_in_half(model: fx.GraphModule, operations: set[fx.Node]) -> fx.GraphModule:
    """Give these operations fp16 weights and inputs, and all other readers of their results fp32, in place."""
    names = {node.name for node in operations}
    for node in list(model.graph.nodes):
        half = node.name in names
        layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if half and isinstance(layer, Quantizable):
            model.set_submodule(str(node.target), copy.deepcopy(layer).half())
        readers = [reader for reader in node.users if (reader.name in names) != half]
        if readers and node.target is not nearest_prototype:  # an index remains one
            with model.graph.inserting_after(node):
                cast = model.graph.call_method("float" if half else "half", (node,))
            for reader in readers:
                reader.replace_input_with(node, cast)
    model.recompile()
    return model
