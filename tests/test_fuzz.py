"""Runs the targets of the fuzzer briefly, without atheris, and inputs that once broke a parser."""

import json
import random
import struct
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from fuzz import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st

from uadtool.cli.main import cli
from uadtool.data.dataset import scoring_samples
from uadtool.errors import UadtoolError
from uadtool.lab.models import load_model
from uadtool.metadata import MOST_CHARACTERS, Metadata
from uadtool.runtimes.onnx_file import INSIDE, has_external_data, read_metadata
from uadtool.schemas.json_files import MOST_JSON, read_json
from uadtool.tensorrt.engine_file import read_engine_metadata
from uadtool.terminal import printable

QUICK = sorted(set(fuzz.TARGETS) - {"model", "image"})
"""Targets that take less than 10 ms for an input. test_images.py also breaks images."""


@pytest.mark.parametrize("name", QUICK)
def test_broken_input_is_refused(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    parse, seeds = fuzz.TARGETS[name].prepare(folder), list(fuzz.TARGETS[name].seeds(folder))
    for seed in seeds:
        fuzz.check(parse, seed)

    changes = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), max_size=3)

    @given(st.sampled_from(seeds), st.integers(0, 2**32), changes)
    @settings(max_examples=50)
    def broken(seed: bytes, number: int, changes: List[Any]) -> None:
        data = fuzz.mutate_json(seed, random.Random(number))
        for place, content in changes:
            at = int(place * len(data))
            data = data[:at] + content + data[at + number % 9:]
        fuzz.check(parse, data)

    broken()


def refuse(message: str, parse: Any, *arguments: Any) -> None:
    with pytest.raises(UadtoolError, match=message) as error:
        parse(*arguments)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


# Metadata


def fields(**changes: Any) -> str:
    return json.dumps({**json.loads(fuzz.example_metadata().to_json()), **changes})


@pytest.mark.parametrize(("text", "message"), [
    (fields(image_size=[4097, 32]), r"its image_size\[0\] must be a whole number \(at least 1, at most 4096\)"),
    (fields(map_size=[32, 10**12]), r"its map_size\[1\] must be"),
    (fields(classes=["a"] * 10_001), r"its classes must be a list \(1 or more items, up to 10000 items\)"),
    (fields(classes=["\ud800"]), r"its classes\[0\] must be text without lone surrogates"),
    (fields(options={"width": 10**9}), "its options.width must be true or false or text or a finite number"),
    (fields(options={"width": [[]]}), "its options.width must be"),
    (fields(parameters=1 << 63), "its parameters must be"),
    (fields(provenance=[{"seed": float("nan")}]), "not JSON compliant"),
    (fields(**{"x" * 10_000: 1}), "is not a field that this version knows"),
    ("[" * 100_000, "recursion"),
    (" " * MOST_CHARACTERS + "{}", "it is longer than 16 MiB"),
])
def test_metadata_beyond_bounds(text: str, message: str) -> None:
    refuse(f"^model has metadata that this version cannot read: .*{message}", Metadata.from_json, text, "model")


@pytest.mark.parametrize("changes", [
    {"classes": [str(number) for number in range(10_000)], "image_size": [4096, 4096]},
    {"options": {"width": 999_999}},
    {"teacher": "resnetv2_152x4_bit.goog_in21k"}, {"teacher": "hf-hub:someone/something"}, {"teacher": "../../x"},
    {"method": "dinomaly", "options": {"depth": 1_000_000}}, {"options": {"fusion": "\x1b[31m"}},
    {"options": {"fusion": -1}},
    {"method": "rd", "options": {"width": -5}}, {"method": "us", "options": {"width": 0.5}}, {"method": "os.system"},
    {"method": "duet", "options": {"entries": 0}}, {"method": "memory", "options": {"strides": "16,8"}},
    {"method": "duet", "options": {"entries": 10**6, "components": 10**6}},
])
def test_a_model_that_claims_to_be_huge(changes: Any, tmp_path: Path) -> None:
    """It is refused before memory is allocated for it."""
    parse = fuzz.TARGETS["model"].prepare(tmp_path)
    refuse(".", parse, fields(quantization=None, **changes).encode())


# ONNX


def test_every_place_of_a_tensor_is_known() -> None:
    """``INSIDE`` is what onnx.proto says."""
    onnx = pytest.importorskip("onnx")
    reaching = {"TensorProto": {}}
    messages = [getattr(onnx, name).DESCRIPTOR for name in dir(onnx) if hasattr(getattr(onnx, name), "DESCRIPTOR")
                and hasattr(getattr(onnx, name).DESCRIPTOR, "fields")]
    for _ in messages:
        for message in messages:
            inside = {field.number: field.message_type.name for field in message.fields
                      if field.message_type and field.message_type.name in reaching}
            if inside:
                reaching[message.name] = inside
    within, new = {"ModelProto"}, {"ModelProto"}
    while new := {inner for name in new for inner in reaching[name].values()} - within:
        within |= new
    assert {name: reaching[name] for name in within} == INSIDE


def external_tensors() -> Iterator[Any]:
    """Models with one tensor elsewhere, in all places where one may be."""
    onnx = pytest.importorskip("onnx")
    whole = onnx.ModelProto.FromString(next(iter(fuzz.TARGETS["onnx"].seeds(Path()))))

    def tensors(message: Any) -> Iterator[Any]:
        for field, value in message.ListFields():
            if field.message_type:
                for one in [value] if hasattr(value, "ListFields") else value:
                    if field.message_type.name == "TensorProto":
                        yield one
                    elif hasattr(one, "ListFields"):
                        yield from tensors(one)

    for index in range(len(list(tensors(whole)))):
        model = onnx.ModelProto()
        model.CopyFrom(whole)
        list(tensors(model))[index].external_data.add(key="location", value="../../etc/passwd")
        yield model


def test_tensors_in_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    models = list(external_tensors())
    assert len(models) > 15
    for model in models:
        path.write_bytes(model.SerializeToString())
        refuse(r"has tensors in other files \(external data\), which uadtool does not read", read_metadata, str(path))


def test_a_tensor_cannot_be_hidden() -> None:
    tensor = b"\x6a\x02\x0a\x00"  # external_data of one entry
    for wrong in (b"\xba\x80\x80\x80\x10",  # field 7 once its number is cut to 32 bits
                  b"\x3b"):  # field 7 as a group
        with pytest.raises(ValueError, match="does not exist"):
            has_external_data(wrong + b"\x06\x2a\x04" + tensor)
    assert has_external_data(b"\x3a\x00\x3a\x06\x2a\x04" + tensor)  # a second graph, which is merged with the first
    assert has_external_data(b"\xba\x00\x86\x00\x2a\x04" + tensor)  # numbers that are longer than they need be
    deep = b""
    for _ in range(200):
        deep = b"\x0a" + _size(b"\x2a" + _size(b"\x32" + _size(deep)))  # a graph in an attribute of a node
    with pytest.raises(ValueError, match="nested too deeply"):
        has_external_data(b"\x3a" + _size(deep))


def _size(content: bytes) -> bytes:
    number, size = len(content), bytearray()
    while number > 127:
        size.append(number & 127 | 128)
        number >>= 7
    return bytes([*size, number]) + content


def test_a_file_that_is_too_large_for_protobuf(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(1 << 40)
    refuse("it is larger than 2 GiB", read_metadata, str(tmp_path / "model.onnx"))


# Safetensors and JSON


def test_a_safetensors_header_that_claims_to_be_huge(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensor = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}
    for size, header in ((1 << 62, b""), (1 << 26, b"{}"), (None, json.dumps({"weight": tensor}).encode()),
                         (None, b"[" * 10**6)):
        path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header)
        refuse("is not a safetensors file", load_model, path)


def test_json_that_is_too_large_or_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text("[" * 100_000)
    refuse("is not JSON: .*recursion", read_json, path, "uadtool.ranges/1")
    with path.open("wb") as file:
        file.truncate(MOST_JSON + 1)
    refuse("it is larger than 64 MiB", read_json, path, "uadtool.ranges/1")
    (tmp_path / "m.jsonl").write_text('{"path": ' + "[" * 100_000)
    refuse("line 1, is not JSON", list, scoring_samples([str(tmp_path / "m.jsonl")]))


@pytest.mark.parametrize("build", [
    {"version": ["1.4"]}, {"package": ["tensorrt"]}, {"package": "os"}, {"compute_capability": None}])
def test_an_engine_with_a_damaged_record(build: Any, tmp_path: Path) -> None:
    fuzz.TARGETS["engine"].prepare(tmp_path)
    path = tmp_path / "model.engine.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "build": {**record["build"], **build}}))
    refuse("is damaged: its build.* must be .*; export", read_engine_metadata, str(tmp_path / "model.engine"))


# Names


@given(st.text())
def test_what_is_printed_is_one_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert all(char in shown for char in text if char.isprintable())


def test_names_in_tables_do_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from records import lines, score_records

    run, *images, summary = score_records("a\x1b]0;title\a|b.onnx")
    summary["metrics"]["image_auroc"]["per_class"]["\x1b[2J\n|"] = 0.5
    path = tmp_path / "scores.jsonl"
    path.write_text(lines([run, *images, summary]))
    for style in ("table", "markdown", "csv"):
        cli.main(["compare", str(path), "--format", style], prog_name="uadtool", standalone_mode=False)
        printed = capsys.readouterr().out
        assert all(line.isprintable() for line in printed.splitlines())
        assert "\\x1b[2J\\n" in printed
