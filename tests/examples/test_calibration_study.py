"""The study of examples/calibration-study: its switch, some of its cells, its report."""

import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch

from uadtool.lab.detectors.stfpm import STFPM
from uadtool.lab.quantization.calibration import calibrate
from uadtool.lab.quantization.modules import ActivationQuantizer, QuantizedConv2d
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.targets import TARGETS

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/calibration-study"))
pytest.importorskip("matplotlib")
import report
import study
import unfused

TARGET = TARGETS["onnxruntime"]


@pytest.fixture(scope="module", params=["resnet18", "mobilenetv2_035"])
def detector(request):
    torch.manual_seed(0)
    return STFPM(request.param, (64, 64), 2).fold_batch_norm()


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_unfused_points_lie_between_convolution_and_activation(detector):
    fused, unfused_points = QuantizationPlan(detector), unfused.UnfusedPlan(detector).points
    behind = {node.name for node in fused.points}
    activations = [node for node in unfused_points if any(reader.name in behind and reader.op == "call_module"
                                                          for reader in node.users if "conv" not in reader.name)]
    assert len(activations) > 10
    modules = dict(fused.traced.named_modules())
    for node in unfused_points:
        assert not isinstance(modules.get(str(node.target)), torch.nn.ReLU | torch.nn.ReLU6)
    convolutions = [node for node in unfused_points if isinstance(modules.get(str(node.target)), torch.nn.Conv2d)]
    assert len(convolutions) == len(fused.layers)


@pytest.mark.parametrize("student_only", [False, True])
def test_the_unfused_graph_rounds_negative_values_too(detector, images, student_only):
    plan = unfused.UnfusedPlan(detector)
    ranges = calibrate(plan, [images], "minmax")
    float_layers = plan.layers_outside("student") if student_only else []
    model = unfused.quantize(plan, ranges, TARGET, float_layers, per_tensor=False)
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    layers = [m for m in model.modules() if isinstance(m, QuantizedConv2d)]
    assert len(layers) == len(plan.layers) - len(float_layers)
    assert len(quantizers) >= len(layers)
    # an untrained ResNet's residual branches give nothing, so its additions nothing negative
    assert sum(int(m.zero_point) > 0 for m in quantizers) > 0.5 * len(quantizers)
    with torch.inference_mode():
        expected, found = detector(images).anomaly_map, model(images)[2]
    assert 0 < (expected - found).abs().max() < 0.5 * expected.abs().max()


def test_one_scale_for_all_weights_of_a_layer():
    conv = torch.nn.Conv2d(3, 4, 3)
    quantized = unfused.PerTensorConv2d(conv)
    assert quantized.weight_scale.unique().numel() == 1
    codes = quantized.weight.float() * quantized.weight_scale[:, None, None, None]
    assert (codes - conv.weight).abs().max() <= quantized.weight_scale[0] / 2 + 1e-7


def test_the_grid_has_no_cell_twice_and_every_source_with_every_method():
    full, sources = (list(study.cells(grid, with_first=True)) for grid in study.GRIDS)
    assert len(full) == len(set(full))
    for source, method, scope in product(study.SOURCES, study.METHODS, ("student", "all")):
        assert study.Cell("ptq", source, method, scope) in full
    assert set(sources) < set(full)
    assert {(cell.source, cell.method) for cell in sources} >= set(product(study.SOURCES, study.METHODS))


@pytest.fixture(scope="module")
def measured(trained, textures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("natural")
    study.natural_images(folder, 4, 64)
    small = study.Study(str(trained.path), str(trained.path), str(textures), str(folder), 0)
    cells = [study.Cell("float"), study.Cell("ptq", "test", "minmax"), study.Cell("ptq", "natural", "mse", "student"),
             study.Cell("first", "good", "entropy"), study.Cell("ptq", "random-normal", "mse", "student", "before")]
    return [{"detector": "tiny", "seed": 0, **asdict(cell), **small.measure(cell)} for cell in cells]


@pytest.mark.slow
def test_cells_are_measured(measured):
    """The blots are easy: float finds them, and int8 does, too, where it was calibrated on what comes."""
    base = measured[0]
    assert base["image_auroc"] > 0.9
    assert measured[1]["image_auroc"] == pytest.approx(base["image_auroc"], abs=0.05)
    for record in measured:
        assert all(0 <= record[metric] <= 1 for metric in ("image_auroc", "pooled", "pixel_auroc", "aupro"))
    assert len({record["aupro"] for record in measured}) == len(measured)


@pytest.mark.slow
def test_the_report_has_every_cell(measured, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    second = [{**record, "seed": 1, "image_auroc": record["image_auroc"] - 0.01 * index}
              for index, record in enumerate(measured)]
    results.write_text("".join(f"{json.dumps(record)}\n" for record in measured + second))
    report.main(results, tmp_path / "plot.svg")
    table = capsys.readouterr().out
    assert f"float has {measured[0]['image_auroc']:.3f}, " in table
    change = measured[1]["image_auroc"] - measured[0]["image_auroc"] - 0.005
    assert f"{change:+.3f} ± 0.005" in table
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1
