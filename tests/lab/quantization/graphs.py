"""Small networks with random weights, and functions that look into their graphs."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn

from uadtool.lab.detectors.backbones import LayerNorm
from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.modules import ActivationQuantizer
from uadtool.lab.quantization.plan import QuantizationPlan

TEACHERS = ["tf_efficientnet_lite0", "resnet18"]


@lru_cache(maxsize=None)
def small_plan(teacher):
    """Of an STFPM for two classes."""
    torch.manual_seed(0)
    detector = STFPM(teacher, (64, 64), 2)
    for norm in detector.modules():
        if isinstance(norm, nn.BatchNorm2d):  # otherwise all biases are 0
            norm.running_mean.uniform_(-0.5, 0.5)
    return QuantizationPlan(detector.fold_batch_norm())


@pytest.fixture(scope="module", params=TEACHERS)
def plan(request):
    return small_plan(request.param)


@pytest.fixture(scope="module")
def ranges(plan):
    return calibrate(plan, [images(8)])


class Perceptron(nn.Module):
    """Linear layers on tokens [N, L, C] with a residual sum and a layer norm between them; not a detector."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
        self.activation, self.norm = nn.GELU(), LayerNorm(8)

    def forward(self, tokens):
        return self.last(self.norm(tokens + self.second(self.activation(self.first(tokens)))))


@lru_cache(maxsize=None)
def perceptron():
    """Its plan, and tokens."""
    torch.manual_seed(0)
    return QuantizationPlan(Perceptron().eval()), torch.randn(16, 9, 8) + 0.5


def images(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))


def module(model, node):
    return model.get_submodule(node.target) if node.op == "call_module" else None


def nodes(model, kind):
    return [node for node in model.graph.nodes if isinstance(module(model, node), kind)]


def quantizers(model, node):
    """Whether each input of the node comes from a quantizer."""
    return [isinstance(module(model, source), ActivationQuantizer) for source in node.all_input_nodes]
