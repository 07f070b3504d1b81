"""New graphs from a ``QuantizationPlan``: with observers, with quantizers, in fp16. They share the float layers."""

import copy
from collections.abc import Callable, Collection, Iterable

from torch import fx, nn

from uadtool.lab.quantization.modules import Layer
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.targets import Target


def observe(plan: QuantizationPlan, make: Callable[[str], nn.Module]) -> fx.GraphModule:
    """The graph with ``make(name)``, as ``points.NAME``, at every point for all readers."""
    return _Copy(plan).insert(make, [(node, reader) for node in plan.points for reader in node.users])


def insert_quantizers(plan: QuantizationPlan, make: Callable[[str], nn.Module], target: Target,
                      float_layers: Collection[str] = ()) -> fx.GraphModule:
    """The graph with ``make(name)``, as ``points.NAME``, where integer kernels of the target read or write.

    Args:
        float_layers: names of layers that stay float, in fp16 if the target computes in fp16.
    """
    graph = _Copy(plan)
    graph.insert(make, plan.quantized_edges(target, float_layers))
    if target.half:
        graph.compute_in_half(plan.operations() - plan.integer_operations(float_layers))
    return graph.model


def in_half_precision(plan: QuantizationPlan) -> fx.GraphModule:
    """The graph with layers, pools, additions and activations in fp16; attention, norms, score head in fp32."""
    return _Copy(plan).compute_in_half(plan.operations()).eval()


class _Copy:
    """A copy of a plan's graph, to be changed. Nodes are named by those of the plan."""

    def __init__(self, plan: QuantizationPlan) -> None:
        graph = copy.deepcopy(plan.traced.graph)
        self.model = fx.GraphModule(plan.traced, graph, class_name=type(plan.detector).__name__)
        self._points = plan.points
        self._copies = dict(zip(plan.traced.graph.nodes, graph.nodes))

    def insert(self, make: Callable[[str], nn.Module], edges: Iterable[tuple[fx.Node, fx.Node]]) -> fx.GraphModule:
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node, reader in edges:
            readers.setdefault(node, []).append(reader)
        names = dict.fromkeys(self._points[node] for node in readers)
        self.model.points = nn.ModuleDict({name: make(name) for name in names})
        for node in readers:
            source = self._copies[node]
            with self.model.graph.inserting_after(source):
                inserted = self.model.graph.call_module(f"points.{self._points[node]}", (source,))
            for reader in readers[node]:
                self._copies[reader].replace_input_with(source, inserted)
        self.model.recompile()
        return self.model

    def compute_in_half(self, operations: Iterable[fx.Node]) -> fx.GraphModule:
        """Give these operations fp16 weights and inputs, and all other readers of their results fp32."""
        graph, half = self.model.graph, {self._copies[node] for node in operations}
        for node in half:
            if node.op == "call_module" and isinstance(layer := self.model.get_submodule(str(node.target)), Layer):
                self.model.set_submodule(str(node.target), copy.deepcopy(layer).half())
        for node in list(graph.nodes):
            readers = [reader for reader in node.users if (reader in half) != (node in half)]
            if readers:
                with graph.inserting_after(node):
                    cast = graph.call_method("float" if node in half else "half", (node,))
                for reader in readers:
                    reader.replace_input_with(node, cast)
        self.model.recompile()
        return self.model
