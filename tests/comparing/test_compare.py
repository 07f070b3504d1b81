"""Joining score and bench files, gates on the result, and the command around them."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Optional
from xml.etree import ElementTree

import pytest
from conftest import validate
from hypothesis import given
from hypothesis import strategies as st
from records import HOST, bench_record, lines, model, score_records

from uadtool.benchmarking.bench import Settings
from uadtool.benchmarking.bench import bench as measure
from uadtool.cli.compare import compare as command
from uadtool.comparing import table
from uadtool.comparing.comparison import METRICS, compare
from uadtool.comparing.gates import Gate, Verdict
from uadtool.comparing.junit import as_junit
from uadtool.comparing.table import as_table
from uadtool.data.dataset import scoring_samples
from uadtool.errors import UadtoolError
from uadtool.runtimes.opening import open_model
from uadtool.scoring.records import score


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Two models, scored and measured: fp32.jsonl, int8.jsonl, bench.json in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("fp32.jsonl").write_text(lines(score_records("build/fp32.onnx")))
    Path("int8.jsonl").write_text(lines(score_records("build/int8.onnx", noise=1.0)))
    bench = bench_record(model("build/fp32.onnx"), model("build/int8.onnx"))
    Path("bench.json").write_text(json.dumps(bench, indent=2))
    return tmp_path


def row(record: Dict[str, Any], metric: str) -> Dict[str, Any]:
    return next(row for row in record["rows"] if row["metric"] == metric)


def run(*arguments: str, given: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "uadtool", "compare", *arguments], input=given, capture_output=True,
                          text=True, check=False)


# The record


def test_record_joins_scores_and_bench_by_digest(files):
    record = compare(["fp32.jsonl", "bench.json", "int8.jsonl"])
    assert [(entry["label"], entry["files"]) for entry in record["models"]] == [
        ("fp32.onnx", {"scores": "fp32.jsonl", "bench": "bench.json"}),
        ("int8.onnx", {"scores": "int8.jsonl", "bench": "bench.json"})]
    latency, size, auroc = row(record, "latency_p50"), row(record, "file_size"), row(record, "image_auroc")
    assert (latency["values"], latency["changes"], latency["unit"]) == ([10, 5], [None, 0.5], "ms")
    assert (size["values"], size["changes"], size["unit"]) == ([12, 6], [None, 0.5], "MB")
    assert row(record, "throughput")["values"] == [130, 260]
    assert auroc["changes"] == [None, pytest.approx(auroc["values"][1] - auroc["values"][0])]
    assert auroc["values"][1] < auroc["values"][0]


def test_record_has_the_metrics_that_gates_know_in_order(files):
    assert [row["metric"] for row in compare(["bench.json", "fp32.jsonl"])["rows"]] == [
        "image_auroc", "image_auroc.pooled", "image_auroc.bolt", "image_auroc.nut", "average_precision", "f1_max",
        "pixel_auroc", "aupro", "false_positive_rate", "false_positive_rate.bolt", "false_positive_rate.nut", "recall",
        "recall.bolt", "recall.nut", "latency_p50", "latency_p99", "throughput",
        "cold_start", "peak_rss", "file_size", "parameters", "macs"]


def test_record_honours_its_schema(files):
    for chosen in (["fp32.jsonl"], ["bench.json"], ["fp32.jsonl", "int8.jsonl", "bench.json"]):
        validate(json.loads(json.dumps(compare(chosen), allow_nan=False)), "compare")


def test_order_of_files_decides_only_the_order_of_models(files):
    several = ["fp32.jsonl", "int8.jsonl", "bench.json"]
    assert compare(several)["rows"] == compare(several[::-1])["rows"]
    assert [entry["label"] for entry in compare(["int8.jsonl", "bench.json"])["models"]] == ["int8.onnx", "fp32.onnx"]


def test_intervals_are_around_the_differences_of_image_auroc(files):
    record = compare(["fp32.jsonl", "int8.jsonl"])
    metrics = [row["metric"] for row in record["rows"] if "intervals" in row]
    assert metrics == ["image_auroc", "image_auroc.pooled", "image_auroc.bolt", "image_auroc.nut"]
    for metric in metrics:
        none, (low, high) = row(record, metric)["intervals"]
        assert none is None
        assert low < row(record, metric)["changes"][1] < high <= 0


def test_different_images_have_no_changes_but_a_warning(files, caplog):
    Path("other.jsonl").write_text(lines(score_records("other.onnx", folder="elsewhere")))
    record = compare(["fp32.jsonl", "other.jsonl", "int8.jsonl", "bench.json"])
    assert "fp32.jsonl and other.jsonl are about different images" in caplog.text
    assert [bool(interval) for interval in row(record, "image_auroc")["intervals"]] == [False, False, True]
    assert [change is None for change in row(record, "recall")["changes"]] == [True, True, False]
    assert [entry.get("comparable", True) for entry in record["models"]] == [True, False, True]
    validate(json.loads(json.dumps(record)), "compare")
    assert list(Gate.parse("recall>=0").failures(record)) == []
    with pytest.raises(UadtoolError, match=r"cannot be decided for other\.onnx: fp32\.onnx scored other images"):
        list(Gate.parse("recall>=-1").failures(record))


def test_the_same_images_below_another_folder_have_changes(files):
    for name, folder in (("fp32", "here/parts/all"), ("int8", "there/all")):
        Path(f"{name}.jsonl").write_text(lines(score_records(f"{name}.onnx", folder=f"{folder}/test")))
    record = compare(["fp32.jsonl", "int8.jsonl"])
    assert row(record, "image_auroc")["changes"][1] == 0
    assert "intervals" not in row(record, "image_auroc")


def test_models_that_differ_can_be_told_apart(files):
    base = {"started": "2026-11-02T08:15:00Z", "steps": 640, "base": f"sha256:{'0123456789ab' * 5}0123"}
    for name, changes in (("fp32", {"training": base}),
                          ("int8", {"method": "duet", "image_size": [64, 48], "classes": ["a", "b", "c"]})):
        run, *rest = score_records(f"{name}.onnx")
        Path(f"{name}.jsonl").write_text(lines([{**run, "model": {**run["model"], **changes}}, *rest]))
    record = compare(["fp32.jsonl", "int8.jsonl"])
    validate(json.loads(json.dumps(record)), "compare")
    shown = {words[0]: words for words in (line.split("  ") for line in as_table(record).splitlines())}
    for label, *values in (("method", "stfpm", "duet"), ("image size", "256x256", "64x48"), ("steps", "640", "-"),
                           ("trained", "2026-11-02", "-"), ("base", "0123456789ab", "-"), ("classes", "2", "3")):
        assert [word.strip() for word in shown[label][1:] if word.strip()] == values
    assert "teacher" not in shown  # it is the same


def test_one_model_measured_twice_gets_two_columns(files):
    bench = bench_record(model("build/fp32.onnx"), model("copy/fp32.onnx", "build/fp32.onnx"))
    Path("twice.json").write_text(json.dumps(bench))
    record = compare(["fp32.jsonl", "fp32.jsonl", "twice.json"])
    assert [entry["label"] for entry in record["models"]] == ["fp32.onnx", "fp32.onnx (2)"]
    assert row(record, "latency_p50")["values"] == [10, 5]
    assert row(record, "image_auroc")["intervals"] == [None, (0, 0)]


def on(records: Any, machine: str) -> str:
    """A file of these records, as if it came from this machine."""
    Path(f"{machine}.json").write_text(json.dumps(records).replace('"cpu": "some"', f'"cpu": "{machine}"'))
    return f"{machine}.json"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_bench_result_joins_the_scores_of_its_machine(files, order):
    device = lines(score_records("build/fp32.onnx")).replace('"cpu": "some"', '"cpu": "device"')
    Path("device.jsonl").write_text(device)
    bench = on(bench_record(model("build/fp32.onnx")), "device")
    given = ["fp32.jsonl", "device.jsonl", bench]
    joined = [entry["files"] for entry in compare([given[index] for index in order])["models"]]
    assert sorted(joined, key=len) == [{"scores": "fp32.jsonl"}, {"scores": "device.jsonl", "bench": "device.json"}]
    other = on(bench_record(model("build/fp32.onnx")), "third")
    assert [entry["files"] for entry in compare(["fp32.jsonl", "device.jsonl", other])["models"]][2] == {"bench": other}


def test_the_only_scores_and_the_only_bench_result_of_a_model_are_joined(files):
    bench = on(bench_record(model("build/fp32.onnx")), "device")
    assert [entry["files"] for entry in compare(["fp32.jsonl", bench])["models"]] == [
        {"scores": "fp32.jsonl", "bench": bench}]


@pytest.mark.parametrize(("paths", "labels"), [
    (["a/m.onnx", "b/n.onnx"], ["m.onnx", "n.onnx"]),
    (["a/m.onnx", "b/m.onnx"], ["a/m.onnx", "b/m.onnx"]),
    (["a/x/m.onnx", "b/x/m.onnx", "/a/x/n.onnx"], ["a/x/m.onnx", "b/x/m.onnx", "a/x/n.onnx"]),
    (["m.onnx", "a/m.onnx"], ["m.onnx", "a/m.onnx"]),
    (["m.onnx", "m.onnx", "./m.onnx"], ["m.onnx", "m.onnx (2)", "m.onnx (3)"]),
])
def test_labels_tell_models_apart(tmp_path, paths, labels):
    bench = bench_record(*(model(path, str(index)) for index, path in enumerate(paths)))
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    assert [entry["label"] for entry in compare([str(tmp_path / "bench.json")])["models"]] == labels


def test_scores_without_classes_have_a_pooled_interval(tmp_path):
    names = []
    for name, noise in (("a", 0.0), ("b", 1.0)):
        records = score_records(f"{name}.onnx", noise=noise)
        for image in records[1:-1]:
            image.pop("class", None)
        figure = records[-1]["metrics"]["image_auroc"]
        figure.update(mean=figure["pooled"], per_class={})
        names.append(str(tmp_path / f"{name}.jsonl"))
        Path(names[-1]).write_text(lines(records))
    record = compare(names)
    assert "intervals" not in row(record, "image_auroc")
    assert row(record, "image_auroc.pooled")["intervals"][1]


def test_missing_values_are_null(files):
    Path("one.json").write_text(json.dumps(bench_record(model("build/int8.onnx"))))
    latency = row(compare(["fp32.jsonl", "int8.jsonl", "one.json"]), "latency_p50")
    assert (latency["values"], latency["changes"]) == ([None, 10], [None, None])


def test_records_of_the_real_commands_are_understood(make_detector, mvtec, tmp_path):
    paths = [make_detector(tmp_path / f"{name}.onnx", divisor=divisor) for name, divisor in (("a", 1.0), ("b", 2.0))]
    for path in paths:
        records = score(open_model(str(path)), scoring_samples([str(mvtec)]))
        path.with_suffix(".jsonl").write_text(lines(list(records)))
    measured = measure([str(path) for path in paths], Settings(repetitions=1, duration=0.01, warmup=0))
    (tmp_path / "bench.json").write_text(json.dumps(measured))
    record = compare([str(path.with_suffix(".jsonl")) for path in paths] + [str(tmp_path / "bench.json")])
    assert len(record["rows"]) == 22
    assert all(None not in row["values"] for row in record["rows"])
    assert row(record, "image_auroc")["changes"][1] == 0


# Files that are not what they should be

SUMMARY = {"type": "summary", "images": 0, "errors": 0, "anomalous": 0, "seconds": 1.0, "images_per_second": 0.0}


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no results"),
    ("path,score\na.png,1\n", ":1: not JSON"),
    ("\n[1, 2]", ":2: not a record .* not a JSON object"),
    ('{"a": 1}', ":1: .* it lacks type"),
    ('{"schema": "uadtool.ranges/1"}', ":1: .* 'uadtool.ranges/1' is not expected"),
    ('{"schema": "uadtool.bench/1",\n "models": [{"model"', ":2: not JSON, or cut short"),
    ('{"schema": "uadtool.bench/1", "host": {}, "models": [{"model": {}}]}', ":1: .* it lacks tool"),
    (lines(score_records("m.onnx")[:-1]), ":82: the summary line is missing: the run was interrupted"),
    (lines(score_records("m.onnx")[:9]) + '{"type": "image", "pa', ":10: not JSON, or cut short"),
    (lines(score_records("m.onnx")[1:]), ":1: .* 'image' is not expected here"),
    (lines(score_records("m.onnx")[:5] * 2), ":6: .* 'uadtool.score/1' is not expected here"),
    (lines([score_records("m.onnx")[0], {**SUMMARY, "metrics": {"recall": float("nan")}}]),
     r":2: .* its metrics\.recall must be an object or a finite number \(at least 0, at most 1\)"),
    (lines([score_records("m.onnx")[0], {**SUMMARY, "metrics": []}]), ":2: .* its metrics must be an object"),
    (lines([score_records("m.onnx")[0], SUMMARY]), "no labels; score labelled images"),
])
def test_other_files_are_refused_naming_file_and_line(tmp_path, text, message):
    path = tmp_path / "given.jsonl"
    path.write_text(text)
    with pytest.raises(UadtoolError, match=message) as caught:
        compare([str(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("path", 3, "must be text"), ("path", ["a"], "must be text"), ("path", None, "must be text"),
    ("class", 3, "must be text"), ("label", "bad", "must be good or anomalous"),
    ("label", ["good"], "must be good or anomalous"), ("score", "1", "must be a finite number"),
    ("score", 10**400, "must be a finite number"), ("raw_score", True, "must be a finite number"),
    ("score", float("inf"), "must be a finite number"), ("error", None, None), ("class", None, None),
])
def test_images_are_checked(tmp_path, field, value, message):
    records = score_records("m.onnx")
    records[3][field] = value
    refuse_at(tmp_path, lines(records), 4, message and f"its {field} {message}")


@pytest.mark.parametrize(("field", "value"), [("recall", 1.1), ("recall", -0.1), ("recall", "1"), ("aupro", 3),
                                              ("aupro", {"mean": 2}), ("image_auroc", {"per_class": {"a": 7}}),
                                              ("image_auroc", {"per_class": 7}), ("false_positive_rate", 10**400)])
def test_figures_are_shares(tmp_path, field, value):
    records = score_records("m.onnx")
    records[-1]["metrics"][field] = value
    refuse_at(tmp_path, lines(records), 83, "")


@pytest.mark.parametrize(("field", "value"), [("file_bytes", 0), ("peak_rss_bytes", -1), ("macs", 10**400),
                                              ("latency_ms", {"p50": 0, "p99": 1}), ("gpu_bytes", "1"),
                                              ("throughput", []), ("cold_start_ms", {"median": None})])
def test_measurements_are_above_zero(tmp_path, field, value):
    record = bench_record(model("m.onnx"))
    record["models"][0][field] = value
    refuse_at(tmp_path, json.dumps(record), 1, "")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '{"score": 1' + "0" * 5000 + "}"])
def test_json_that_cannot_be_decoded_is_refused(tmp_path, text):
    refuse_at(tmp_path, "\n" + text, 2, "")


def refuse_at(folder, text, line, message):
    """Without a ``message``, the file is accepted."""
    path = folder / "given.jsonl"
    path.write_text(text)
    if message is None:
        compare([str(path)])
        return
    wanted = rf"given.jsonl:{line}: not a record of a score or bench file: .*{message}"
    with pytest.raises(UadtoolError, match=wanted) as error:
        compare([str(path)])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 200


def test_a_class_of_the_name_pooled_does_not_hide_the_pooled_figure(tmp_path, caplog):
    records = score_records("m.onnx")
    figure = records[-1]["metrics"]["image_auroc"]
    figure["per_class"]["pooled"] = figure["pooled"] / 2
    (tmp_path / "m.jsonl").write_text(lines(records))
    found = row(compare([str(tmp_path / "m.jsonl")]), "image_auroc.pooled")
    assert found["values"] == [figure["pooled"]]
    assert found["label"] == "image AUROC, pooled"
    assert "the class 'pooled' is left out" in caplog.text


def test_missing_and_binary_files_are_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07\xff\xfe")
    with pytest.raises(UadtoolError, match=r"model\.onnx is not a score or bench file: it is not text"):
        compare([str(tmp_path / "model.onnx")])
    with pytest.raises(UadtoolError, match=r"cannot read .*: No such file"):
        compare([str(tmp_path / "missing")])


def test_a_file_cut_anywhere_is_refused(tmp_path):
    records = score_records("m.onnx")
    text = lines([*records[:2], records[-1]])
    path = tmp_path / "cut.jsonl"
    for end in range(0, len(text) - 1, 3):
        path.write_text(text[:end])
        with pytest.raises(UadtoolError):
            compare([str(path)])


# Gates

METRIC_NAMES = st.one_of(
    st.sampled_from(["image_auroc", "image_auroc.pooled", "image_auroc.metal nut", "file_size", "latency_p50"]),
    st.text(min_size=1).filter(lambda text: not set("<>=") & set(text)).map(str.strip).filter(bool),
)
NUMBERS = st.one_of(st.integers(0, 10_000).map(float), st.floats(0, 1e9).map(lambda value: float(f"{value:.12g}")))
GATES = st.one_of(
    st.builds(Gate, METRIC_NAMES, st.sampled_from([">=", "<=", ">", "<"]), NUMBERS, st.sampled_from([None, "ratio"])),
    st.builds(lambda metric, number, sign: Gate(metric, ">=", sign * number, "difference"), METRIC_NAMES, NUMBERS,
              st.sampled_from([-1, 1])),
)


@given(GATES, st.sampled_from(["", " ", "  "]))
def test_gates_survive_being_written_and_read(gate, space):
    assert Gate.parse(f"{space}{gate}{space}") == gate
    assert Gate.parse(str(gate).replace(gate.operator, space + gate.operator + space)) == gate


PIECES = st.sampled_from(["recall", " ", ">=", "<", "=", "+", "-", "1", ".5", "e3", "x"])


@given(st.lists(PIECES, max_size=6).map("".join))
def test_only_sign_and_x_decide_the_kind_of_a_gate(text):
    try:
        gate = Gate.parse(text)
    except ValueError:
        return
    metric, number = (part.strip() for part in text.split(gate.operator))
    assert gate.metric == metric
    assert (gate.change == "ratio") == number.endswith("x")
    assert (gate.change == "difference") == (number[0] in "+-")
    assert gate.number == float(number.rstrip("x"))


@pytest.mark.parametrize("text", [
    "", "recall", "recall>=", ">=1", "recall=>1", "recall==1", "recall=1", "recall>=one", "recall>=-1x", "recall>=1 x",
    "recall>=1X", "recall>=1>2", "recall>=nan", "recall>=inf", "recall>=1_0", "recall>=--1", "recall>=٣", "recall>=1%",
])
def test_invalid_gates(text):
    with pytest.raises(ValueError, match="METRIC OP NUMBER"):
        Gate.parse(text)


def given_rows(*values: Optional[float]) -> Dict[str, Any]:
    return {"models": [{"label": "abc"[index]} for index in range(len(values))],
            "rows": [{"metric": "recall", "values": list(values)}]}


@pytest.mark.parametrize(("gate", "values", "failing"), [
    ("recall>=0.9", (0.9, 0.95), ""),
    ("recall>0.9", (0.9, 0.95), "a"),
    ("recall<=0.9", (0.8, 0.95, 0.91), "bc"),
    ("recall<0.9", (0.9,), "a"),
    ("recall>=-0.01", (0.99, 0.98, 0.97), "c"),  # 0.98 - 0.99 is less than -0.01 in binary
    ("recall>=+0.01", (0.5, 0.51, 0.5), "c"),
    ("recall>-0", (0.5, 0.5), "b"),
    ("recall>=1.6x", (1, 1.6, 1.5), "c"),
    ("recall<=0.1x", (3, 0.3), ""),
])
def test_gates_fail_for_the_models_that_do_not_meet_them(gate, values, failing):
    failures = list(Gate.parse(gate).failures(given_rows(*values)))
    assert [failure[0] for failure in failures] == list(failing)


def test_failures_name_model_metric_value_and_condition():
    record = given_rows(0.99, 0.95)
    assert list(Gate.parse("recall>=0.98").failures(record)) == ["b: recall is 0.95, wanted >= 0.98"]
    assert list(Gate.parse("recall>=-0.01").failures(record)) == ["b: recall is -0.04, wanted >= -0.01"]
    assert list(Gate.parse("recall<=0.5x").failures(record)) == ["b: recall is 0.95959596x, wanted <= 0.5x"]


@pytest.mark.parametrize(("gate", "values", "message"), [
    ("aupro>=0.9", (0.9, 0.9), "hold no aupro; they hold recall"),
    ("recall>=-0.1", (0.9,), "second model"),
    ("recall>=0.9", (0.9, None), "cannot be decided for b"),
    ("recall>=-0.1", (None, 0.9), "cannot be decided for b"),
    ("recall>=1x", (0, 0.9), "cannot be decided for b"),
])
def test_gates_that_cannot_be_decided_are_errors(gate, values, message):
    with pytest.raises(UadtoolError, match=message):
        list(Gate.parse(gate).failures(given_rows(*values)))


def test_help_names_every_metric_of_a_gate():
    assert command.help
    named = set(re.findall(r"[a-z0-9_.]+[a-z0-9]", command.help.partition("Metrics from score:")[2]))
    assert set(METRICS) <= named


# What is printed


def test_table_has_a_column_per_model_and_per_change(files):
    text = table.as_table(compare(["fp32.jsonl", "int8.jsonl", "bench.json"]))
    head, *rest = [line.split("  ") for line in text.splitlines()]
    assert [cell.strip() for cell in head if cell] == ["metric", "fp32.onnx", "int8.onnx", "change"]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rest}
    assert cells["latency p50, ms"] == ["10.00", "5.00", "0.50x"]
    assert cells["file size, MB"] == ["12.0", "6.0", "0.50x"]
    first, second, change = (float(cell) for cell in cells["image AUROC, pooled"])
    assert change == pytest.approx(second - first, abs=2e-4)
    low, high = cells["95% interval"][0].split("..")
    assert float(low) < float(high) < 0


def test_table_of_three_models_fits_into_100_columns(files):
    Path("third.jsonl").write_text(lines(score_records("efficientnet-stfpm-int8-entropy.onnx", noise=2.0)))
    text = table.as_table(compare(["fp32.jsonl", "int8.jsonl", "third.jsonl", "bench.json"]))
    assert max(map(len, text.splitlines())) <= 100
    assert "entropy.onnx" in text


def test_classes_have_intervals_in_the_table_while_it_fits_on_a_screen(files):
    record = compare(["fp32.jsonl", "int8.jsonl"])
    assert table.as_table(record).count("95% interval") == 4
    record["rows"][3:3] = [{**row(record, "image_auroc.nut"), "metric": f"image_auroc.{index}"} for index in range(40)]
    assert table.as_table(record).count("95% interval") == 2
    assert table.as_csv(record).count(",-0.") > 40


def test_the_table_shows_how_models_were_quantized(files):
    text = table.as_table(compare(["fp32.jsonl", "int8.jsonl"]))
    assert "calibration" not in text  # nothing to tell
    records = score_records("entropy.onnx", noise=0.5)
    records[0]["model"] |= {"precision": "mixed", "quantization": {
        "method": "ptq", "calibration": "entropy", "source": "good+synthetic-anomalies", "scope": "student",
        "float_layers": 3}}
    validate(records[0], "score")
    Path("entropy.jsonl").write_text(lines(records))
    record = compare(["fp32.jsonl", "entropy.jsonl"])
    validate(json.loads(json.dumps(record)), "compare")
    assert record["models"][1]["quantization"] == records[0]["model"]["quantization"]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]]
             for line in table.as_table(record, markdown=True).splitlines()}
    assert cells["precision"] == ["fp32", "mixed"]
    assert cells["quantized by"] == ["-", "ptq"]
    assert cells["calibration"] == ["-", "entropy"]
    assert cells["calibrated on"] == ["-", "good+synthetic-anomalies"]
    assert cells["quantized networks"] == ["-", "student"]
    assert cells["layers in float"] == ["-", "3"]
    assert max(map(len, table.as_table(record).splitlines())) <= 80


def test_the_table_shows_runtime_and_machine_where_they_differ(files):
    assert "machine" not in table.as_table(compare(["fp32.jsonl", "int8.jsonl"]))
    records = score_records("int8.onnx")
    records[0]["host"] = {**HOST, "board": "NVIDIA Jetson Xavier NX Developer Kit"}
    records[0]["runtime"] = {"name": "tensorrt", "version": "8.5.2.2", "threads": 6, "streams": 1}
    Path("device.jsonl").write_text(lines(records))
    record = compare(["fp32.jsonl", "device.jsonl"])
    validate(json.loads(json.dumps(record)), "compare")
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]]
             for line in table.as_table(record, markdown=True).splitlines()}
    assert cells["runtime"] == ["onnxruntime 1.23.0", "tensorrt 8.5.2.2"]
    assert cells["machine"] == ["some", "NVIDIA Jetson Xavier NX Developer Kit"]


def test_markdown_is_one_table(files):
    text = table.as_table(compare(["fp32.jsonl", "int8.jsonl"]), markdown=True)
    head, rule, *rest = text.splitlines()
    assert head.count("|") == rule.count("|") == 5
    assert all(line.count("|") == 5 for line in rest)


def test_csv_has_a_line_per_metric_and_model(files):
    record = compare(["fp32.jsonl", "int8.jsonl", "bench.json"])
    rows = list(csv.DictReader(io.StringIO(table.as_csv(record))))
    assert len(rows) == 2 * len(record["rows"])
    found = {(line["metric"], line["model"]): line for line in rows}
    assert found["latency_p50", "int8.onnx"]["ratio"] == "0.5"
    assert found["latency_p50", "int8.onnx"]["difference"] == ""
    line = found["image_auroc", "int8.onnx"]
    assert float(line["low"]) < float(line["difference"]) < float(line["high"])


def test_command_prints_the_record_and_takes_stdin(files):
    found = run("--format", "json", "-", "bench.json", given=Path("fp32.jsonl").read_text())
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)["models"][0]["files"] == {"scores": "stdin", "bench": "bench.json"}
    several = run("--format", "csv", "-", given=Path("bench.json").read_text() + Path("int8.jsonl").read_text())
    assert several.stdout.splitlines()[1].startswith("image_auroc,,higher,fp32.onnx,")


def test_command_prints_the_table_then_all_failed_gates_and_exits_with_4(files):
    found = run("fp32.jsonl", "int8.jsonl", "bench.json", "--gate", "image_auroc>=-0.01", "--gate", "latency_p50<=7",
                "--gate", "file_size<=0.5x")
    assert found.returncode == 4
    assert found.stdout.startswith("metric")
    failures = [line for line in found.stderr.splitlines() if "gate failed" in line]
    assert "int8.onnx: image_auroc is -0." in failures[0]
    assert "fp32.onnx: latency_p50 is 10, wanted <= 7" in failures[1]
    assert len(failures) == 2


def test_junit_has_a_case_per_gate_also_when_they_fail(files):
    found = run("fp32.jsonl", "int8.jsonl", "bench.json", "--junit", "gates.xml", "--gate", "image_auroc>=-0.01",
                "--gate", "file_size<=0.5x", "--gate", "latency_p50 < 4")
    assert found.returncode == 4
    suite, = ElementTree.parse("gates.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "2", "0")
    cases = {case.get("name"): [(part.tag, part.get("message")) for part in case] for case in suite}
    (kind, message), = cases["image_auroc>=-0.01"]
    assert kind == "failure"
    assert message.startswith("int8.onnx: image_auroc is -0.")
    assert cases["file_size<=0.5x"] == []
    assert cases["latency_p50<4"] == [
        ("failure", "fp32.onnx: latency_p50 is 10, wanted < 4; int8.onnx: latency_p50 is 5, wanted < 4")]


def test_junit_reports_gates_that_cannot_be_decided(files):
    found = run("fp32.jsonl", "--junit", "gates.xml", "--gate", "recall>0.1", "--gate", "latency_p50<=7")
    assert (found.returncode, found.stdout) == (1, "")
    suite, = ElementTree.parse("gates.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "0", "1")
    assert "hold no latency_p50" in suite[1][0].get("message")


@given(st.text(min_size=1), st.lists(st.text(), max_size=3))
def test_junit_can_be_read_whatever_the_names(metric, failures):
    suite, = ElementTree.fromstring(as_junit([Verdict(Gate(metric, ">=", 1.0), failures)]))
    assert len(suite) == 1
    assert len(suite[0]) == bool(failures)


def test_junit_tells_apart_names_that_xml_cannot_hold():
    suite, = ElementTree.fromstring(as_junit([Verdict(Gate(metric, ">=", 1.0), []) for metric in ("\udce4", "\udcf6")]))
    assert [case.get("name") for case in suite] == [r"\udce4>=1", r"\udcf6>=1"]


def test_command_exits_with_0_when_gates_are_met(files):
    found = run("fp32.jsonl", "int8.jsonl", "bench.json", "--gate", "image_auroc>=-0.9", "--gate", "throughput >= 1.6x")
    assert (found.returncode, found.stderr) == (0, "")


def test_command_writes_a_file_whole_or_not_at_all(files):
    for style in ("table", "csv", "json", "markdown", "html"):
        found = run("fp32.jsonl", "bench.json", "--format", style, "-o", "out")
        assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
        assert Path("out").read_text() == run("fp32.jsonl", "bench.json", "--format", style).stdout
    assert run("fp32.jsonl", "bench.json", "-o", "-").stdout == run("fp32.jsonl", "bench.json").stdout
    assert not Path("-").exists()
    missing = run("fp32.jsonl", "-o", "bench.json/file")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("uadtool: error: cannot write bench.json/file: ")


# Images that changed sides


def test_changed_images_come_with_both_scores_the_one_that_moved_farthest_first(files):
    found = run("fp32.jsonl", "int8.jsonl", "bench.json", "--changed")
    assert (found.returncode, found.stderr) == (0, "")
    changed = [json.loads(line) for line in found.stdout.splitlines()]
    images = [{record["path"]: record for record in score_records("m.onnx", noise=noise) if "score" in record}
              for noise in (0.0, 1.0)]
    different = {path for path in images[0] if images[0][path]["anomalous"] != images[1][path]["anomalous"]}
    assert {record["path"] for record in changed} == different
    assert len(different) > 3
    for record in changed:
        validate(record, "changed")
        before, after = (entry[record["path"]] for entry in images)
        assert record["scores"] == [before["score"], after["score"]]
        assert (record["class"], record["label"]) == (before["class"], before["label"])
        assert record["models"] == ["fp32.onnx", "int8.onnx"]
        assert record["moved"] == pytest.approx(after["score"] - before["score"])
        assert (record["moved"] > 0) == after["anomalous"]
    moved = [abs(record["moved"]) for record in changed]
    assert moved == sorted(moved, reverse=True)


def test_changed_images_do_not_keep_gates_from_failing(files):
    found = run("fp32.jsonl", "int8.jsonl", "--changed", "--gate", "image_auroc>=-0.01", "--junit", "gates.xml")
    assert found.returncode == 4
    assert all(json.loads(line)["type"] == "changed" for line in found.stdout.splitlines())
    assert Path("gates.xml").exists()


def test_images_without_labels_also_change_sides(files):
    for name, value in (("a", 1.0), ("b", 3.0)):
        run_line, image, *_, summary = score_records(f"{name}.onnx")
        image = {key: value for key, value in image.items() if key not in ("class", "label")}
        del summary["metrics"]
        Path(f"{name}.jsonl").write_text(lines([run_line, {**image, "score": value, "anomalous": value > 2}, summary]))
    found = run("a.jsonl", "b.jsonl", "--changed")
    record = json.loads(found.stdout)
    validate(record, "changed")
    assert (record["scores"], record["thresholds"], record["moved"]) == ([1, 3], [2, 2], 2)
    assert "label" not in record


def test_changed_images_need_two_models_with_scores_of_the_same_images(files):
    Path("other.jsonl").write_text(lines(score_records("other.onnx", folder="elsewhere")))
    for arguments, message in ((["fp32.jsonl", "bench.json"], "need the scores of two models"),
                               (["fp32.jsonl", "other.jsonl"], "no image in common")):
        found = run(*arguments, "--changed")
        assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "", 1)
        assert message in found.stderr
    some = score_records("some.onnx")
    Path("some.jsonl").write_text(lines([*some[:9], some[-1]]))
    assert "share 8 images" in run("fp32.jsonl", "some.jsonl", "--changed").stderr


def test_bad_usage_and_bad_input_have_different_exit_codes(files):
    assert run("fp32.jsonl", "--gate", "recall=>1").returncode == 2
    assert run("fp32.jsonl", "--changed", "--format", "csv").returncode == 2
    assert run("fp32.jsonl", "--junit", "gates.xml").returncode == 2
    assert run().returncode == 2
    unknown = run("fp32.jsonl", "--gate", "latency_p50<=7")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.count("\n") == 1


def test_command_prints_names_that_are_not_utf8(files):
    Path("odd.json").write_text(json.dumps(bench_record(model("caf\udce9.onnx"))))
    for style in ("table", "csv", "markdown"):
        found = run("odd.json", "--format", style)
        assert (found.returncode, found.stderr) == (0, "")
        assert r"caf\udce9" in found.stdout
