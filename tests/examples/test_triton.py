"""examples/triton: the configuration is valid by Triton's own schema, and is about the tensors of the graph."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import METADATA

SCRIPT = Path(__file__).parents[2] / "examples/triton/repository.py"
TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8", 6: "TYPE_INT32"}
"""ONNX's types -> Triton's."""


@pytest.fixture(scope="module")
def schema() -> Any:
    """Triton's model_config.proto, which its client brings along; the client itself would need gRPC."""
    client = importlib.util.find_spec("tritonclient")
    if client is None or not client.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    path = Path(next(iter(client.submodule_search_locations)), "grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def repository(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def parsed(schema: Any, text: str) -> Any:
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse(text, schema.ModelConfig())


@pytest.mark.parametrize("limit", [5.0, None])
def test_the_configuration_is_about_the_graph(schema, make_detector, tmp_path, limit):
    onnx = pytest.importorskip("onnx")
    metadata = METADATA.replace(class_distance_limit=limit, classes=["gr\"ün\\", "red"], thresholds={"red": 2.5})
    model = make_detector(tmp_path / "line 1.onnx", metadata)
    done = repository(model, tmp_path / "models", "--name", "line-1", "--instances", 3, "--max-batch", 16)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "models/line-1/1/model.onnx").read_bytes() == model.read_bytes()
    config = parsed(schema, (tmp_path / "models/line-1/config.pbtxt").read_text())
    assert (config.name, config.platform, config.max_batch_size) == ("line-1", "onnxruntime_onnx", 16)
    graph = onnx.load(model).graph
    for tensors, of_graph in ((config.input, graph.input), (config.output, graph.output)):
        names = {value.name: value.type.tensor_type for value in of_graph}
        assert {tensor.name for tensor in tensors} == names.keys() - ({"class_distance"} if limit is None else set())
        for tensor in tensors:
            sizes = [size.dim_value for size in names[tensor.name].shape.dim[1:]]
            assert list(tensor.dims) == (sizes or [1])
            assert tensor.HasField("reshape") == (not sizes)
            assert list(tensor.reshape.shape) == []
            assert schema.DataType.Name(tensor.data_type) == TYPES[names[tensor.name].elem_type]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    group, = config.instance_group
    assert (group.count, group.kind) == (3, schema.ModelInstanceGroup.KIND_CPU)
    facts = json.loads(config.parameters["uadtool"].string_value)
    assert facts["classes"] == metadata.classes
    assert facts["thresholds"] == {"red": 2.5}
    assert config.parameters["intra_op_thread_count"].string_value == "1"


def test_the_configuration_of_an_engine(schema, tmp_path):
    from uadtool.tensorrt.builder import Engine
    from uadtool.tensorrt.engine_file import save_engine

    build = {"package": "tensorrt_rtx", "version": "1.4", "gpu": None, "compute_capability": "8.6", "precision": "int8",
             "workspace": None, "max_batch": 4, "timing_cache": None, "dla": None, "gpu_fallback": False,
             "dla_fallback": []}
    save_engine(Engine(b"plan", build), METADATA, f"sha256:{64 * '0'}", str(tmp_path / "m.engine"))
    done = repository(tmp_path / "m.engine", tmp_path / "models", "--max-batch", 16)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "models/m/1/model.plan").read_bytes() == b"plan"
    config = parsed(schema, (tmp_path / "models/m/config.pbtxt").read_text())
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 4)
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    assert set(config.parameters) == {"uadtool"}


def test_a_wrong_field_would_be_found(schema):
    with pytest.raises(Exception, match="max_batch"):
        parsed(schema, "max_batch: 8")


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["missing.onnx", "models"], 1, "repository.py: error: cannot read missing.onnx"),
    (["{model}", "models", "--name", "a b"], 2, "is not a name for a model"),
    (["{model}", "models", "--instances", "0"], 2, "must be at least 1"),
    (["{model}", "{model}"], 1, "repository.py: error: "),
])
def test_bad_input(detector, tmp_path, arguments, code, message):
    done = repository(*(argument.format(model=detector) for argument in arguments))
    assert done.returncode == code
    assert message in done.stderr.splitlines()[-1]
