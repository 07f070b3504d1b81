"""The comparison page: valid, self-contained HTML with any names in it, and without complaints of a browser."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import numpy as np
import pytest
from conftest import run_here
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from records import bench_record, lines, model, score_records

from uadtool.comparing.comparison import join, set_side_by_side
from uadtool.comparing.gates import Gate, decide
from uadtool.comparing.page import page as html
from uadtool.comparing.page import svg
from uadtool.comparing.page.page import as_html
from uadtool.comparing.page.svg import Scale, number
from uadtool.comparing.page.thumbnails import SIDE, _moved, thumbnail

VOID = {"img", "meta", "wbr"}
BLANK = "<!DOCTYPE html><title>blank</title>"


class Page(HTMLParser):
    """The elements of a page, in order: (tag, attributes, inner text). It fails if tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: List[Tuple[str, Dict[str, Optional[str]], List[str]]] = []
        self._open: List[int] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: List[Tuple[str, Optional[str]]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def all(self, tag: str) -> List[Tuple[Dict[str, Optional[str]], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.elements if name == tag]


def page(*files: str, gates: Tuple[str, ...] = ()) -> str:
    models = join(files)
    record = set_side_by_side(models)
    return as_html(models, record, decide([Gate.parse(gate) for gate in gates], record))


@pytest.fixture
def files(tmp_path, monkeypatch) -> Tuple[str, ...]:
    """Two models with a bench file and with scores of images, which exist for only one of the classes."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    Path("data/bolt").mkdir(parents=True)
    for index in range(40):
        pixels = random.integers(0, 255, (60, 200 + index, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(f"data/bolt/{index:03}.png")
    Path("fp32.jsonl").write_text(lines(score_records("build/fp32.onnx")))
    Path("int8.jsonl").write_text(lines(score_records("build/int8.onnx", noise=1.5)))
    Path("bench.json").write_text(json.dumps(bench_record(model("build/fp32.onnx"), model("build/int8.onnx"))))
    return "fp32.jsonl", "int8.jsonl", "bench.json"


def test_the_page_has_its_sections_charts_and_figures(files):
    found = Page(page(*files, gates=("image_auroc>=-0.01", "file_size<=0.5x")))
    assert [text for _, text in found.all("h2")] == [
        "Models", "Gates", "All figures", "Accuracy", "Scores by class", "Images to look at", "Provenance"]
    drawings = {attributes["aria-labelledby"] for attributes, _ in found.all("svg")}
    assert drawings == {"trade-off-title", "roc-title", "classes-title", "changes-title", "scores-0-title",
                        "scores-1-title"}
    rows = [text for _, text in found.all("tr")]
    assert any(re.match(r"image_auroc>=-0.01✗ not metint8.onnx: image_auroc is -0\.", row) for row in rows)
    assert "file_size<=0.5x✓ met" in rows
    assert any(row.startswith("File size, MB12.06.00.50×") for row in rows)
    assert any(re.match(r"bolt0\.\d{4}0\.\d{4}▼ −0\.\d{4} worse−0\.\d{4} to −0\.\d{4}$", row) for row in rows)
    provenance = found.all("dl")[-1][1]
    for fact in ("build/int8.onnx", "sha256:", "stfpm", "onnxruntime 1.23.0", "int8.jsonl", "bench.json", "2026-01-01"):
        assert fact in provenance


def test_the_page_is_valid_and_accessible(files):
    found = Page(page(*files, gates=("recall>0.1",)))
    ids = [attributes["id"] for _, attributes, _ in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in found.elements:
        for key in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(key, ids[0]) in ids
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids
    assert found.elements[0][1] == {"lang": "en"}
    assert all(len(found.all(landmark)) == 1 for landmark in ("header", "main", "footer", "nav", "h1"))
    levels = [int(name[1]) for name, _, _ in found.elements if re.fullmatch("h[1-6]", name)]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert all(len(attributes["alt"]) > 10 for attributes, _ in found.all("img"))
    assert all(attributes["role"] == "img" for attributes, _ in found.all("svg"))
    assert all(len(text) > 20 for attributes, text in found.all("desc"))
    assert all("scope" in attributes for attributes, _ in found.all("th"))
    assert len(found.all("caption")) == len(found.all("table")) == 2
    assert not found.all("script")


def test_charts_say_what_they_show(files):
    told = {attributes["id"]: text for attributes, text in Page(page(*files)).all("desc")}
    assert "fp32.onnx: 10.00 ms, image AUROC 0." in told["trade-off-text"]
    assert re.search(r"bolt: 0\.\d{3}, 0\.\d{3}; nut: 0\.\d{3}, 0\.\d{3}", told["classes-text"])
    assert re.search(r"bolt, int8.onnx: −0\.\d{4}, 95% interval −0\.\d{4} to [−+]?0\.\d{4}", told["changes-text"])
    assert re.search(r"fp32.onnx: AUROC 0\.\d{3}; at its threshold it finds \d+% of the defective", told["roc-text"])
    assert re.search(r"model 2: \d+ of 20 good above, \d+ of 20 defective", told["scores-0-text"])


def test_thumbnails_are_small_and_few_and_missing_images_are_named(files, caplog):
    caplog.set_level("INFO", "uadtool")
    text = page(*files)
    found = Page(text)
    assert 0 < len(found.all("img")) <= 18
    different = {attributes["alt"] for attributes, _ in found.all("img")}
    assert f"the page holds thumbnails of {len(different)} images" in caplog.text
    for attributes, _ in found.all("img"):
        assert attributes["src"].startswith("data:image/jpeg;base64,")
        assert len(attributes["src"]) < 40_000
    gone = [text for attributes, text in found.all("li") if "no longer there" in text]
    assert gone
    assert all("data/nut/" in text for text in gone)
    assert len(text) < 2_000_000


def test_an_image_at_the_threshold_is_on_the_right_side(tmp_path):
    files = []
    for name, threshold in (("fp32", 2.0), ("int8", 2 - 1e-7)):
        run, *images, summary = score_records(f"{name}.onnx")
        images[1].update(score=2.0, anomalous=threshold < 2)
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(lines([{**run, "threshold": threshold}, *images, summary]))
    (image,) = _moved(join(map(str, files)))
    assert (image.path, image.finding) == ("data/bolt/001.png", "now found")


def test_a_thumbnail_keeps_its_shape(files):
    uri = thumbnail("data/bolt/000.png")
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert (image.format, image.size) == ("JPEG", (SIDE, 48))
    assert thumbnail("no/such.png") is None
    assert thumbnail("null\0byte.png") is None


def framed(uri: str) -> np.ndarray:
    """Where a thumbnail is pure white, on dark images: [H, W]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L")) > 200


def test_regions_are_framed_in_the_thumbnail(tmp_path):
    Image.new("RGB", (800, 400)).save(tmp_path / "dark.png")
    assert not framed(thumbnail(str(tmp_path / "dark.png"))).any()
    frame = framed(thumbnail(str(tmp_path / "dark.png"), [(100, 50, 200, 100), (790, 390, 10, 10)]))
    assert frame[10:31, 20:61].sum() == pytest.approx(2 * 41 + 2 * 19, abs=12)
    assert frame[78, 158]
    for box in ((0, 0, 0, 0), (10**400, 10**400, 10**400, 10**400), (799, 399, 5, 5)):
        assert thumbnail(str(tmp_path / "dark.png"), [box])


def test_the_page_frames_the_regions_of_one_model(make_detector, mvtec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, divisor, more in (("a", 1.0, ["--regions"]), ("b", 100.0, ["--regions"]), ("c", 1.0, [])):
        detector = make_detector(tmp_path / f"{name}.onnx", divisor=divisor)
        Path(f"{name}.jsonl").write_text(run_here("score", "-q", detector, mvtec, "--threshold", 2, *more))
    legend = "White frames show the regions above the threshold."
    text = page("a.jsonl", "b.jsonl")  # b misses all defects and has no regions
    found = alternatives(text)
    assert sum(name.endswith(", with its anomalous regions framed") for name in found) == 6
    assert len(found) == 12
    assert legend in text
    text = page("c.jsonl", "b.jsonl")
    assert "framed" not in text
    assert legend not in text


@pytest.fixture
def scored(make_detector, mvtec, tmp_path, monkeypatch) -> Callable[..., str]:
    """Score the images of ``mvtec`` with two models, each with a folder of heatmaps or None, and make the page.

    The second model misses all defects.
    """
    monkeypatch.chdir(tmp_path)

    def run(a: Optional[str], b: Optional[str]) -> str:
        for name, divisor, folder in (("a", 1.0, a), ("b", 100.0, b)):
            detector = make_detector(tmp_path / f"{name}.onnx", divisor=divisor)
            heatmaps = ["--heatmaps", folder] if folder else []
            Path(f"{name}.jsonl").write_text(run_here("score", "-q", detector, mvtec, "--threshold", 2, *heatmaps))
        return page("a.jsonl", "b.jsonl")

    return run


def alternatives(text: str) -> List[str]:
    """The alternative texts of the pictures, in order."""
    return [attributes["alt"] or "" for attributes, _ in Page(text).all("img")]


HINT = "anomaly maps here, run score --heatmaps DIR"


def hint(text: str) -> bool:
    (section,) = (text for attributes, text in Page(text).all("section") if attributes["id"] == "images")
    return HINT in section


def test_anomaly_maps_stand_beside_the_images(scored):
    text = scored("maps/a", "maps/b")
    moved, missed = (re.findall(r'alt="(.*?)"', group) for group in text.split("<h3>Changed")[1].split("<h3>Defects"))
    assert len(moved) == 3 * 6
    assert len(missed) == 2 * 6
    for image, first, second in zip(*[iter(moved)] * 3):
        assert image.startswith("defective image of ")
        assert (first, second) == tuple(f"anomaly map of {name}.onnx for the {image}" for name in ("a", "b"))
    for image, last in zip(*[iter(missed)] * 2):
        assert last == f"anomaly map of b.onnx for the {image}"
    assert not hint(text)
    assert "twice the threshold" in text


def test_an_anomaly_map_is_cut_from_the_heatmap(scored):
    uris = {attributes["alt"]: attributes["src"] for attributes, _ in Page(scored("a", "b")).all("img")}
    for name in ("a", "b"):
        uri = uris[f"anomaly map of {name}.onnx for the defective image of red, test/spot/003.png"]
        shown = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert shown.size == (SIDE, SIDE)
        heatmap = Image.open(Path(name, "red-test-spot-003.png"))  # two panels of 400 x 400 pixels with 12 between them
        expected = heatmap.crop((412, 0, 812, 400)).resize((SIDE, SIDE))
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(expected)).mean() < 6


@pytest.mark.parametrize(("folders", "models"), [
    ((None, None), []),
    (("maps", "maps"), []),  # the pictures of a were overwritten
    (("maps/a", None), ["a"]),
    ((None, "maps/b"), ["b"]),
])
def test_without_anomaly_maps_the_page_says_how_to_get_them(scored, folders, models):
    text = scored(*folders)
    found = alternatives(text)
    assert sum(not alternative.startswith("anomaly map") for alternative in found) == 12
    for name in ("a", "b"):
        assert any(alternative.startswith(f"anomaly map of {name}.onnx") for alternative in found) == (name in models)
    assert hint(text)


@pytest.mark.parametrize("damage", [
    Path.unlink, lambda path: path.write_bytes(b"no picture"), lambda path: path.write_bytes(path.read_bytes()[:5000]),
    lambda path: Image.new("RGB", (400, 400)).save(path)])
def test_a_heatmap_that_cannot_be_used_leaves_the_image(scored, damage):
    before = alternatives(scored("maps/a", "maps/b"))
    heatmap = Path("maps/b/red-test-spot-003.png")
    damage(heatmap)
    text = page("a.jsonl", "b.jsonl")
    lost = "anomaly map of b.onnx for the defective image of red, test/spot/003.png"
    assert lost in before
    assert alternatives(text) == [alternative for alternative in before if alternative != lost]
    assert hint(text)
    shutil.rmtree("maps")
    assert alternatives(page("a.jsonl", "b.jsonl")) == [
        alternative for alternative in before if not alternative.startswith("anomaly map")]


def test_any_path_of_a_heatmap(scored, mvtec):
    scored("maps/a", "maps/b")
    os.mkfifo("fifo")
    for heatmap in ("", "\0", "\udcff", HOSTILE, "x" * 5000, "/dev/zero", "fifo", "maps", "a.jsonl", str(
            mvtec / "red/test/spot/003.png"), "none://a", "http://", "file:///none.png"):
        records = [json.loads(line) for line in Path("b.jsonl").read_text().splitlines()]
        Path("any.jsonl").write_text(lines([
            {**record, **({"heatmap": heatmap} if "heatmap" in record else {})} for record in records]))
        text = page("any.jsonl")
        assert len(alternatives(text)) == 6
        assert hint(text)


HOSTILE = "</style><script>alert('x')</script><img src=x onerror=\"alert(1)\">&amp;]]>"


def test_names_are_text_wherever_they_stand(files):
    for path in map(Path, ("fp32.jsonl", "int8.jsonl")):
        text = path.read_text()
        for name in ("bolt", "onnx"):
            text = text.replace(name, json.dumps(HOSTILE)[1:-1])
        path.write_text(text)
    found = Page(page(*files))
    assert not found.all("script")
    assert len(found.all("style")) == 1
    assert not any(key.startswith("on") for _, attributes, _ in found.elements for key in attributes)
    assert all(attributes["src"].startswith("data:") for attributes, _ in found.all("img"))
    assert HOSTILE in [text for _, text in found.all("h3")]
    assert any(HOSTILE in text for text in (of for _, of in found.all("th")))


def test_the_page_requests_nothing(files):
    found = Page(page(*files))
    for name, attributes, _ in found.elements:
        assert name not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for key in ("href", "src", "srcset", "xlink:href", "action"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/jpeg;base64,"))
    style, = (text for _, text in found.all("style"))
    assert "url(" not in style
    assert "@import" not in style
    policy = next(attributes["content"] for attributes, _ in found.all("meta")
                  if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert policy.endswith("; base-uri 'none'; form-action 'none'")  # default-src does not cover these


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of #rgb or #rrggbb."""
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
                        for part in (int(digits[at:at + 2], 16) / 255 for at in (0, 2, 4)))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_charts_stand_out_in_both_themes(theme):
    style = Path(html.__file__).with_name("page.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#\w+);", block))
                   for block in re.findall(r":root {(.*?)}", style, re.DOTALL))
    colours = light if theme == "light" else {**light, **dark}
    paper = luminance(colours["paper"])
    for name, colour in colours.items():
        if name in ("paper", "line", "tint"):
            continue
        contrast = (max(luminance(colour), paper) + 0.05) / (min(luminance(colour), paper) + 0.05)
        assert contrast >= (4.5 if name in ("ink", "soft", "better", "worse") else 3), name


@pytest.mark.parametrize("chosen", [["fp32.jsonl"], ["bench.json"], ["int8.jsonl", "bench.json"],
                                    ["fp32.jsonl", "int8.jsonl"], ["fp32.jsonl", "fp32.jsonl"]])
def test_a_page_from_some_of_the_results(files, chosen):
    found = Page(page(*chosen))
    assert found.all("h1")
    assert ("Accuracy" in [text for _, text in found.all("h2")]) == ("fp32.jsonl" in chosen or "int8.jsonl" in chosen)


def test_scores_without_classes_and_of_one_label_are_a_page(files):
    for name in ("fp32", "int8"):
        records = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        kept = [{key: value for key, value in record.items() if key != "class"} for record in records
                if record.get("label") != "anomalous"]
        kept[-1]["metrics"] = {"false_positive_rate": {"mean": 0.05, "pooled": 0.05, "per_class": {}}}
        Path(f"{name}.jsonl").write_text(lines(kept))
    found = Page(page("fp32.jsonl", "int8.jsonl"))
    assert "without a class" in [text for _, text in found.all("h3")]
    assert "roc-title" not in {attributes["aria-labelledby"] for attributes, _ in found.all("svg")}


@pytest.mark.slow
def test_a_page_of_many_images_classes_and_models_is_bounded(files):
    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        run, *_, summary = score_records(f"{name}.onnx")
        images = [{"type": "image", "path": f"data/{index}.png", "score": round(float(score), 4), "raw_score": 0.0,
                   "anomalous": bool(score > 2), "nearest_class": "bolt", "class": f"class {index % 100}",
                   "label": "anomalous" if index % 3 == 0 else "good", "milliseconds": 1.0}
                  for index, score in enumerate(random.standard_cauchy(10_000))]
        per_class = {f"class {index}": 0.5 for index in range(100)}
        summary["metrics"] = {"image_auroc": {"mean": 0.5, "pooled": 0.5, "pooled_raw": 0.5, "per_class": per_class}}
        Path(f"{name}.jsonl").write_text(lines([run, *images, summary]))
    text = page("a.jsonl", "b.jsonl", "c.jsonl")
    assert len(text) < 700_000
    found = Page(text)
    assert len(found.all("svg")) < 60
    assert "of 100 classes" in text
    curves = [attributes["d"] for attributes, _ in found.all("path") if "curve" in (attributes["class"] or "")]
    assert all(curve.count("L") <= 200 for curve in curves)


@given(st.text(), st.text())
def test_marks_hold_any_text(attribute, content):
    seen: List[Any] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: List[Tuple[str, Optional[str]]]) -> None:
            seen.append((tag, dict(attributes).get("class")))

        def handle_data(self, data: str) -> None:
            seen.append(data)

    reader = Reader()
    reader.feed(svg.label(1, 2, content, style=attribute))
    reader.close()
    if not {"\r", "\0"} & set(attribute + content):
        assert seen[0] == ("text", attribute)
        assert "".join(seen[1:]) == content
    assert svg.of_model(0, svg.label(1, 2, "<b>")) == (
        '<g class="m1"><text x="1" y="2" text-anchor="start" class="">&lt;b&gt;</text></g>')


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low, spread):
    scale = Scale(low, low + spread, 0, 100)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 12
    margin = 1e-6 * max(abs(low), spread)
    for value, text in ticks:
        assert low - margin <= value <= low + spread + margin
        assert float(text.replace("−", "-")) == pytest.approx(value, rel=1e-6, abs=margin)


@pytest.mark.parametrize(("value", "digits", "sign", "text"), [
    (1.25, 1, "", "1.2"), (-0.00004, 4, "+", "0.0000"), (0.0, 2, "+", "0.00"), (-1.5, 1, "", "−1.5"),
    (0.5, 2, "+", "+0.50"), (100.0, 0, "", "100"),
])
def test_numbers_have_a_real_minus_and_zero_no_sign(value, digits, sign, text):
    assert number(value, digits, sign) == text


def test_labels_avoid_what_is_there():
    taken = [(0.0, 0.0, 100.0, 100.0)]
    assert svg.free_place([(50, 50), (120, 50)], 40, taken, (0, 400)) == (120, 50)
    assert svg.free_place([(50, 50), (120, 50)], 40, taken, (0, 150)) == (50, 50)  # nowhere is free: the first


# In a browser


@pytest.fixture(scope="session")
def chromium() -> Callable[[Path, Path], Tuple[List[str], Set[str]]]:
    """Opens a page and takes a screenshot; returns the messages of the console and the requested hosts."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no Chromium on this machine to open the page in")

    def visit(path: Path, picture: Path) -> Tuple[List[str], Set[str]]:
        log = picture.with_suffix(".network.json")
        done = subprocess.run(
            [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={picture.parent / 'profile'}",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", "--no-first-run", "--enable-logging=stderr", f"--log-net-log={log}",
             "--window-size=1200,2000", f"--screenshot={picture}", path.as_uri()],
            capture_output=True, text=True, check=False, timeout=120)
        assert picture.exists(), done.stderr
        console = re.findall(r":CONSOLE.*?\] (.*)", done.stderr)
        return console, set(re.findall(r'"url":"\w+://([^/"]*)', log.read_text()))

    return visit


def test_a_browser_reports_no_problem_and_requests_nothing(files, chromium, tmp_path):
    Path("report.html").write_text(page(*files, gates=("recall>0.1",)), encoding="utf-8")
    Path("blank.html").write_text(BLANK)
    Path("bad.html").write_text(f"{BLANK}<script>missing()</script><img src='http://example.org/x.png'>")
    _, own = chromium(tmp_path / "blank.html", tmp_path / "blank.png")  # requests of the browser itself
    console, hosts = chromium(tmp_path / "bad.html", tmp_path / "bad.png")
    assert "missing is not defined" in console[0]
    assert "example.org" in hosts
    console, hosts = chromium(tmp_path / "report.html", tmp_path / "report.png")
    assert console == []
    assert hosts <= own
    colours = np.asarray(Image.open(tmp_path / "report.png").convert("RGB")).reshape(-1, 3)
    assert {(0x00, 0x72, 0xb2), (0xd5, 0x5e, 0x00)} <= set(map(tuple, np.unique(colours, axis=0).tolist()))
