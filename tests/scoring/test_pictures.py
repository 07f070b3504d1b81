import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uadtool.data.images import ImageError, read_mask
from uadtool.errors import UadtoolError
from uadtool.files import WRITTEN
from uadtool.scoring import drawing
from uadtool.scoring.contact_sheet import TILE, ContactSheet
from uadtool.scoring.heatmaps import CAPTION_WIDTH, MARGIN, Heatmaps, read_overlay, render
from uadtool.scoring.image_files import AnomalousImages, Masks, OutputFolder

THRESHOLD = 3.0


def record(path, **changes):
    return {"path": str(path), "score": 4.5, "threshold": THRESHOLD, "anomalous": True, "nearest_class": "screw",
            **changes}


def test_accents_of_names_from_a_mac_are_drawn():
    assert drawing.latin("Geha\u0308use/\u4e2d\n\udce4") == r"Gehäuse/?\n\udce4"


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(60, 190, (480, 480, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_normal_areas_stay_and_the_anomaly_is_coloured_and_outlined(photo):
    values = np.zeros((8, 8), np.float32)
    values[2:4, 4:6] = 2 * THRESHOLD
    picture = np.asarray(render(record(photo), values)).astype(int)
    original = np.asarray(Image.open(photo))
    assert np.array_equal(picture[:480, :480], original)
    overlay = picture[:480, 480 + MARGIN:]
    grey = np.asarray(Image.open(photo).convert("L"))
    assert np.array_equal(overlay[300:], np.repeat(grey[300:, :, None], 3, axis=2))
    red, _, blue = overlay[170:190, 290:310].mean((0, 1))
    assert red > blue + 50
    line = (overlay == 255).all(-1)
    rows, columns = np.nonzero(line)
    # Each map pixel is 60 wide; half of the peak is reached where the bilinear ramp is half way.
    assert (rows.min(), rows.max()) == (pytest.approx(120, abs=3), pytest.approx(240, abs=3))
    assert (columns.min(), columns.max()) == (pytest.approx(240, abs=3), pytest.approx(360, abs=3))
    assert not line[140:220, 260:340].any()  # a contour, not an area


def test_no_contour_when_nothing_is_above_the_threshold(photo):
    values = np.full((8, 8), THRESHOLD, np.float32)
    overlay = np.asarray(render(record(photo), values))[:480, 480 + MARGIN:]
    assert not (overlay == 255).all(-1).any()


@pytest.mark.parametrize(("size", "panels"), [
    ((300, 300), (2 * 400 + MARGIN, 400)),
    ((3000, 1500), (3000, 2 * 1500 + MARGIN)),
    ((1500, 3000), (2 * 1500 + MARGIN, 3000)),
    ((8000, 100), (4096, 2 * 51 + MARGIN)),
    ((10, 400), (CAPTION_WIDTH, 400)),
])
def test_layout(tmp_path, size, panels):
    Image.new("RGB", size).save(tmp_path / "a.png")
    picture = render(record(tmp_path / "a.png"), np.zeros((4, 4), np.float32))
    assert picture.width == panels[0]
    assert 40 < picture.height - panels[1] < 100  # the caption
    picture.save(tmp_path / "map.png")
    overlay = read_overlay(str(tmp_path / "map.png"), str(tmp_path / "a.png"))
    assert max(overlay.shape) == min(max(*size, 400), 4096)
    assert not overlay.any()  # black as the image, without a pixel of the background
    with pytest.raises(ImageError, match="not the heatmap of"):
        read_overlay(str(tmp_path / "a.png"), str(tmp_path / "a.png"))


def test_the_picture_is_upright_like_the_scored_image(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (600, 300)).save(tmp_path / "a.jpg", exif=exif)
    assert render(record(tmp_path / "a.jpg"), np.zeros((4, 4), np.float32)).width == 2 * 300 + MARGIN


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 1e-3, 1e6])
def test_any_threshold_and_any_class_name(photo, threshold):
    values = np.linspace(-5, 5, 64, dtype=np.float32).reshape(8, 8)
    render(record(photo, nearest_class="螺钉 \udce9", score=-1e9, threshold=threshold), values)


def test_the_same_value_has_the_same_colour_in_every_picture(photo, tmp_path):
    Image.new("RGB", (480, 480), (128, 128, 128)).save(photo)
    one, other = np.zeros((2, 8, 8), np.float32)
    one[0] = other[0] = 2.0
    other[7] = 50.0
    pictures = [np.asarray(render(record(photo), values)) for values in (one, other)]
    assert np.array_equal(pictures[0][:300], pictures[1][:300])


def test_colours_get_steadily_lighter():
    colours = drawing.colours(np.linspace(0, 1, 64))
    lightness = colours @ [0.2126, 0.7152, 0.0722]  # so they can be told apart without seeing hues
    assert (np.diff(lightness) > 0).all()


def test_names_keep_class_and_defect_and_are_unique(photo, tmp_path):
    root = tmp_path / "mvtec"
    paths = ["screw/test/scratch/000.png", "screw/test/good/000.png", "nut/test/good/000.png", "nut/test/good/000.jpg"]
    heatmaps = Heatmaps(str(tmp_path / "deep" / "pictures"))
    drawn = []
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.open(photo).save(root / path)
        drawn.append(Path(heatmaps.add(record(root / path), np.zeros((4, 4), np.float32))["heatmap"]))
    assert [path.name for path in drawn] == [
        "screw-test-scratch-000.png", "screw-test-good-000.png", "nut-test-good-000.png", "nut-test-good-000-2.png"]
    for path in drawn:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=300), min_size=1))
def test_names_are_those_of_files(tmp_path_factory, paths):
    folder = OutputFolder(str(tmp_path_factory.getbasetemp()))
    names = [folder.path(path, ".png").name for path in paths]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(os.fsencode(name)) < 240
        assert "/" not in name


def test_a_folder_that_cannot_be_made_or_written_to(photo):
    with pytest.raises(UadtoolError, match="cannot create the folder"):
        Heatmaps(str(photo / "pictures"))
    with pytest.raises(UadtoolError, match=r"^cannot write /proc/self: "):
        Heatmaps("/proc/self")


def test_a_mask_has_the_size_of_the_image_and_is_white_where_the_map_is_above_the_threshold(photo, tmp_path):
    values = np.zeros((8, 8), np.float32)
    values[2:4, 4:6] = 2 * THRESHOLD
    path = Masks(str(tmp_path / "masks")).add(record(photo), values)["mask"]
    mask = np.asarray(Image.open(path)).astype(bool)
    assert mask.shape == (480, 480)
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max()) == (pytest.approx(120, abs=2), pytest.approx(240, abs=2))
    assert (columns.min(), columns.max()) == (pytest.approx(240, abs=2), pytest.approx(360, abs=2))
    assert read_mask(path, (480, 480)).sum() == mask.sum()  # it can serve as ground truth


def test_only_anomalous_images_are_copied(photo, tmp_path):
    photo.chmod(0o444)
    images = AnomalousImages(str(tmp_path / "suspicious"))
    assert images.add(record(photo, anomalous=False), np.zeros((4, 4))) == {}
    copy = Path(images.add(record(photo), np.zeros((4, 4)))["copy"])
    assert visible(tmp_path / "suspicious") == [copy]
    assert copy.suffix == ".png"
    assert copy.read_bytes() == photo.read_bytes()
    assert photo.stat().st_mode & 0o777 == 0o444
    again = AnomalousImages(str(tmp_path / "suspicious"))  # of the next run
    assert list(again.add(record(photo), np.zeros((4, 4))).values()) == [str(copy)]


def visible(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def test_a_run_replaces_the_files_of_the_run_before_and_no_others(photo, tmp_path):
    folder = tmp_path / "copies"
    first = AnomalousImages(str(folder))
    (folder / "mine.png").write_bytes(b"")
    (tmp_path / "precious.png").write_bytes(b"")
    for name in ("a.png", "b.png"):
        shutil.copy(photo, tmp_path / name)
        first.add(record(tmp_path / name), np.zeros((4, 4)))
    assert len(visible(folder)) == 3
    with (folder / WRITTEN).open("a") as file:
        file.write("../precious.png\n.hidden\n")
    AnomalousImages(str(folder), keep=True)
    assert len(visible(folder)) == 3
    second = AnomalousImages(str(folder))
    assert visible(folder) == [folder / "mine.png"]
    second.add(record(tmp_path / "b.png"), np.zeros((4, 4)))
    assert len(visible(folder)) == 2
    assert (tmp_path / "precious.png").exists()


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "PNG"), (".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP")])
def test_the_contact_sheet_has_the_format_of_its_name(photo, tmp_path, suffix, kind):
    sheet = ContactSheet(str(tmp_path / f"sheet{suffix}"), 3)
    sheet.add(record(photo), np.zeros((4, 4), np.float32))
    sheet.save()
    assert Image.open(tmp_path / f"sheet{suffix}").format == kind


@pytest.mark.parametrize(("images", "columns"), [(1, 1), (2, 2), (5, 3), (12, 5)])
def test_the_contact_sheet_shows_the_highest_scores_first(tmp_path, images, columns):
    """The grey of each image encodes its score."""
    for score in range(20):
        Image.new("RGB", (300, 150), (10 * score,) * 3).save(tmp_path / f"{score}.png")
    sheet = ContactSheet(str(tmp_path / "sheet.png"), images)
    for score in np.random.default_rng(0).permutation(20):
        sheet.add(record(tmp_path / f"{score}.png", score=float(score)), np.zeros((4, 4), np.float32))
    sheet.save()
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    found = []
    for place in range(images):
        row, column = divmod(place, columns)
        top, left = MARGIN + row * (TILE + 44 + MARGIN), MARGIN + column * (TILE + MARGIN)
        found.append(picture[top + TILE // 2, left + TILE // 2, 0])
    assert found == [10 * score for score in range(19, 19 - images, -1)]
    assert picture.shape[1] == columns * (TILE + MARGIN) + MARGIN


def test_without_images_there_is_no_contact_sheet(tmp_path):
    ContactSheet(str(tmp_path / "sheet.png"), 4).save()
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_not_replaced_by_the_contact_sheet(tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    for name in ("a.png", "link.png"):
        with pytest.raises(UadtoolError, match=f"would overwrite the image .*{name}"):
            ContactSheet(str(tmp_path / name), 4).add(record(tmp_path / "a.png"), np.zeros((4, 4)))


@pytest.mark.parametrize("output", [Heatmaps, Masks, AnomalousImages])
def test_an_image_is_never_overwritten(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 50)).save("a.png")
    before = Path("a.png").read_bytes()
    Path("elsewhere").mkdir()
    Path("elsewhere/link.jpg").symlink_to(Path("a.png").resolve())
    Image.new("RGB", (50, 50)).save("a.jpg")  # whose mask would be a.png
    for image in ("a.png", "a.jpg", "elsewhere/link.jpg"):
        with pytest.raises(UadtoolError, match=f"{image} lies in .*; write into a separate folder"):
            output(".").add(record(image), np.zeros((4, 4), np.float32))
    assert Path("a.png").read_bytes() == before
    assert not Path("a.png").is_symlink()


@pytest.mark.parametrize("output", [Heatmaps, Masks, AnomalousImages])
def test_a_link_of_an_earlier_run_is_replaced_and_not_followed(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 50)).save("a.png")
    before = Path("a.png").read_bytes()
    Path("out").mkdir()
    Path("out/a.png").symlink_to(Path("a.png").resolve())
    output("out").add(record("a.png"), np.zeros((4, 4), np.float32))
    assert Path("a.png").read_bytes() == before
    assert Path("out/a.png").is_file()
    assert not Path("out/a.png").is_symlink()


@pytest.mark.parametrize("output", [Heatmaps, Masks, AnomalousImages])
def test_a_missing_image_is_an_image_error(tmp_path, output):
    with pytest.raises(ImageError):
        output(str(tmp_path / "out")).add(record(tmp_path / "gone.png"), np.zeros((4, 4), np.float32))
