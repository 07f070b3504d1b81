import errno
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uadtool.data.dataset import scoring_samples, training_samples
from uadtool.data.samples import Sample
from uadtool.data.splits import balanced, split_held_out
from uadtool.errors import UadtoolError


def draw(path: Path, size: Sequence[int] = (8, 6), **options: object) -> Path:
    """A small image that differs from all other test images: its pixels come from its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.Random(os.fsencode(path)).choices(range(256), k=3 * size[0] * size[1])
    Image.frombytes("RGB", (size[0], size[1]), bytes(pixels)).save(path, **options)
    return path


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    """Classes bolt and nut, each with three good training images and a test split; masks only for bolt."""
    root = tmp_path / "mvtec"
    for name in ("bolt", "nut"):
        for stem in ("000", "001", "002"):
            draw(root / name / "train" / "good" / f"{stem}.png")
        draw(root / name / "test" / "good" / "000.png")
        draw(root / name / "test" / "crack" / "000.png")
    draw(root / "bolt" / "test" / "rust" / "000.png")
    draw(root / "bolt" / "ground_truth" / "crack" / "000_mask.png")
    draw(root / "bolt" / "ground_truth" / "rust" / "000.png")
    (root / "license.txt").write_text("free")
    draw(root / ".trash" / "train" / "good" / "000.png")
    return root


def fails(*args: object) -> str:
    with pytest.raises(UadtoolError) as caught:
        training_samples(*args)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_training_images_of_all_classes(mvtec: Path) -> None:
    assert training_samples(str(mvtec)) == [
        Sample(str(mvtec / name / "train" / "good" / f"{stem}.png"), name, "good")
        for name in ("bolt", "nut") for stem in ("000", "001", "002")
    ]


def test_chosen_classes_only(mvtec: Path) -> None:
    assert "no class screw; it has bolt, nut" in fails(str(mvtec), ["bolt", "screw"])
    assert {sample.class_name for sample in training_samples(str(mvtec), ["nut"])} == {"nut"}
    (mvtec / "empty").mkdir()
    assert len(training_samples(str(mvtec), ["nut", "bolt", "nut"])) == 6


def test_test_split_of_all_classes(mvtec: Path) -> None:
    found = [
        (os.path.relpath(s.path, mvtec), s.class_name, s.label, [os.path.relpath(mask, mvtec) for mask in s.masks])
        for s in scoring_samples([str(mvtec)])
    ]
    assert found == [
        ("bolt/test/crack/000.png", "bolt", "anomalous", ["bolt/ground_truth/crack/000_mask.png"]),
        ("bolt/test/good/000.png", "bolt", "good", []),
        ("bolt/test/rust/000.png", "bolt", "anomalous", ["bolt/ground_truth/rust/000.png"]),
        ("nut/test/crack/000.png", "nut", "anomalous", []),
        ("nut/test/good/000.png", "nut", "good", [])]


def test_class_folder(mvtec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [sample for sample in training_samples(str(mvtec)) if sample.class_name == "bolt"]
    assert training_samples(str(mvtec / "bolt")) == whole
    assert len(list(scoring_samples([f"{mvtec}/bolt/"]))) == 3
    monkeypatch.chdir(mvtec / "bolt")
    assert training_samples(".")[0] == Sample("train/good/000.png", "bolt", "good")


def test_class_folder_is_named_as_it_was_given(mvtec: Path) -> None:
    (mvtec.parent / "latest").symlink_to(mvtec / "nut")
    assert {sample.class_name for sample in training_samples(str(mvtec.parent / "latest"))} == {"latest"}


def test_loose_test_images_have_no_label(mvtec: Path) -> None:
    loose = draw(mvtec / "nut" / "test" / "new.png")
    assert Sample(str(loose), "nut") in scoring_samples([str(mvtec)])


def test_nested_defects_have_nested_masks(mvtec: Path) -> None:
    draw(mvtec / "bolt" / "test" / "crack" / "line2" / "a.JPG")
    mask = draw(mvtec / "bolt" / "ground_truth" / "crack" / "line2" / "a_mask.png")
    assert [s.masks for s in scoring_samples([str(mvtec)]) if s.path.endswith("a.JPG")] == [(str(mask),)]


def test_images_outside_the_layout_are_ignored_with_a_warning(mvtec: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = list(scoring_samples([str(mvtec)]))
    assert not caplog.text
    for place in ("a.png", "bolt/b.png", "bolt/validation/good/c.png", "photos/d.png", "photos/2024/e.png"):
        draw(mvtec / place)
    assert list(scoring_samples([str(mvtec)])) == before
    assert "5 images outside of CLASS/train/good and CLASS/test are ignored" in caplog.text
    caplog.clear()
    list(scoring_samples([str(mvtec / "bolt")]))
    assert "2 images outside" in caplog.text


@pytest.mark.parametrize("data", ["missing", "missing.csv", "photos", "photo.png", "none", "none.csv"])
def test_what_is_not_a_data_set(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw(Path("photos/a.png"))
    draw(Path("photo.png"))
    Path("none").mkdir()
    Path("none.csv").write_text("path,label\n")
    message = fails(data)
    assert data in message
    assert ("does not exist" if "missing" in data else "CLASS/train/good/*") in message


def test_empty_class(mvtec: Path) -> None:
    (mvtec / "screw" / "train" / "good").mkdir(parents=True)
    assert re.search("class screw .* no images", fails(str(mvtec)))


@pytest.mark.parametrize(("image", "message"), [
    ("test/bent/0.png", "no good training images, only 1 to test on"), ("train/0.png", "train/good")])
def test_class_without_good_images(mvtec: Path, image: str, message: str) -> None:
    draw(mvtec / "screw" / image)
    assert message in fails(str(mvtec))


@pytest.mark.parametrize("name", [
    "007.bmp", "007_mask.PNG", "007_label.png", "007_mask.tif", "007_gt.jpg", "007/000.png", "007/a/b.webp"])
def test_names_of_masks(mvtec: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    image = draw(mvtec / "bolt" / "test" / "crack" / "007.png")
    mask = draw(mvtec / "bolt" / "ground_truth" / "crack" / name)
    found = {sample.path: sample.masks for sample in scoring_samples([str(mvtec)])}
    assert found[str(image)] == ((str(mask),) if name != "007/a/b.webp" else ())
    assert ("have no mask" in caplog.text) == (name == "007/a/b.webp")


def test_masks_in_a_folder_are_united(mvtec: Path) -> None:
    draw(mvtec / "bolt" / "test" / "crack" / "007.png")
    masks = [str(draw(mvtec / "bolt" / "ground_truth" / "Crack" / "007" / name)) for name in ("0.png", "1.BMP")]
    assert [list(s.masks) for s in scoring_samples([str(mvtec)]) if s.path.endswith("007.png")] == [masks]
    (mvtec.parent / "set.csv").write_text("path,label,mask\na.png,bad,mvtec/bolt/ground_truth/Crack/007\n")
    sample, = scoring_samples([str(mvtec.parent / "set.csv")])
    assert list(sample.masks) == masks


def test_missing_mask(mvtec: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = draw(mvtec / "bolt" / "test" / "crack" / "007.png")
    draw(mvtec / "bolt" / "test" / "unmasked" / "0.png")
    assert len(training_samples(str(mvtec))) == 6
    assert not caplog.text
    missing = [sample.masks for sample in scoring_samples([str(mvtec)]) if not sample.masks and sample.label != "good"]
    assert len(missing) == 3
    assert f"1 images of defects have no mask and do not count in pixel metrics; the first is {image}" in caplog.text


@pytest.mark.parametrize("name", ["Good", "OK", "ok", "normal", "0"])
def test_folders_are_labels(mvtec: Path, name: str) -> None:
    (mvtec / "bolt" / "test" / "good").rename(mvtec / "bolt" / "test" / name)
    (mvtec / "bolt" / "train" / "good").rename(mvtec / "bolt" / "train" / name)
    assert [s.label for s in scoring_samples([str(mvtec / "bolt")]) if f"/{name}/" in s.path] == ["good"]
    assert len(training_samples(str(mvtec))) == 6


def test_folders_of_a_class_in_any_case(mvtec: Path) -> None:
    for name in ("train", "test", "ground_truth"):
        (mvtec / "bolt" / name).rename(mvtec / "bolt" / name.title())
    samples = list(scoring_samples([str(mvtec)]))
    assert len(samples) == 5
    assert sum(len(sample.masks) for sample in samples) == 2
    assert len(training_samples(str(mvtec))) == 6


def test_refusal_names_the_folders_that_were_found(mvtec: Path) -> None:
    (mvtec / "bolt" / "train" / "good").rename(mvtec / "bolt" / "train" / "images")
    assert re.search(r"no good training images, only 3 in .*/bolt/train/images, .* its train/good", fails(str(mvtec)))


def test_folders_that_are_not_used_are_named_once(mvtec: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in ("bolt/validation/good", "bolt/train/scratch", "nut/val"):
        draw(mvtec / place / "0.png")
    assert len(training_samples(str(mvtec))) == 6
    warning, = caplog.messages
    for place in ("bolt/validation/good (1)", "bolt/train/scratch (1)", "nut/val (1)"):
        assert place in warning


@pytest.mark.parametrize("name", [
    "@eaDir", "$RECYCLE.BIN", ".Trash-1000", "#recycle", "__MACOSX", "lost+found", "System Volume Information"])
def test_what_systems_leave_behind_is_no_data(mvtec: Path, name: str) -> None:
    def everything() -> Tuple[Sequence[Sample], ...]:
        return (training_samples(str(mvtec)), list(scoring_samples([str(mvtec)])),
                list(scoring_samples([str(mvtec / "nut" / "test")])))

    before = everything()
    for place in ("", "bolt", "bolt/train", "bolt/train/good", "bolt/train/good/@eaDir", "nut/test/crack", "nut/test"):
        draw(mvtec / place / name / "train" / "good" / "thumbnail.jpg")
    for file in ("._000.png", "Thumbs.db", "thumbs.DB"):
        (mvtec / "bolt" / "train" / "good" / file).write_bytes(b"none")
    assert everything() == before


@pytest.fixture
def locked(mvtec: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes folders that cannot be listed; root may list everything, so listing fails for these in its place."""
    folders: Set[str] = set()
    scan, listed = os.scandir, os.listdir

    def refused(place: Any, original: Any) -> Any:
        if os.fspath(place) in folders:
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(place))
        return original(place)

    monkeypatch.setattr(os, "scandir", lambda place=".": refused(place, scan))
    monkeypatch.setattr(os, "listdir", lambda place=".": refused(place, listed))
    return lambda folder: folders.add(str(folder))


def test_a_folder_that_cannot_be_listed_costs_only_its_images(
    mvtec: Path, locked: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    draw(mvtec / "nut" / "test" / "good" / "private" / "0.png")
    locked(mvtec / "bolt")
    locked(mvtec / "nut" / "test" / "good" / "private")
    assert {sample.class_name for sample in training_samples(str(mvtec))} == {"nut"}
    assert f"cannot read {mvtec}/bolt: Permission denied; its images are left out" in caplog.text
    assert len(training_samples(str(mvtec), ["nut"])) == 3
    assert "cannot read" in fails(str(mvtec), ["bolt"])
    problems = [sample.problem for sample in scoring_samples([str(mvtec)]) if sample.problem]
    assert problems == [f"cannot read {mvtec}/bolt: Permission denied",
                        f"cannot read {mvtec}/nut/test/good/private: Permission denied"]
    assert len(list(scoring_samples([str(mvtec / "nut" / "test")]))) == 3


def test_unreadable_image_is_found_before_training(mvtec: Path) -> None:
    (mvtec / "nut" / "train" / "good" / "9.png").touch()
    assert "9.png is empty" in fails(str(mvtec))


@pytest.mark.parametrize("link", [False, True])
def test_image_in_train_and_in_test_of_another_class(mvtec: Path, link: bool) -> None:
    original, copy = mvtec / "bolt" / "train" / "good" / "001.png", mvtec / "nut" / "test" / "good" / "copy.png"
    if link:
        copy.symlink_to(original)
    else:
        copy.write_bytes(original.read_bytes())
    assert f"{original} and {copy}" in fails(str(mvtec))
    assert len(training_samples(str(mvtec), ["bolt"])) == 3


def test_same_size_is_not_the_same_image(mvtec: Path) -> None:
    first, second = (draw(mvtec / "bolt" / path) for path in ("train/good/000.bmp", "test/good/000.bmp"))
    assert first.stat().st_size == second.stat().st_size
    assert len(training_samples(str(mvtec))) == 7


def test_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("in/b.PNG", "in/a.jpeg", "in/deep/c.tif", "in/.hidden.png", "in/.cache/d.png"):
        draw(Path(path))
    Path("in/notes.txt").write_text("none")
    expected = [Sample("in/a.jpeg"), Sample("in/b.PNG"), Sample("in/deep/c.tif")]
    assert list(scoring_samples(["in"])) == list(scoring_samples(["./in/"])) == expected


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    inside = draw(tmp_path / "in" / "a" / "0.png")
    outside = draw(tmp_path / "out" / "1.png")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "linked").symlink_to(outside.parent)
    (tmp_path / "in" / "linked again").symlink_to(outside.parent)
    (tmp_path / "in" / "broken.png").symlink_to(tmp_path / "nowhere")
    found = [sample.path for sample in scoring_samples([str(tmp_path / "in")])]
    assert found == [str(inside), str(tmp_path / "in" / "broken.png"), str(tmp_path / "in" / "linked" / "1.png")]


def test_folder_without_images(tmp_path: Path) -> None:
    draw(tmp_path / "only_train" / "train" / "good" / "0.png")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "only_train"):
        with pytest.raises(UadtoolError, match=f"no images to score in .*{name}"):
            list(scoring_samples([str(tmp_path / name)]))


def test_paths_that_are_not_folders_are_images(tmp_path: Path) -> None:
    paths = ["./a.png", "x" * 5000, f"{tmp_path}/no\nsuch", "b.unknown", os.fsdecode(b"\xff.png")]
    assert [sample.path for sample in scoring_samples(paths)] == paths


def test_scoring_samples_come_as_their_paths_do(mvtec: Path) -> None:
    asked = []

    def paths():
        for path in ("one.png", str(mvtec / "nut"), "two.png"):
            asked.append(path)
            yield path

    samples = scoring_samples(paths())
    assert next(samples).path == "one.png"
    assert asked == ["one.png"]
    assert [next(samples).label, next(samples).label] == ["anomalous", "good"]
    assert len(asked) == 2


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for path in (b"train/good/\xff0.png", b"test/good/\xff1.png", b"test/good/\xff2.png"):
        draw(tmp_path / "bolt" / os.fsdecode(path))
    assert [os.fsencode(s.path)[-6:] for s in training_samples(str(tmp_path / "bolt"))] == [b"\xff0.png"]
    assert [os.fsencode(s.path)[-6:] for s in scoring_samples([str(tmp_path)])] == [b"\xff1.png", b"\xff2.png"]


@pytest.mark.parametrize("folder", ["Gehäuse", "Geha\u0308use"])
@pytest.mark.parametrize("typed", ["Gehäuse", "Geha\u0308use"])
def test_a_folder_of_a_mac_is_the_class_that_is_typed(folder: str, typed: str, tmp_path: Path) -> None:
    images = [draw(tmp_path / folder / split / "good" / "0.png") for split in ("train", "test")]
    assert training_samples(str(tmp_path), [typed]) == [Sample(str(images[0]), "Gehäuse", "good")]
    assert training_samples(str(tmp_path / folder)) == [Sample(str(images[0]), "Gehäuse", "good")]
    assert list(scoring_samples([str(tmp_path)])) == [Sample(str(images[1]), "Gehäuse", "good")]


def test_one_class_in_two_folders(tmp_path: Path) -> None:
    for folder in ("Gehäuse", "Geha\u0308use"):
        draw(tmp_path / folder / "train" / "good" / "0.png")
    assert [sample.class_name for sample in training_samples(str(tmp_path))] == ["Gehäuse", "Gehäuse"]


def test_the_name_of_a_manifest_is_a_class_in_nfc(tmp_path: Path) -> None:
    data = write_manifest(tmp_path / "Geha\u0308use.csv", [{"path": "a.png", "label": "good"}])
    assert [sample.class_name for sample in training_samples(data)] == ["Gehäuse"]


def test_classes_are_listed_as_they_are_typed(mvtec: Path) -> None:
    draw(mvtec / "a, b" / "train" / "good" / "0.png")
    assert fails(str(mvtec), ["screw"]).endswith('no class screw; it has "a, b", bolt, nut')


ROWS = [
    {"path": "a.png", "class": "bolt", "label": "good"},
    {"path": "b.png", "class": "nut", "label": "normal"},
    {"path": "c.png", "class": "bolt", "label": "crack", "mask": "masks/c.png"},
    {"path": "d.png", "class": "nut"},
]


def write_manifest(path: Path, rows: Sequence[Dict[str, Optional[str]]]) -> str:
    if path.suffix == ".csv":
        keys = sorted({key for row in rows for key in row})
        lines = [keys] + [[row.get(key) or "" for key in keys] for row in rows]
        path.write_text("".join(",".join(line) + "\r\n" for line in lines), encoding="utf-8-sig")
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    for row in rows:
        for name in filter(None, (row.get("path"), row.get("mask"))):
            draw(path.parent / name)
    return str(path)


@pytest.fixture(params=["set.csv", "set.jsonl"])
def manifest(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def test_manifest_without_split(manifest: Path) -> None:
    data, folder = write_manifest(manifest, ROWS), manifest.parent
    good = [Sample(f"{folder}/a.png", "bolt", "good"), Sample(f"{folder}/b.png", "nut", "good")]
    assert training_samples(data) == good
    assert list(scoring_samples([data])) == [
        *good, Sample(f"{folder}/c.png", "bolt", "anomalous", (f"{folder}/masks/c.png",)),
        Sample(f"{folder}/d.png", "nut")]


def test_manifest_with_split(manifest: Path) -> None:
    rows = [{**row, "split": split} for row, split in zip(ROWS, ("train", "train", "test", "test"))]
    rows.append({"path": f"{manifest.parent}/elsewhere/e.png", "class": "nut", "label": "ok", "split": "test"})
    data = write_manifest(manifest, rows)
    assert [Path(sample.path).name for sample in training_samples(data)] == ["a.png", "b.png"]
    assert [Path(sample.path).name for sample in scoring_samples([data])] == ["c.png", "d.png", "e.png"]


def test_manifest_whose_training_images_are_also_tests(manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    training_samples(write_manifest(manifest, ROWS[:2]))
    assert not caplog.text  # there is nothing to test
    training_samples(write_manifest(manifest, ROWS))
    assert f"{manifest} gives some images no split" in caplog.text
    caplog.clear()
    splits = ("train", "train", "test", "test")
    training_samples(write_manifest(manifest, [{**row, "split": split} for row, split in zip(ROWS, splits)]))
    assert not caplog.text


def test_manifest_with_an_image_in_both_splits(manifest: Path) -> None:
    row = {"path": "a.png", "label": "good"}
    data = write_manifest(manifest, [{**row, "split": "train"}, {**row, "split": "test"}])
    assert "1 training images are also test images" in fails(data)


def test_an_image_that_is_listed_twice_counts_once(manifest: Path) -> None:
    row = {"path": "a.png", "label": "good"}
    assert len(training_samples(write_manifest(manifest, [row, row, {**row, "path": "b.png"}]))) == 2


def test_manifest_without_classes_is_one_class(manifest: Path) -> None:
    data = write_manifest(manifest, [{"path": "a.png", "label": "good"}, {"path": "b.png", "label": "bad"}])
    assert [sample.class_name for sample in training_samples(data)] == ["set"]
    assert [sample.class_name for sample in scoring_samples([data])] == ["set", "set"]


def test_manifest_with_a_row_without_class(manifest: Path) -> None:
    data = write_manifest(manifest, [*ROWS, {"path": "e.png", "label": "good"}])
    assert "gives classes, but none for" in fails(data)
    assert [sample.class_name for sample in scoring_samples([data])][-1] is None


def test_manifest_with_missing_files(manifest: Path) -> None:
    data = write_manifest(manifest, ROWS)
    (manifest.parent / "masks" / "c.png").unlink()
    assert len(training_samples(data)) == 2  # no mask is needed
    (manifest.parent / "a.png").unlink()
    assert "a.png: No such file" in fails(data)


@pytest.mark.parametrize(("label", "expected"), [
    ("good", "good"), ("Normal", "good"), ("0", "good"), (0, "good"), (0.0, "good"), (False, "good"), ("ok", "good"),
    ("", None), (None, None), (1, "anomalous"), (True, "anomalous"), ("crack", "anomalous"),
])
def test_labels(label: object, expected: Optional[str], tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text(json.dumps({"path": "a.png", "label": label}))
    assert [sample.label for sample in scoring_samples([str(tmp_path / "set.jsonl")])] == [expected]


@pytest.mark.parametrize(("name", "text", "problem"), [
    ("a.csv", "path,label\na,b.png,good\n", "line 2, has more fields"),
    ("a.csv", "path,split\na.png,train\nb.png,val\n", "line 3, has the split 'val'"),
    ("a.csv", "path\n" + 200_000 * "a", "line 2, is not CSV"),
    ("a.jsonl", '{"path": "a.png"}\n{"path": "b', "line 2, is not JSON"),
    ("a.jsonl", '["a.png"]', "line 1, is not a JSON object"),
    ("a.jsonl", '{"path": ["a.png"]}', "line 1, has a path that is not plain text"),
    ("a.jsonl", '{"path": "a\\u0000"}', "line 1, has a path that is not plain text"),
    ("a.jsonl", '{"label": "good"}', "line 1, has no path"),
])
def test_broken_manifests(name: str, text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UadtoolError) as caught:
        list(scoring_samples([str(tmp_path / name)]))
    assert f"{name}, {problem}" in str(caught.value)


def test_manifest_with_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"path, label\n\xff.png, good\n")
    sample, = scoring_samples([str(tmp_path / "a.csv")])
    assert os.fsencode(sample.path).endswith(b"/\xff.png")
    assert sample.label == "good"


@given(content=st.binary(max_size=80) | st.text(alphabet='path,label{}[]":\n\r\0 1"', max_size=80).map(str.encode),
       suffix=st.sampled_from([".csv", ".jsonl"]))
def test_any_bytes_are_a_manifest_or_refused(
    content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        samples = list(scoring_samples([str(path)]))
    except UadtoolError:
        return
    assert all(sample.path.startswith(str(path.parent)) or sample.path.startswith("/") for sample in samples)


SETS = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(
    lambda counts: [Sample(f"{name}{i}", f"c{name}", "good") for name, count in enumerate(counts) for i in range(count)]
)


def count(samples: Sequence[Sample]) -> Dict[Optional[str], int]:
    return Counter(sample.class_name for sample in samples)


@given(samples=SETS, share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_split_held_out(samples: Sequence[Sample], share: float, seed: int) -> None:
    rest, held_out = split_held_out(samples, share, seed)
    assert (rest, held_out) == split_held_out(samples, share, seed)
    assert sorted({*rest, *held_out}, key=samples.index) == samples
    assert rest == sorted(rest, key=samples.index)
    for name, number in count(samples).items():
        held = count(held_out)[name]
        assert (held == count(rest)[name] == 1) if number == 1 else (min(3, number // 2) <= held < number)
        assert number == 1 or held + count(rest)[name] == number
        assert abs(held - share * number) <= 1 or held == min(3, number // 2)
        members = [sample for sample in samples if sample.class_name == name]
        assert split_held_out(members, share, seed)[1] == [s for s in held_out if s.class_name == name]


@given(samples=SETS, share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_copies_stay_on_one_side(samples: Sequence[Sample], share: float, seed: int, data: st.DataObject) -> None:
    firsts: List[int] = []
    for number, sample in enumerate(samples):
        same = [first for first in set(firsts) if samples[first].class_name == sample.class_name]
        firsts.append(data.draw(st.sampled_from([number, *same])))
    rest, held_out = split_held_out(samples, share, seed, firsts)
    original = dict(zip(samples, firsts))
    different = [sample for number, sample in enumerate(samples) if firsts[number] == number]
    assert held_out == split_held_out(different, share, seed)[1]  # copies change nothing
    assert len({original[sample] for sample in held_out}) == len(held_out)
    for name in count(samples):
        sides = [{original[sample] for sample in side if sample.class_name == name} for side in (rest, held_out)]
        assert sides[0] | sides[1] == {original[sample] for sample in samples if sample.class_name == name}
        assert not sides[0] & sides[1] or len(sides[0]) == len(sides[1]) == 1
        assert sum(sample.class_name == name for sample in rest) == sum(
            original[sample] in sides[0] for sample in samples if sample.class_name == name)


@given(samples=SETS, wanted=st.integers(0, 50), seed=st.integers(0, 2**32 - 1))
def test_balanced(samples: Sequence[Sample], wanted: int, seed: int) -> None:
    chosen = balanced(samples, wanted, seed)
    assert chosen == balanced(samples, wanted, seed)
    assert len(chosen) == len(set(chosen)) == min(wanted, len(samples))
    assert set(chosen) <= set(samples)
    most = max(count(chosen).values(), default=0)
    for name, number in count(samples).items():
        assert count(chosen).get(name, 0) >= min(number, most - 1)


def test_names_of_classes_have_always_been_the_same_seeds() -> None:
    samples = [Sample(str(i), "Gehäuse") for i in range(40)]
    held_out = random.Random("7 Gehäuse").sample(samples, 8)
    assert split_held_out(samples, 0.2, 7)[1] == sorted(held_out, key=samples.index)
    samples = [Sample(str(i), os.fsdecode(b"geh\xe4use")) for i in range(40)]
    assert len(split_held_out(samples, 0.2, 7)[1]) == 8


def test_the_choice_depends_on_the_seed() -> None:
    samples = [Sample(str(i), "bolt") for i in range(40)]
    assert split_held_out(samples, 0.5, 0) != split_held_out(samples, 0.5, 1)
    assert balanced(samples, 5, 0) != balanced(samples, 5, 1)
