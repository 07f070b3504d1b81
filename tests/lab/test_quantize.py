"""The step and its command."""

import json
import shutil
from fnmatch import fnmatchcase

import click
import pytest
import torch
from conftest import validate

from uadtool.cli.calibrate import calibrate as calibrate_command
from uadtool.cli.quantize import quantize as command
from uadtool.errors import UadtoolError
from uadtool.files import file_digest
from uadtool.lab.detectors.contract import STATISTICS
from uadtool.lab.models import load_float_model, load_model
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ranges import RangesFile
from uadtool.lab.quantize import Recipe, apply_recipe


def run(*arguments):
    command.main([str(argument) for argument in arguments], standalone_mode=False)


def printed(capsys, *arguments):
    run(*arguments)
    record = json.loads(capsys.readouterr().out)
    validate(record, "quantize")
    return record


# The result


def test_int8_files_are_a_fifth_to_a_third_of_the_float_files(trained, quantized, fp32, int8):
    for one, other in ((trained, quantized), (fp32, int8)):
        assert 1 / 5 < other.path.stat().st_size / one.path.stat().st_size < 1 / 3


def test_the_quantized_file_records_the_source_of_its_ranges(trained, calibrated, quantized):
    float_metadata = load_float_model(trained.path)[1]
    metadata = load_model(quantized.path)[1]
    assert (metadata.precision, metadata.target) == ("int8", "onnxruntime")
    *earlier, step = metadata.provenance
    assert earlier == float_metadata.provenance
    assert (step["command"], step["model_digest"]) == ("quantize", trained.record["digest"])
    source = json.loads(calibrated.path.read_text())["source"]
    assert {"method": "mse", "source": source}.items() <= step["calibration"].items()
    assert metadata.threshold == float_metadata.threshold


@pytest.fixture(scope="module")
def corrected(trained, calibrated, step, textures, tmp_path_factory):
    """Quantized with the data set, which has moved since the training."""
    elsewhere = tmp_path_factory.mktemp("moved") / "elsewhere"
    shutil.copytree(textures, elsewhere)
    done = step("quantize", trained.path, elsewhere, "--ranges", calibrated.path, output="corrected.safetensors")
    validate(done.record, "quantize")
    return done


def test_data_keeps_the_maps_closer(trained, calibrated, corrected, textures, tmp_path, capsys):
    output = tmp_path / "int8.safetensors"
    plain = printed(capsys, trained.path, textures, "--ranges", calibrated.path, "-o", output, "--no-bias-correction")
    assert 0 < corrected.record["map_distance"] < plain["map_distance"]
    assert load_model(output)[1].provenance[-1]["bias_correction"] is False


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("tensorrt", marks=pytest.mark.slow)])
def test_layers_of_a_pattern_stay_float(trained, calibrated, tmp_path, capsys, target):
    float_model, metadata = load_float_model(trained.path)
    layers = QuantizationPlan(float_model).layers
    record = printed(capsys, trained.path, "--target", target, "-o", tmp_path / "mixed.safetensors", "--ranges",
                     calibrated.path, "--keep-float", "student.*.conv_dw", "--keep-float", layers[0])
    model, loaded = load_model(tmp_path / "mixed.safetensors")
    assert (loaded.target, loaded.precision, loaded.threshold) == (target, "mixed", metadata.threshold)
    expected = [name for name in layers if name == layers[0] or fnmatchcase(name, "student.*.conv_dw")]
    assert record["float_layers"] == loaded.quantization.float_layers == expected
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        float_score, score = float_model(images).score, model(images).score
    assert (float_score - score).abs().max() < 0.3 * float_score.abs().max()


@pytest.mark.slow
def test_the_most_sensitive_layers_stay_float(trained, calibrated, textures, tmp_path, capsys):
    record = printed(capsys, trained.path, textures, "--ranges", calibrated.path, "--scope", "student", "--keep-float",
                     "auto:2", "-o", tmp_path / "mixed.safetensors")
    distances = [entry["map_distance"] for entry in record["sensitivity"]]
    assert distances == sorted(distances, reverse=True)
    worst = {entry["layer"] for entry in record["sensitivity"][:2]}
    assert worst < set(record["float_layers"])
    assert {name for name in record["float_layers"] if name.startswith("student.")} == worst
    quantization = load_model(tmp_path / "mixed.safetensors")[1].quantization
    assert (quantization.scope, quantization.method, quantization.calibration) == ("student", "ptq", "mse")


def test_the_float_model_keeps_its_statistics(trained, calibrated, textures, tmp_path):
    detector, metadata = load_float_model(trained.path)
    before = {name: detector.get_buffer(name).clone() for name in STATISTICS}
    result = apply_recipe(detector, metadata, file_digest(trained.path), RangesFile.read(str(calibrated.path)),
                          str(textures), Recipe(scope="student"), tmp_path / "checkpoint")
    for name, value in before.items():
        assert torch.equal(detector.get_buffer(name), value)
        assert not torch.equal(result.model.get_buffer(name), value)


def test_fine_tuning_leaves_only_the_model(trained, calibrated, textures, tmp_path, capsys):
    record = printed(capsys, trained.path, textures, "--ranges", calibrated.path, "-o", tmp_path / "int8.safetensors",
                     "--qat", "--steps", 2, "--scope", "student")
    assert record["method"] == load_model(tmp_path / "int8.safetensors")[1].quantization.method == "qat"
    assert [path.name for path in tmp_path.iterdir()] == ["int8.safetensors"]  # the checkpoint is gone


def test_a_slow_combination_of_activation_and_runtime_is_reported(trained, calibrated, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(QuantizationPlan, "smooth_activations", lambda plan: {"SiLU"})
    for target in ("openvino", "onnxruntime"):
        assert "SiLU" not in caplog.text
        run(trained.path, "--ranges", calibrated.path, "-o", tmp_path / "a.safetensors", "--target", target)
    assert "ONNX Runtime computes SiLU in float" in caplog.text


# Refusals


def test_ranges_of_another_file_are_refused_with_both_digests(trained, calibrated, tmp_path):
    record, other = json.loads(calibrated.path.read_text()), f"sha256:{64 * '0'}"
    (tmp_path / "ranges.json").write_text(json.dumps({**record, "model_digest": other}))
    with pytest.raises(UadtoolError, match="run calibrate with this model") as error:
        run(trained.path, "--ranges", tmp_path / "ranges.json", "-o", tmp_path / "int8.safetensors")
    assert other in str(error.value)
    assert trained.record["digest"] in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ranges.json"]


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "moved"])
def test_images_that_the_model_was_not_trained_on_are_refused(trained, calibrated, corrected, textures, tmp_path,
                                                              change):
    assert corrected.path.exists()  # the same data set under another path
    shutil.copytree(textures, tmp_path / "elsewhere")
    image = sorted((tmp_path / "elsewhere").glob("*/train/good/*"))[0]
    output = tmp_path / "int8.safetensors"
    options = [trained.path, tmp_path / "elsewhere", "--ranges", calibrated.path, "-o", output]
    if change == "added":
        shutil.copy(image, image.with_name("new.png"))
    elif change == "moved":  # another order, and so others would be held out
        (image.parent / "z").mkdir()
        image.rename(image.parent / "z" / image.name)
    else:
        image.rename(image.with_name("new.png") if change == "renamed" else tmp_path / "removed.png")
    with pytest.raises(UadtoolError, match="these are not the good images that the model was trained on"):
        run(*options)
    assert not output.exists()


@pytest.mark.parametrize("pattern", ["teacher.nothing", "*.conv_9"])
def test_an_unknown_layer_pattern_is_refused(trained, calibrated, tmp_path, pattern):
    with pytest.raises(UadtoolError, match="no layer is named"):
        run(trained.path, "--ranges", calibrated.path, "-o", tmp_path / "a.safetensors", "--keep-float", pattern)
    with pytest.raises(UadtoolError, match="every layer would stay float"):
        run(trained.path, "--ranges", calibrated.path, "-o", tmp_path / "a.safetensors", "--keep-float", "*")


def test_too_many_sensitive_layers_are_refused_before_they_are_measured(trained, calibrated, textures, tmp_path,
                                                                        monkeypatch):
    monkeypatch.delattr("uadtool.lab.quantize.layer_sensitivity")
    with pytest.raises(UadtoolError, match="every layer would stay float"):
        run(trained.path, textures, "--ranges", calibrated.path, "-o", tmp_path / "a.safetensors", "--keep-float",
            "auto:999")


@pytest.mark.parametrize(("options", "message"), [
    (["--keep-float", "auto:0"], "auto:N takes one positive integer"),
    (["--keep-float", "auto:2"], "Missing argument 'DATA'"),
    (["--sensitivity"], "Missing argument 'DATA'"),
    (["--qat"], "Missing argument 'DATA'"),
    (["--precision", "fp16"], "require int8"),
    (["--steps", "200"], "--steps and --resume require --qat"), (["--resume"], "--steps and --resume require --qat"),
    (["--no-bias-correction"], "--no-bias-correction requires int8 and DATA"),
    (["--ranges", ""], "Missing option '--ranges'"),
])
def test_options_that_do_not_fit_are_wrong_usage(trained, calibrated, tmp_path, options, message):
    with pytest.raises(click.UsageError, match=message):
        run(trained.path, "--ranges", calibrated.path, "-o", tmp_path / "a.safetensors", *options)


def test_the_data_set_is_not_overwritten(trained, calibrated, tmp_path):
    manifest = tmp_path / "parts.csv"
    manifest.write_text("path,label\n")
    with pytest.raises(UadtoolError, match="is an input of this command"):
        run(trained.path, manifest, "--ranges", calibrated.path, "-o", manifest)
    for arguments in ([manifest], ["--source", f"images:{manifest}"]):
        with pytest.raises(UadtoolError, match="is an input of this command"):
            calibrate_command.main([str(a) for a in (trained.path, *arguments, "-o", manifest)], standalone_mode=False)
    assert manifest.read_text() == "path,label\n"
