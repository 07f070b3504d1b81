"""Does the exported graph give the scores that torch gives? Export fails when it does not."""

from importlib.util import find_spec
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from PIL import Image
from torch import nn

from uadtool.dataset import balanced, scoring_samples
from uadtool.detectors import Output
from uadtool.errors import UadtoolError
from uadtool.images import read_image
from uadtool.metadata import KEY, Metadata
from uadtool.onnx_export.deployed import open_proto

IMAGES = 16
TOLERANCE = {"fp32": 0.01, "fp16": 0.05, "int8": 0.5, "mixed": 0.5}
"""How far a score may be off, in standard deviations of good images' scores; one beyond 1, relative to itself. In int8
a sum that lies between two codes is rounded up by one kernel and down by another, and the next layers carry that on. In
fp16 ONNX Runtime keeps fp32 between the layers where the processor computes in no other."""
CLASS_AGREEMENT = {"fp32": 1.0, "fp16": 1.0, "int8": 0.75, "mixed": 0.75}
"""Share of the images whose nearest class must be the same. In int8 an image between two classes (a synthetic one
easily is) may go to either; its score then counts in the units of another class and cannot be compared."""


def parity_images(path: Optional[str], image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """Up to 16 images of a folder or data set, its classes in turn; without one, synthetic ones: [N, H, W, 3]."""
    if path is None:
        coarse = np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
        return np.stack([np.asarray(Image.fromarray(one).resize(image_size[::-1], Image.Resampling.BICUBIC))
                         for one in coarse])
    samples = balanced(list(scoring_samples([path])), IMAGES, seed=0)
    return np.stack([read_image(sample.path, image_size) for sample in samples])


def check_parity(model: nn.Module, proto: ModelProto, images: NDArray[np.uint8]) -> dict[str, Any]:
    """Run the torch model and the exported graph on the same images; returns how far they are apart.

    The graph runs in the runtime that it was made for; in ONNX Runtime, if that is not here.

    Raises:
        UadtoolError: a score is off by more than the tolerance of the precision, or too many nearest classes differ.
    """
    with torch.inference_mode():
        expected = Output(*model(torch.from_numpy(images)))
    runtime = open_proto(proto, _runtime(proto))
    found = runtime.run(images)
    name, precision = f"{runtime.name} {runtime.version}", runtime.metadata.precision
    same = found.nearest_class == expected.nearest_class.numpy()
    if same.mean() < CLASS_AGREEMENT[precision]:
        raise UadtoolError(f"the exported graph is not the model: {name} finds another nearest class for "
                           f"{(~same).sum()} of {len(images)} images; nothing was written")
    wanted = expected.score.numpy()
    difference = float((np.abs(found.score - wanted) / np.maximum(1, np.abs(wanted)))[same].max())
    tolerance = TOLERANCE[precision]
    if not difference <= tolerance:
        raise UadtoolError(f"the exported graph is not the model: a score in {name} is off by {difference:.3g}, more "
                           f"than {tolerance}; nothing was written")
    return {"runtime": {"name": runtime.name, "version": runtime.version}, "images": len(images),
            "score_difference": difference, "tolerance": tolerance,
            "map_difference": float(np.abs(found.anomaly_map - expected.anomaly_map.numpy())[same].max())}


def _runtime(proto: ModelProto) -> str:
    (text,) = (entry.value for entry in proto.metadata_props if entry.key == KEY)
    # OpenVINO fuses an addition with the convolution before it and skips the quantizer between the two, which ONNX
    # Runtime's flavour has: what it says of that flavour is no measure.
    made_for_openvino = Metadata.from_json(text, "model").target == "openvino"
    return "openvino" if made_for_openvino and find_spec("openvino") else "onnxruntime"
