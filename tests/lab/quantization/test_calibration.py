import numpy as np
import pytest
import torch
from graphs import TEACHERS, images, small_plan
from torch import fx, nn

from uadtool.errors import UadtoolError
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.graph import observe


@pytest.fixture(scope="module", params=TEACHERS)
def plan(request):
    return small_plan(request.param)


class Recorder(fx.Interpreter):
    """The smallest and the largest value at every point, by its name."""

    def __init__(self, graph_module):
        super().__init__(graph_module)
        self.seen = {}

    def call_module(self, target, args, kwargs):
        result = super().call_module(target, args, kwargs)
        if target.startswith("points."):
            self.seen.setdefault(target.removeprefix("points."), []).extend(
                (result.min().item(), result.max().item()))
        return result


def test_calibration_sees_every_batch(plan):
    batches = [images(3, seed) for seed in range(3)]
    marked = observe(plan, lambda name: nn.Identity())
    ranges = calibrate(plan, batches, "minmax")
    recorder = Recorder(marked)
    with torch.inference_mode():
        for batch in batches:
            recorder.run(batch)
    assert ranges == {name: (min(values), max(values)) for name, values in recorder.seen.items()}
    assert list(ranges) == list(marked.points)
    one_by_one = calibrate(plan, torch.cat(batches).split(1), "minmax")
    np.testing.assert_allclose(list(one_by_one.values()), list(ranges.values()), rtol=1e-4, atol=1e-4)


def test_calibration_needs_an_image(plan):
    with pytest.raises(UadtoolError, match="no image to calibrate on"):
        calibrate(plan, [])
