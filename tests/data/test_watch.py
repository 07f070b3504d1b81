import errno
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from uadtool.data import watch
from uadtool.data.watch import Watch
from uadtool.files import WRITTEN

pytest.importorskip("watchdog")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="inotify")


class Followed(Watch):
    """A watch that scans all the time, in a thread."""

    def __init__(self, folder, known=None):
        self.scans, self._found = 0, queue.SimpleQueue()
        super().__init__(str(folder), known)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self):
        for path in self:
            self._found.put(path)

    def _scan(self, before):
        seen = super()._scan(before)
        self.scans += 1
        return seen

    def without_events(self):
        """From now on as on a share that other machines write to."""
        self._observer.unschedule_all()
        return self

    def after(self, scans):
        """Wait until so many scans have begun and ended."""
        last = self.scans + scans + 1
        while self.scans < last:
            time.sleep(0.01)

    def found(self, count):
        """The next images, sorted, of which there are not more than ``count``."""
        paths = sorted(self._found.get(timeout=60) for _ in range(count))
        self.after(3)
        assert self._found.empty()
        return paths


@pytest.fixture
def follow(monkeypatch):
    """Follow a folder."""
    monkeypatch.setattr(watch, "SCAN_PAUSE", 0.1)
    started = []

    def follow(folder, known=None):
        started.append(Followed(folder, known))
        return started[-1]

    yield follow
    for followed in started:
        followed.stop()
        followed._thread.join(60)


def test_images_from_before_are_found_unless_they_are_known(follow, tmp_path, caplog):
    caplog.set_level("INFO", "uadtool")
    for name in ("known.jpg", "changed.jpg", "new.jpg"):
        (tmp_path / name).write_text("old")
        os.utime(tmp_path / name, (1000, 1000))
    followed = follow(tmp_path, {str(tmp_path / "known.jpg"): 1000.5, str(tmp_path / "changed.jpg"): 999.5})
    assert followed.found(2) == [str(tmp_path / name) for name in ("changed.jpg", "new.jpg")]
    assert f"following {tmp_path}, with 2 images from before" in caplog.text
    (tmp_path / "known.jpg").write_text("rewritten")
    assert followed.found(1) == [str(tmp_path / "known.jpg")]


def test_pictures_that_a_command_writes_are_no_images(follow, tmp_path):
    (tmp_path / "heatmaps").mkdir()
    (tmp_path / "heatmaps" / WRITTEN).touch()
    followed = follow(tmp_path)
    (tmp_path / "heatmaps/a.jpg").write_text("drawn")
    (tmp_path / "b.jpg").write_text("new")
    assert followed.found(1) == [str(tmp_path / "b.jpg")]


def test_images_that_cause_no_events_are_found_by_scans(follow, tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("old.jpg", "inner/old.jpg"):
        (tmp_path / name).write_text("old")
    followed = follow(tmp_path).without_events()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "heatmaps").mkdir()
    (tmp_path / "heatmaps" / WRITTEN).touch()
    for name in ("a.jpg", "inner/b.PNG", "new/c.jpg", "notes.txt", ".d.jpg", ".hidden/e.jpg", "heatmaps/f.jpg"):
        (tmp_path / name).write_text("new")
    (tmp_path / "empty.jpg").touch()  # has just been created
    assert followed.found(3) == [str(tmp_path / name) for name in ("a.jpg", "inner/b.PNG", "new/c.jpg")]
    (tmp_path / "old.jpg").write_text("rewritten")
    (tmp_path / "a.jpg").write_text("rewritten")
    assert followed.found(2) == [str(tmp_path / name) for name in ("a.jpg", "old.jpg")]
    (tmp_path / "a.jpg").unlink()
    followed.after(2)
    (tmp_path / "a.jpg").write_text("again")
    assert followed.found(1) == [str(tmp_path / "a.jpg")]


def test_images_of_a_real_volume_that_causes_no_events(tmp_path):
    """An overlay causes none for files that appear in its lower layer."""
    if not shutil.which("unshare"):
        pytest.skip("unshare")
    program = f"""
import sys
from uadtool.data import watch
watch.SCAN_PAUSE = 0.1
images = watch.Watch("{tmp_path}/merged")
for folder in ("lower", "merged"):
    open(f"{tmp_path}/{{folder}}/{{folder}}.jpg", "w").write("image")
    print(next(iter(images)), flush=True)
images.stop()
"""
    script = """
mount -t tmpfs none "$1" && cd "$1" && mkdir lower upper work merged &&
mount -t overlay none -o lowerdir=lower,upperdir=upper,workdir=work merged || exit 77
exec "$2" -c "$3"
"""
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, program],
                          capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounts are not allowed")
    assert (done.stdout.split(), done.stderr) == ([f"{tmp_path}/merged/lower.jpg", f"{tmp_path}/merged/merged.jpg"], "")


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}//", "incoming", "./incoming/", "incoming/../incoming", "."])
def test_an_image_that_an_event_gave_is_given_again_only_when_it_is_rewritten(follow, monkeypatch, tmp_path, spelling):
    folder = tmp_path / "incoming"
    (folder / "inner").mkdir(parents=True)
    monkeypatch.chdir(folder if spelling == "." else tmp_path)
    followed = follow(spelling.format(folder))
    for name in ("a.jpg", "inner/b.jpg"):
        (folder / name).write_text("new")
    assert [Path(path).resolve() for path in followed.found(2)] == [folder / "a.jpg", folder / "inner/b.jpg"]
    followed.without_events()
    (folder / "a.jpg").write_text("rewritten")
    assert [Path(path).resolve() for path in followed.found(1)] == [folder / "a.jpg"]


def test_an_image_that_another_machine_still_writes_is_waited_for(follow, tmp_path):
    followed = follow(tmp_path).without_events()
    with (tmp_path / "slow.jpg").open("w") as file:
        end = followed.scans + 5
        while followed.scans < end:  # it grows during each scan
            file.write("more")
            file.flush()
        assert followed._found.empty()
    assert followed.found(1) == [str(tmp_path / "slow.jpg")]


def test_an_image_that_this_machine_has_not_closed_is_waited_for(follow, tmp_path):
    followed = follow(tmp_path)
    with (tmp_path / "stalls.jpg").open("w") as file:
        file.write("half of the")
        file.flush()
        assert followed.found(0) == []
        file.write(" image")
    assert followed.found(1) == [str(tmp_path / "stalls.jpg")]


def test_an_image_whose_closing_was_not_reported_is_found(follow, monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "WRITING", 0.5)
    followed = follow(tmp_path)
    with (tmp_path / "lost.jpg").open("w") as file:
        file.write("image")
        file.flush()
        assert followed.found(1) == [str(tmp_path / "lost.jpg")]


def test_attributes_that_change_make_nothing_new(follow, monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "WRITING", 0.3)
    (tmp_path / "old.jpg").write_text("old")
    followed = follow(tmp_path)
    (tmp_path / "old.jpg").chmod(0o600)
    followed._writing[str(tmp_path / "old.jpg")] = time.monotonic()  # older watchdogs report it as a change
    followed.after(5)
    assert followed.found(0) == []


def test_folders_that_cannot_be_listed_for_a_moment_make_nothing_new(follow, monkeypatch, tmp_path):
    """Permissions do not stop root, and no share is at hand."""
    scandir, stat, broken = os.scandir, os.stat, []

    def fail(real):
        def failing(path, *arguments, **options):
            if str(path) in broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(path, *arguments, **options)
        return failing

    monkeypatch.setattr(os, "scandir", fail(scandir))
    monkeypatch.setattr(os, "stat", fail(stat))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/old.jpg").write_text("old")
    (tmp_path / "old.jpg").write_text("old")
    followed = follow(tmp_path)
    (tmp_path / "inner/new.jpg").write_text("new")
    assert followed.found(1) == [str(tmp_path / "inner/new.jpg")]
    followed.without_events()
    for path in (tmp_path / "inner", tmp_path / "old.jpg", tmp_path / "inner/new.jpg"):
        broken.append(str(path))
        followed.after(3)
        broken.clear()
        assert followed.found(0) == []
    broken.append(str(tmp_path / "inner"))
    (tmp_path / "other.jpg").write_text("new")
    assert followed.found(1) == [str(tmp_path / "other.jpg")]


def test_folders_that_vanish_do_not_end_the_scans(follow, tmp_path):
    followed = follow(tmp_path).without_events()
    for _ in range(20):
        (tmp_path / "inner/most").mkdir(parents=True)
        (tmp_path / "inner/most/a.txt").touch()
        shutil.rmtree(tmp_path / "inner")
    (tmp_path / "a.jpg").write_text("new")
    assert followed.found(1) == [str(tmp_path / "a.jpg")]


def test_images_that_are_gone_are_forgotten(follow, monkeypatch, tmp_path):
    followed = follow(tmp_path)
    for index in range(20):
        (tmp_path / f"{index}.jpg").write_text("new")
    with (tmp_path / "unfinished.txt").open("w") as file:
        file.write("text")
        file.flush()
        followed.found(20)
    monkeypatch.setattr(watch, "WRITING", 0.0)
    assert len(followed._yielded) == 20
    for path in tmp_path.iterdir():
        path.unlink()
    followed.after(2)
    assert (followed._yielded, followed._writing) == ({}, {})


def test_scans_of_large_folders_are_rare():
    assert watch._pause(0.001) == watch.SCAN_PAUSE
    assert watch._pause(1.0) == pytest.approx(19)  # 5 % of 20 seconds
