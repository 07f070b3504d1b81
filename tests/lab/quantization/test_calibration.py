import graphs
import numpy as np
import pytest
import torch
from graphs import images
from torch import nn

from uadtool.errors import UadtoolError
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.graph import observe

plan = graphs.plan


class Recorder(nn.Identity):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, values):
        self.seen += [values.min().item(), values.max().item()]
        return values


def test_calibration_sees_every_batch(plan):
    batches = [images(3, seed) for seed in range(3)]
    ranges, recording = calibrate(plan, batches, "minmax"), observe(plan, lambda name: Recorder())
    with torch.inference_mode():
        for batch in batches:
            recording(batch)
    seen = {name: recorder.seen for name, recorder in recording.points.named_children()}
    assert list(ranges.items()) == [(name, (min(values), max(values))) for name, values in seen.items()]
    one_by_one = calibrate(plan, torch.cat(batches).split(1), "minmax")
    np.testing.assert_allclose(list(one_by_one.values()), list(ranges.values()), rtol=1e-4, atol=1e-4)


def test_calibration_needs_an_image(plan):
    with pytest.raises(UadtoolError, match="no image to calibrate on"):
        calibrate(plan, [])
