"""Small detectors with random weights, exported in every flavour, each made once; helpers that look into a graph."""

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Tuple

import onnx
import onnxruntime
import pytest
import torch
from conftest import only_one
from fast_exports import keep_registry

from uadtool.lab.detectors.contract import Detector
from uadtool.lab.detectors.dinomaly import Dinomaly
from uadtool.lab.detectors.duet import Duet
from uadtool.lab.detectors.reverse_distillation import ReverseDistillation
from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.detectors.uninformed_students import UninformedStudents
from uadtool.lab.onnx_export.parity import parity_images
from uadtool.lab.onnx_export.writer import to_onnx
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.graph import in_half_precision
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import quantize
from uadtool.lab.quantization.ranges import Ranges
from uadtool.lab.quantization.targets import TARGETS
from uadtool.metadata import Metadata, Quantization, Reading

keep_registry()
SIZE = (64, 64)
DETECTORS = ("tf_efficientnet_lite0", "resnet18", "stfpm-shared", "rd", "us", "dinomaly", "dinomaly-vit", "duet")
"""Teachers of STFPM, or methods (with a shared stage, with a vision transformer)."""
SMALL, TRANSFORMER = "test_resnet", "test_vit"
"""Teachers of the methods: an export takes as long as its graph is deep, and STFPM has the layers of real teachers."""
TENSORRT = ("fp32", "fp16", "int8", "mixed")
"""The precisions of graphs for TensorRT."""
FAST = ("resnet18", "duet")
"""A network and its copy, and memories. Of the others, only dinomaly's transformers have operators that these lack."""
MATRIX = [pytest.param(detector, precision, marks=() if fast else pytest.mark.slow)
          for detector in DETECTORS for precision in TENSORRT
          for fast in [detector == "resnet18" or (precision == "int8" and detector in FAST)]]
"""All detectors in all precisions. In fast tests one has all, and another that of the largest graph."""
FLAVOURS = (*(("tensorrt", precision) for precision in TENSORRT), ("onnxruntime", "int8"), ("openvino", "int8"))
FLOAT_LAYERS = {"tf_efficientnet_lite0": ("*.conv_stem", "student.blocks.1.*"),
                "resnet18": ("teacher.conv1", "student.layer2.*"),
                "stfpm-shared": ("teacher.layer1.*", "student.layer2.*"),
                "rd": ("teacher.conv1.0", "student.fuse.*"), "us": ("teacher.conv1", "student.0.*"),
                "dinomaly": ("teacher.conv1.0", "teacher.layer1.*"), "dinomaly-vit": ("teacher.patch_embed.*",),
                "duet": ("teacher.conv1.0", "memories.0")}


class Flavour(NamedTuple):
    model: torch.nn.Module
    metadata: Metadata
    proto: Any
    images: Any


@lru_cache(maxsize=None)
def _plan(name: str) -> Tuple[QuantizationPlan, Ranges, torch.Tensor]:
    torch.manual_seed(0)
    detector = METHODS[name]() if name in METHODS else STFPM(name, SIZE, 2)
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.affine:  # otherwise all biases are 0
            module.running_mean.uniform_(-0.5, 0.5)
    detector.fold_batch_norm().score_std.fill_(0.1)
    images, plan = torch.from_numpy(parity_images(None, Reading(SIZE))), QuantizationPlan(detector)
    return plan, calibrate(plan, [images]), images


def _duet() -> Duet:
    duet = Duet(SMALL, SIZE, 2, entries=200)
    for memory in duet.memories:
        for row in range(2):
            memory.fit(row, torch.randn(300, memory.weight.shape[1]), torch.arange(300) // 10)
    return duet


METHODS: Dict[str, Callable[[], Detector]] = {
    "stfpm-shared": lambda: STFPM(SMALL, SIZE, 2, shared_stages=1),
    "rd": lambda: ReverseDistillation(SMALL, SIZE, 2),
    "us": lambda: UninformedStudents(SMALL, SIZE, 2),
    "dinomaly": lambda: Dinomaly(SMALL, SIZE, 2, width=64, depth=2),
    "dinomaly-vit": lambda: Dinomaly(TRANSFORMER, SIZE, 2, width=64, depth=2), "duet": _duet}


@lru_cache(maxsize=None)
def flavour(name: str, target: str, precision: str) -> Flavour:
    plan, ranges, images = _plan(name)
    layers = plan.matching_layers(FLOAT_LAYERS[name]) if precision == "mixed" else []
    model = plan.detector
    if precision == "fp16":
        model = in_half_precision(plan)
    elif precision != "fp32":
        model = quantize(plan, ranges, TARGETS[target], layers)
    quantization = Quantization("ptq", "minmax", "good", "all", layers) if precision in ("int8", "mixed") else None
    teacher = TRANSFORMER if name.endswith("-vit") else SMALL if name in METHODS else name
    method = name.split("-")[0] if name in METHODS else "stfpm"
    metadata = Metadata(method, teacher, ["a", "b"], SIZE, plan.detector.map_size, 3.0, 0.01, 1, 1, {}, precision,
                        None if precision == "fp32" else target, quantization, tool_version="0.1.0")
    with only_one(f"{name}-{target}-{precision}.onnx") as path:  # an export takes long
        if not path.exists():
            onnx.save(to_onnx(model, metadata), path)
    return Flavour(model, metadata, onnx.load(path), images.numpy())


def session(model: Any, **settings: Any) -> onnxruntime.InferenceSession:
    """ONNX Runtime with a file or its bytes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def operators(proto: Any) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def optimized(proto: Any, path: Path) -> Counter[str]:
    """The operators after ONNX Runtime's optimizations."""
    session(proto.SerializeToString(), optimized_model_filepath=str(path),
            graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    return operators(onnx.load(path))
