"""An engine file, which is TensorRT's own, and beside it FILE.json: the metadata, and what it was built with."""

import json
from pathlib import Path
from typing import Any, Dict, Tuple

from uadtool.artifacts import atomic_write, file_digest, read_json, write_json
from uadtool.errors import UadtoolError
from uadtool.metadata import Metadata
from uadtool.tensorrt.builder import Engine

SCHEMA = "uadtool.engine/1"


def save_engine(engine: Engine, metadata: Metadata, onnx: str, path: str) -> Dict[str, Any]:
    """Write both files, each whole or not at all; returns what lies in the second one."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(engine.plan)
    record = {"schema": SCHEMA, "output": path, "digest": file_digest(path), "onnx_digest": file_digest(onnx),
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
    metadata = Metadata.from_json(json.dumps(record.get("metadata")), beside)
    build = record.get("build")
    if not isinstance(build, dict) or not isinstance(build.get("version"), str):
        raise UadtoolError(f"{beside} does not tell what built the engine; export it again")
    if record.get("digest") != file_digest(path):
        raise UadtoolError(f"{beside} is of another engine than {path}; export it again")
    return metadata, build
