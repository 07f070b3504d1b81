"""ONNX Runtime on the CPU."""

from typing import Any, List

import numpy as np

from uadtool import metadata
from uadtool.errors import UadtoolError, require
from uadtool.runtimes import Output

FATAL = 4
"""Log severity. ONNX Runtime raises what went wrong; what it prints besides, on stderr, is noise."""


class OnnxRuntime:
    """A detector in an ONNX file; see ``uadtool.runtimes.Runtime``.

    Raises:
        UadtoolError: the file is damaged, was not made by uadtool, or its graph is not a complete detector.
        MissingPackage: onnxruntime is not installed.
    """

    name = "onnxruntime"

    def __init__(self, path: str, threads: int) -> None:
        ort = require("onnxruntime", "onnxruntime")
        ort.set_default_logger_severity(FATAL)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = FATAL
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            reason = " ".join(str(error).split())
            raise UadtoolError(f"{path} cannot be loaded by onnxruntime {ort.__version__}: {reason}") from error
        self.path = path
        self.version = ort.__version__
        self.threads = threads
        properties = self._session.get_modelmeta().custom_metadata_map
        self.metadata = metadata.Metadata.from_json(properties.get(metadata.KEY), path)
        self._check_graph()

    def run(self, images: np.ndarray) -> Output:
        return Output(*self._session.run(Output._fields, {"image": images}))

    def _check_graph(self) -> None:
        inputs = _signature(self._session.get_inputs())
        outputs = _signature(self._session.get_outputs())
        height, width = self.metadata.image_size
        wanted_inputs = [f"image: tensor(uint8) [N, {height}, {width}, 3]"]
        wanted_outputs = [
            "score: tensor(float) [N]",
            "raw_score: tensor(float) [N]",
            "anomaly_map: tensor(float) [N, {}, {}]".format(*self.metadata.map_size),
            "nearest_class: tensor(int32) [N]",
        ]
        if inputs != wanted_inputs or sorted(outputs) != sorted(wanted_outputs):
            raise UadtoolError(f"{self.path} is not a complete detector: it has {', '.join(inputs)} -> "
                               f"{', '.join(outputs)}; expected {', '.join(wanted_inputs + wanted_outputs)}")


def _signature(values: List[Any]) -> List[str]:
    """Name, type and shape of each; a batch dimension that is free, whatever its name, reads N."""
    shapes = [[size if isinstance(size, int) else "N" for size in value.shape] for value in values]
    return [f"{value.name}: {value.type} [{', '.join(map(str, shape))}]" for value, shape in zip(values, shapes)]
