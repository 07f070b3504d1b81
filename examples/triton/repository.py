"""Add an exported detector to a model repository of Triton Inference Server: MODEL in a folder with its config.pbtxt.

usage: python repository.py MODEL REPOSITORY [--name NAME] [--instances N] [--max-batch N] [--delay MICROSECONDS]

MODEL is an .onnx file, which runs on the processor, or an engine, which runs on the GPU that it was built for.
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from uadtool.errors import UadtoolError
from uadtool.metadata import Metadata
from uadtool.runtimes.onnx_file import read_metadata
from uadtool.tensorrt.engine_file import read_engine_metadata


def configuration(name: str, metadata: Metadata, engine: bool, max_batch: int, instances: int, delay: int) -> str:
    """The text of config.pbtxt (ModelConfig of Triton's model_config.proto).

    Args:
        engine: whether TensorRT runs it; otherwise ONNX Runtime does, on one thread for each instance.
        max_batch: images that Triton may run at once.
        instances: copies of the model, on each GPU or on the processor.
        delay: microseconds for which a request may wait until others join its batch.
    """
    scalars = [("score", "FP32"), ("raw_score", "FP32"), ("nearest_class", "INT32")]
    if metadata.class_distance_limit is not None:
        scalars.append(("class_distance", "FP32"))
    height, width = metadata.map_size
    outputs = [_tensor("output", output, kind, "[ 1 ] reshape { shape: [ ] }") for output, kind in scalars]
    outputs.append(_tensor("output", "anomaly_map", "FP32", f"[ {height}, {width} ]"))
    height, width = metadata.image_size
    # What a client needs besides the tensors. Triton shows it at v2/models/NAME/config.
    facts = {"classes": metadata.classes, "threshold": metadata.threshold, "thresholds": metadata.thresholds,
             "class_distance_limit": metadata.class_distance_limit, "preprocessing": metadata.preprocessing}
    parameters = {"uadtool": json.dumps(facts)}
    if not engine:
        parameters.update(intra_op_thread_count="1", inter_op_thread_count="1")
    return "\n".join([
        f"name: {_text(name)}",
        f'platform: "{"tensorrt_plan" if engine else "onnxruntime_onnx"}"',
        f"max_batch_size: {max_batch}",
        _tensor("input", "image", "UINT8", f"[ {height}, {width}, 3 ]"),
        *outputs,
        f"dynamic_batching {{ max_queue_delay_microseconds: {delay} }}",
        f"instance_group {{ count: {instances} kind: {'KIND_GPU' if engine else 'KIND_CPU'} }}",
        *(f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}"
          for key, value in parameters.items()), ""])


def _tensor(place: str, name: str, kind: str, dims: str) -> str:
    return f'{place} {{ name: "{name}" data_type: TYPE_{kind} dims: {dims} }}'


def _text(value: str) -> str:
    """A string of protobuf's text format, from one in ASCII."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def main() -> None:
    """Write the folder. The configuration comes last: without it Triton does not load the model."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--delay", type=int, default=2000)
    arguments = parser.parse_args()
    name = arguments.name or arguments.model.stem
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        parser.error(f"{name!r} is not a name for a model; give --name with letters, digits, '.', '-' and '_'")
    if min(arguments.instances, arguments.max_batch) < 1 or arguments.delay < 0:
        parser.error("--instances and --max-batch must be at least 1, --delay at least 0")
    engine, max_batch = arguments.model.suffix == ".engine", arguments.max_batch
    if engine:
        metadata, build = read_engine_metadata(str(arguments.model))
        max_batch = min(max_batch, build["max_batch"])
    else:
        metadata = read_metadata(str(arguments.model))
    folder = arguments.repository / name
    (folder / "1").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.model, folder / "1" / ("model.plan" if engine else "model.onnx"))
    text = configuration(name, metadata, engine, max_batch, arguments.instances, arguments.delay)
    (folder / "config.pbtxt").write_text(text, encoding="ascii")


if __name__ == "__main__":
    try:
        main()
    except (UadtoolError, OSError) as error:
        sys.exit(f"repository.py: error: {error}")
