"""Check that the exported graph gives the scores of torch; otherwise export fails."""

from importlib.util import find_spec
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from PIL import Image
from torch import nn

from uadtool.data.dataset import scoring_samples
from uadtool.data.images import read_image
from uadtool.data.splits import balanced
from uadtool.errors import UadtoolError
from uadtool.host import adds_int8_exactly
from uadtool.lab.detectors.contract import OutputTensors
from uadtool.lab.onnx_export.deployed import open_proto
from uadtool.metadata import Metadata, Reading
from uadtool.scoring.anomaly_maps import inside_roi

IMAGES = 16
MOST_PIXELS = 1 << 23
"""Pixels of these images together; two images may have more."""
TOLERANCE = {"fp32": 0.01, "fp16": 0.05, "int8": 0.5, "mixed": 0.5}
"""Allowed difference of a score, and of the median of an anomaly map, in standard deviations of good images' scores;
beyond ``LARGE`` it grows in proportion to the score. In int8 one kernel rounds a sum between two codes up and another
down, which the next layers amplify. In fp16 ONNX Runtime keeps fp32 between the layers if the processor lacks fp16."""
LARGE = 5.0
CLASS_AGREEMENT = {"fp32": 1.0, "fp16": 1.0, "int8": 0.75, "mixed": 0.75}
"""Share of the images whose nearest class must be the same. In int8 an image between two classes, as synthetic images
often are, may go to either; its score is then in the units of another class and cannot be compared."""


def parity_images(path: Optional[str], reading: Reading) -> NDArray[np.uint8]:
    """Up to 16 images of a folder or data set, its classes in turn; synthetic images if None: [N, H, W, 3]."""
    count = min(IMAGES, max(2, MOST_PIXELS // (reading.size[0] * reading.size[1])))
    if path is None:
        coarse = np.random.default_rng(0).integers(112, 144, (count, 8, 8, 3), dtype=np.uint8)
        return np.stack([np.asarray(Image.fromarray(image).resize(reading.size[::-1], Image.Resampling.BICUBIC))
                         for image in coarse])
    samples = balanced(list(scoring_samples([path])), count, seed=0)
    return np.stack([read_image(sample.path, *reading) for sample in samples])


def check_parity(model: nn.Module, proto: ModelProto, metadata: Metadata, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Run the torch model and the exported graph on the same images; returns their differences.

    The graph runs in the runtime that it was made for, or in ONNX Runtime if that is not installed.

    Raises:
        UadtoolError: the graph cannot run; a score, a map or a class distance differs by more than the tolerance of the
            precision; or too many nearest classes differ.
    """
    with torch.inference_mode():
        expected = OutputTensors(*model(torch.from_numpy(images)))
    runtime = open_proto(proto, _runtime(metadata.target))
    try:
        actual = runtime.run(images)
    except Exception as error:  # each runtime has its own
        raise UadtoolError(f"the exported graph cannot compute {len(images)} images in {runtime.name}; in the model, "
                           "their number must stay the first dimension, or a factor of it; nothing was written: "
                           f"{str(error).splitlines()[0]}") from error
    name, precision = f"{runtime.name} {runtime.version}", metadata.precision
    same = actual.nearest_class == expected.nearest_class.numpy()
    if same.mean() < CLASS_AGREEMENT[precision]:
        raise UadtoolError(f"the exported graph is not the model: {name} finds another nearest class for "
                           f"{(~same).sum()} of {len(images)} images; nothing was written")
    units, far = (np.maximum(1, np.abs(values.numpy()) / LARGE) for values in (expected.score, expected.class_distance))
    maps = np.abs(actual.anomaly_map - expected.anomaly_map.numpy())
    medians = [np.median(one[region]) for one, region in zip(maps, inside_roi(expected.anomaly_map.numpy()))]
    difference = float((np.abs(actual.score - expected.score.numpy()) / units)[same].max())
    typical = float((np.array(medians) / units)[same].max())
    distance = float((np.abs(actual.class_distance - expected.class_distance.numpy()) / far)[same].max())
    tolerance = TOLERANCE[precision]
    for output, off in (("a score", difference), ("an anomaly map", typical), ("a class distance", distance)):
        if not off <= tolerance:  # also NaN
            raise UadtoolError(f"the exported graph is not the model: {output} in {name} is off by {off:.3g}, more "
                               f"than {tolerance}; nothing was written")
    return {"runtime": {"name": runtime.name, "version": runtime.version}, "images": len(images),
            "score_difference": difference, "tolerance": tolerance, "map_difference": float(maps[same].max())}


def _runtime(target: Optional[str]) -> str:
    # OpenVINO fuses an addition with the convolution before it and skips the quantizer between the two, which the
    # flavour for ONNX Runtime has. It cannot check that flavour, nor anything in int8 on an older processor.
    openvino = target == "openvino" and find_spec("openvino") and adds_int8_exactly()
    return "openvino" if openvino else "onnxruntime"
