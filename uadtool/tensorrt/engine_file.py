"""An engine file, in TensorRT's own format, and FILE.json beside it: the metadata, and how the engine was built."""

import json
from pathlib import Path
from typing import Any, Dict, Tuple

from uadtool.errors import UadtoolError
from uadtool.files import atomic_write, file_digest
from uadtool.metadata import Metadata
from uadtool.schemas.json_files import read_json, write_json
from uadtool.schemas.validation import validate
from uadtool.tensorrt.builder import Engine
from uadtool.tensorrt.driver import current_gpu
from uadtool.tensorrt.versions import import_tensorrt
from uadtool.terminal import log

SCHEMA = "uadtool.engine/1"


def save_engine(engine: Engine, metadata: Metadata, onnx_digest: str, path: str) -> Dict[str, Any]:
    """Write both files, each whole or not at all, and return the record in FILE.json."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(engine.plan)
    record = {"schema": SCHEMA, "output": path, "digest": file_digest(path), "onnx_digest": onnx_digest,
              "build": engine.build, "metadata": json.loads(metadata.to_json())}
    write_json(record, f"{path}.json")
    return record


def read_engine_metadata(path: str) -> Tuple[Metadata, Dict[str, Any]]:
    """The metadata of an engine file, and the ``build`` object of its record (schemas/engine.json).

    Raises:
        UadtoolError: the file beside it is missing or damaged, or belongs to another engine.
    """
    beside = f"{path}.json"
    if not Path(beside).is_file():
        raise UadtoolError(f"{path} has no {Path(beside).name} beside it; export writes both files, so copy both")
    record = read_json(beside, SCHEMA)
    metadata = Metadata.from_fields(record.get("metadata"), beside)
    try:
        validate(record, "engine")
    except ValueError as error:
        raise UadtoolError(f"{beside} is damaged: {error}; export the engine again") from error
    if record["digest"] != file_digest(path):
        raise UadtoolError(f"{beside} belongs to another engine than {path}; export it again")
    return metadata, record["build"]


def engine_package(path: str) -> str:
    """The package that built an engine, one of ``versions.PACKAGES``. The engine was read before."""
    return str(read_json(f"{path}.json", SCHEMA)["build"]["package"])


def require_fit(path: str, build: Dict[str, Any]) -> None:
    """Require that an engine runs on this machine; ``build`` comes from ``read_engine_metadata``.

    Raises:
        UadtoolError: no GPU exists, or the engine is for another GPU or another version of TensorRT.
        MissingPackage: the package that built it is not installed.
    """
    again = f"build it here: uadtool export {Path(path).with_suffix('.onnx')} -o {path}"
    trt = import_tensorrt(build["package"])
    if trt.__version__ != build["version"]:
        raise UadtoolError(f"{path} was built by {trt.__name__} {build['version']}, but {trt.__version__} is "
                           f"installed; {again}")
    gpu = current_gpu()
    if gpu is None:
        raise UadtoolError(f"{path} needs a GPU, but no GPU or no driver was found; a CPU runs the .onnx file")
    if gpu.compute_capability != build["compute_capability"]:
        raise UadtoolError(f"{path} was built for compute capability {build['compute_capability']}, but this "
                           f"{gpu.name} has {gpu.compute_capability}; {again}")
    size = build.get("multiprocessors")  # missing before 2026-12, and None if the engine was built without a GPU
    if build["gpu"] and (build["gpu"], size or gpu.multiprocessors) != (gpu.name, gpu.multiprocessors):
        log.warning("%s was built on %s%s; a build for this %s with %d may be faster", path, build["gpu"],
                    f" with {size} multiprocessors" if size else "", gpu.name, gpu.multiprocessors)
