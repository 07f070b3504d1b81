"""An engine file, which is TensorRT's own, and beside it FILE.json: the metadata, and what it was built with."""

import json
import logging
from pathlib import Path
from typing import Any, Dict, Tuple

from uadtool.errors import UadtoolError
from uadtool.files import atomic_write, file_digest, read_json, write_json
from uadtool.metadata import Metadata
from uadtool.tensorrt.builder import Engine
from uadtool.tensorrt.gpu import current_gpu
from uadtool.tensorrt.versions import PACKAGES, import_tensorrt

SCHEMA = "uadtool.engine/1"

log = logging.getLogger("uadtool")


def save_engine(engine: Engine, metadata: Metadata, onnx_digest: str, path: str) -> Dict[str, Any]:
    """Write both files, each whole or not at all; returns what lies in the second one."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(engine.plan)
    record = {"schema": SCHEMA, "output": path, "digest": file_digest(path), "onnx_digest": onnx_digest,
              "build": engine.build, "metadata": json.loads(metadata.to_json())}
    write_json(record, f"{path}.json")
    return record


def read_engine_metadata(path: str) -> Tuple[Metadata, Dict[str, Any]]:
    """The metadata of an engine file, and what it was built with.

    Raises:
        UadtoolError: the file beside it is missing, damaged or of another engine.
    """
    beside = f"{path}.json"
    if not Path(beside).is_file():
        raise UadtoolError(f"{path} has no {Path(beside).name} beside it; export writes both: copy that one, too")
    record = read_json(beside, SCHEMA)
    metadata = Metadata.from_fields(record.get("metadata"), beside)
    build = record.get("build")
    if (not isinstance(build, dict) or "gpu" not in build
            or not all(isinstance(build.get(name), str) for name in ("package", "version", "compute_capability"))
            or build["package"] not in PACKAGES):
        raise UadtoolError(f"{beside} does not tell what built the engine; export it again")
    if record.get("digest") != file_digest(path):
        raise UadtoolError(f"{beside} is of another engine than {path}; export it again")
    return metadata, build


def engine_package(path: str) -> str:
    """The package that built an engine whose metadata are known to be right: one of ``PACKAGES``."""
    return str(read_json(f"{path}.json", SCHEMA)["build"]["package"])


def require_fit(path: str, build: Dict[str, Any]) -> None:
    """Require that an engine runs here; ``build`` is what ``read_engine_metadata`` gives.

    Raises:
        UadtoolError: there is no GPU, or the engine is for another one or another version of TensorRT.
        MissingPackage: the TensorRT that built it is not installed.
    """
    again = f"build it here: uadtool export {Path(path).with_suffix('.onnx')} -o {path}"
    trt = import_tensorrt(build["package"])
    if trt.__version__ != build["version"]:
        raise UadtoolError(f"{path} was built by {trt.__name__} {build['version']}, and here is {trt.__version__}; "
                           f"{again}")
    gpu = current_gpu()
    if gpu is None:
        raise UadtoolError(f"{path} needs a GPU, and there is none, or no driver; a CPU runs the .onnx file")
    if gpu.compute_capability != build["compute_capability"]:
        raise UadtoolError(f"{path} was built for compute capability {build['compute_capability']}, and this "
                           f"{gpu.name} has {gpu.compute_capability}; {again}")
    if build["gpu"] not in (None, gpu.name):
        log.warning("%s was built on %s; on this %s another build may be faster", path, build["gpu"], gpu.name)
