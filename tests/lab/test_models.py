import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from uadtool.data.samples import Sample
from uadtool.errors import UadtoolError
from uadtool.lab.detectors.contract import Detector
from uadtool.lab.models import load_float_model, load_model, save_model
from uadtool.lab.train import TrainingOptions, train
from uadtool.metadata import KEY, Metadata

IMAGES = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["trained", "quantized"])
def path(request):
    return request.getfixturevalue(request.param).path


def test_saving_what_was_loaded_gives_the_same_file(path, tmp_path):
    model, metadata = load_model(path)
    save_model(model, metadata, tmp_path / "again.safetensors")
    again, same_metadata = load_model(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert metadata == same_metadata
    with torch.inference_mode():
        for one, other in zip(model(IMAGES), again(IMAGES)):
            assert torch.equal(one, other)


def test_precision_decides_what_is_loaded(trained, quantized):
    detector, metadata = load_float_model(trained.path)
    assert isinstance(detector, Detector)
    assert not detector.training
    assert metadata.precision == "fp32"
    graph, metadata = load_model(quantized.path)
    assert not isinstance(graph, Detector)
    assert metadata.precision == "int8"
    with pytest.raises(UadtoolError, match="is quantized already; give the float model that it was made from"):
        load_float_model(quantized.path)


def refuse(path, message):
    with pytest.raises(UadtoolError, match=message) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def header(path):
    """Of a safetensors file, as JSON."""
    data = path.read_bytes()
    return json.loads(data[8:8 + int.from_bytes(data[:8], "little")])


def write(path, tensors, metadata=None):
    save_file(tensors, path, metadata=metadata and {KEY: json.dumps(metadata)})


@pytest.fixture
def broken(tmp_path):
    return tmp_path / "broken.safetensors"


def test_a_missing_file(broken):
    refuse(broken, "cannot read .*: No such file")


def test_a_file_cut_anywhere(path, broken):
    data = path.read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        broken.write_bytes(data[:size])
        refuse(broken, "is not a safetensors file")


def test_files_of_another_kind(broken):
    for data in (b"text", pickle.dumps({"weights": 1}), b"\xff" * 100):
        broken.write_bytes(data)
        refuse(broken, "is not a safetensors file")


def test_a_safetensors_file_of_another_program(broken):
    write(broken, {"weight": torch.zeros(2)})
    refuse(broken, "was not made by uadtool: it has no 'uadtool' metadata")


@pytest.mark.parametrize(("change", "message"), [
    ({"schema": "uadtool.ranges/1"}, "its schema must be uadtool.model/1"),
    ({"schema": "uadtool.model/2"}, r"was written by a newer uadtool \(uadtool.model/2\); upgrade uadtool$"),
    ({"teacher": "resnet18"}, "the tensors of .* do not fit its metadata"),
    ({"classes": ["one"]}, "the tensors of .* do not fit its metadata: size mismatch for (distance_|roi)"),
    ({"precision": "int8", "target": "onnxruntime"}, "the tensors of .* do not fit its metadata"),
    ({"precision": "int8"}, "is made for None; this version supports onnxruntime"),
    ({"image_size": 3}, "has metadata that this version cannot read"),
    ({"invented": 3}, "has metadata that this version cannot read: .*invented"),
])
def test_metadata_that_does_not_fit(trained, broken, change, message):
    metadata = json.loads(header(trained.path)["__metadata__"][KEY])
    write(broken, load_file(trained.path), {**metadata, **change})
    refuse(broken, message)


def test_tensors_that_do_not_fit(trained, broken):
    metadata = json.loads(header(trained.path)["__metadata__"][KEY])
    tensors = load_file(trained.path)
    name = "student.conv_stem.weight"
    for changed in ({**tensors, "more": torch.zeros(1)}, {k: v for k, v in tensors.items() if k != name},
                    {**tensors, name: torch.zeros(1)}):
        write(broken, changed, metadata)
        refuse(broken, "the tensors of .* do not fit its metadata")


FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 2**40)
SIZE = st.tuples(st.integers(1, 4096), st.integers(1, 4096))
PLAIN = st.recursive(st.none() | st.booleans() | COUNT | st.text(), lambda inner: st.lists(inner), max_leaves=3)
OPTION = st.booleans() | st.text() | st.integers(-10**6, 10**6) | st.floats(-10**6, 10**6)
METADATA = st.builds(
    Metadata, method=st.text(), teacher=st.text(), classes=st.lists(st.text(), min_size=1), image_size=SIZE,
    map_size=SIZE, threshold=FINITE, false_positive_rate=st.floats(0, 1, exclude_max=True), parameters=COUNT,
    macs=COUNT, precision=st.sampled_from(["fp32", "fp16", "int8", "mixed"]),
    options=st.dictionaries(st.text(), OPTION), target=st.none() | st.text(),
    provenance=st.lists(st.dictionaries(st.text(), PLAIN)), tool_version=st.text(),
)


@given(METADATA)
def test_metadata_survive_being_written_and_read(metadata):
    assert Metadata.from_json(metadata.to_json(), "model") == metadata


@given(st.text() | st.recursive(PLAIN, lambda inner: st.dictionaries(st.text(), inner)).map(json.dumps))
def test_other_text_is_refused(text):
    with pytest.raises(UadtoolError, match=r"^model has metadata that this version cannot read"):
        Metadata.from_json(text, "model")


@pytest.mark.parametrize(("field", "value"), [
    ("classes", []), ("classes", "red"), ("classes", [1]), ("image_size", [32]), ("image_size", [32, 0]),
    ("image_size", "ab"), ("map_size", [8.0, 8.0]), ("map_size", [True, True]), ("threshold", "3"),
    ("threshold", float("inf")), ("threshold", 10**400), ("false_positive_rate", None), ("parameters", 1.5),
    ("false_positive_rate", 7), ("false_positive_rate", 1.0), ("precision", "int4"), ("precision", 8),
    ("macs", -1), ("good_scores", {"a": 1}), ("good_scores", ["1"]), ("thresholds", {"a": "1"}),
    ("good_scores", [float("nan")]), ("options", []),
    ("provenance", {}), ("provenance", [1]), ("method", 3), ("target", 3), ("quantization", []),
    ("quantization", {"method": 1, "calibration": "", "source": "", "scope": "", "float_layers": []}),
])
def test_metadata_of_the_wrong_type_are_refused(field, value):
    text = json.dumps({**json.loads(METADATA_OF_ONE.to_json()), field: value})
    message = rf"^model has metadata that this version cannot read: its {field}\b.* must be "
    with pytest.raises(UadtoolError, match=message):
        Metadata.from_json(text, "model")


METADATA_OF_ONE = Metadata("stfpm", "none", ["red"], (32, 32), (8, 8), 3.0, 0.05, 6, 1024, good_scores=[0.5, 1.0])


@pytest.mark.parametrize("changes", [{"classes": ["a"] * 10_001}, {"options": {"width": 10**7}},
                                     {"image_size": (4097, 32)}, {"tool_version": "a" * (16 << 20)}])
def test_metadata_that_no_command_could_read_are_not_written(changes):
    with pytest.raises(UadtoolError, match=r"^no command could read the metadata of this model: it"):
        METADATA_OF_ONE.replace(**changes).to_json()


@pytest.mark.parametrize(("classes", "changes", "problem"), [
    (10_001, {}, "its classes must be a list"), (1, {"image_size": (8192, 8192)}, "its image_size"),
    (1, {"method": "us", "method_options": {"width": "9999999"}}, "its options.width must be"),
])
def test_training_refuses_what_could_not_be_read_before_it_starts(tmp_path, classes, changes, problem):
    samples = [Sample("missing.png", str(index), "good") for index in range(classes)]
    with pytest.raises(UadtoolError, match=f"^no command could read the metadata of this model: {problem}"):
        train(samples, TrainingOptions(**changes), tmp_path / "checkpoint")


def test_metadata_hold_only_finite_numbers(trained):
    metadata = load_model(trained.path)[1]
    with pytest.raises(ValueError, match="not JSON compliant"):
        metadata.replace(threshold=float("nan")).to_json()
