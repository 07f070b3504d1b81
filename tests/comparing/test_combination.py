"""compare --combine: the scores of several models for the same images."""

import json

import numpy as np
import pytest
import records
from conftest import run_here, validate
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from uadtool.comparing.combination import combined
from uadtool.comparing.comparison import join, set_side_by_side
from uadtool.data.samples import tail_digest
from uadtool.errors import UadtoolError
from uadtool.scoring.thresholds import threshold_at

CLASSES = ("bolt", "nut")


def score_file(folder, number, root="data", missing=(), held_out=range(40)):
    """Scores of 80 images by a model, which becomes worse with its ``number``, and its scores of held-out images."""
    random = np.random.default_rng(number)
    run, *images, summary = records.score_records(f"{number}.onnx", noise=float(number), folder=root)
    run["held_out"] = {"false_positive_rate": 0.0, "scores": {
        name: {tail_digest(f"{name}/train/good/{image}.png"): round(float(random.normal()), 4) for image in held_out}
        for name in CLASSES}}
    kept = [image for place, image in enumerate(images) if place not in missing]
    path = folder / f"{number}.jsonl"
    path.write_text(records.lines([run, *kept, summary]))
    return str(path)


@pytest.mark.parametrize(("how", "combine"), [("mean", np.mean), ("max", np.max)])
def test_scores_and_thresholds_are_those_of_the_pairs(tmp_path, how, combine):
    models = join([score_file(tmp_path, number, f"device-{number}/line/parts") for number in (1, 2, 3)])
    result = combined(models, how).scores
    parts = [{path.partition("/")[2]: image for path, image in model.scores.images.items()} for model in models]
    assert len(result.images) == 80
    for path, image in result.images.items():
        expected = combine([part[path.partition("/")[2]].score for part in parts])
        assert image.score == pytest.approx(expected, rel=1e-5)
        assert image.anomalous == (image.score > image.threshold)
    pairs = {name: [combine(values) for values in zip(*(model.scores.held_out["scores"][name].values()
                                                        for model in models))] for name in CLASSES}
    common = max(max(values) for values in pairs.values())
    assert result.thresholds.common == pytest.approx(common)
    # 40 images of the class count, and 20 times the common threshold.
    assert result.thresholds.of("bolt") == pytest.approx((40 * max(pairs["bolt"]) + 20 * common) / 60, rel=1e-5)


def test_the_column_has_figures_of_its_own(uadtool, tmp_path):
    files = [score_file(tmp_path, number) for number in (1, 2)]
    done = uadtool("compare", *files, "--combine", "mean", "--format", "json")
    record = json.loads(done.stdout)
    validate(record, "compare")
    assert [model["label"] for model in record["models"]] == ["1.onnx", "2.onnx", "mean"]
    a, b = (model.scores for model in join(files))
    labels = [image.label == "anomalous" for image in a.images.values()]
    expected = roc_auc_score(labels, [(image.score + b.images[path].score) / 2 for path, image in a.images.items()])
    row = next(row for row in record["rows"] if row["metric"] == "image_auroc.pooled")
    assert row["values"][2] == pytest.approx(expected, abs=1e-4)
    assert record["models"][2]["path"] == "mean of 1.onnx, 2.onnx"
    for style in ("table", "csv", "html"):
        assert "mean" in uadtool("compare", *files, "--combine", "mean", "--format", style).stdout


def test_an_image_that_one_device_saw_counts_with_its_own_threshold(tmp_path):
    models = join([score_file(tmp_path, 1, missing={0, 5}), score_file(tmp_path, 2, missing={7})])
    a, b = (model.scores.images for model in models)
    result = combined(models, "mean").scores.images
    assert len(result) == 80
    for images, other in ((a, b), (b, a)):
        alone = images.keys() - other.keys()
        assert alone
        assert all(result[path] == images[path] for path in alone)


def test_two_of_three_devices_have_a_threshold_together(tmp_path):
    models = join([score_file(tmp_path, 1), score_file(tmp_path, 2, missing={4}), score_file(tmp_path, 3, missing={8})])
    pair = combined([models[0], models[2]], "mean").scores.images
    path = "data/bolt/004.png"
    assert combined(models, "mean").scores.images[path] == pair[path]


def test_the_latency_is_that_of_the_slowest(tmp_path):
    files = [score_file(tmp_path, number) for number in (1, 2)]
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(records.bench_record(records.model("1.onnx"), records.model("2.onnx"))))
    def rows(*files):
        models = join(list(map(str, files)))
        record = json.loads(json.dumps(set_side_by_side([*models, combined(models, "max")])))
        validate(record, "compare")
        return {row["metric"]: row["values"] for row in record["rows"]}

    assert rows(*files, bench)["latency_p50"] == [10, 5, 10]
    assert rows(*files, bench)["throughput"] == [130, 260, 130]
    assert rows(*files, bench)["file_size"][2] is None
    assert rows(*files)["recall"][2] is not None


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=60), st.floats(0, 0.4))
def test_at_most_the_share_of_pairs_is_above_the_threshold(pairs, rate):
    means = [float(np.mean(pair)) for pair in pairs]
    assert np.mean(np.array(means) > threshold_at(means, rate)) <= rate + 1e-9


def test_other_rates_are_refused(tmp_path):
    files = [score_file(tmp_path, number) for number in (1, 2)]
    text = (tmp_path / "2.jsonl").read_text()
    (tmp_path / "2.jsonl").write_text(text.replace('"false_positive_rate": 0.0', '"false_positive_rate": 0.05'))
    with pytest.raises(UadtoolError, match="scored at different false-positive rates"):
        run_here("compare", *files, "--combine", "mean")


def test_all_files_are_named(tmp_path):
    """Also those of merged runs."""
    first, second = score_file(tmp_path, 1), score_file(tmp_path, 2)
    run, *images, summary = (tmp_path / "1.jsonl").read_text().splitlines()
    parts = []
    for number, some in enumerate((images[:40], images[40:])):
        parts.append(tmp_path / f"part-{number}.jsonl")
        parts[-1].write_text("\n".join([run, *some, summary]) + "\n")
    models = join([*map(str, parts), second])
    assert combined(models, "mean").scores.shards == (*map(str, parts), second)
    assert combined(models, "mean").scores.images == combined(join([first, second]), "mean").scores.images


@pytest.mark.parametrize(("second", "message"), [
    (None, "needs the scores of two models"),
    ({"root": "data/elsewhere/other"}, "have no image in common"),
    ({"held_out": range(50, 60)}, "held out no image in common.*same --seed and --held-out"),
    ({"held_out": ()}, "held out no image in common"),
])
def test_what_cannot_be_combined_is_refused(tmp_path, second, message):
    files = [score_file(tmp_path, 1), *([score_file(tmp_path, 2, **second)] if second else [])]
    with pytest.raises(UadtoolError, match=message):
        run_here("compare", *files, "--combine", "mean")
