"""examples/line: the scripts and units of a service, with the programs that they run."""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/line"
UNITS = sorted(EXAMPLE.glob("*.service"))


def need(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program, path=SEARCH):
            pytest.skip(f"no {program} on this machine")


SEARCH = f"{os.environ['PATH']}:/usr/sbin"


class Line:
    """A folder of the service, with the scripts and ``uadtool`` in it."""

    def __init__(self, folder: Path, detector: Path) -> None:
        self.folder, self.scores = folder, folder / "scores.jsonl"
        (folder / "incoming").mkdir()
        (folder / "bin").mkdir()
        shutil.copy(detector, folder / "unified.onnx")
        for script in EXAMPLE.glob("*.sh"):
            shutil.copy(script, folder)
        program = folder / "bin/uadtool"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m uadtool "$@"\n')
        program.chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{folder / 'bin'}:{SEARCH}"}

    @contextmanager
    def running(self, *command: object, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A command in a process group of its own, as systemd starts it, that ends with SIGTERM."""
        with subprocess.Popen(list(map(str, command)), cwd=self.folder, env={**self.environment, **variables},
                              stderr=subprocess.PIPE, start_new_session=True) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait(30)

    def follow(self) -> Any:
        return self.running("./follow.sh", "unified.onnx", "incoming", "scores.jsonl", "-q")

    def arrive(self, image: Path, name: str) -> None:
        shutil.copy(image, self.folder / "incoming" / f".{name}")
        (self.folder / "incoming" / f".{name}").rename(self.folder / "incoming" / name)

    def images(self, scores: str = "scores.jsonl") -> List[Dict[str, Any]]:
        """The whole records of images so far."""
        path, found = self.folder / scores, []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("type") == "image":
                found.append(record)
        return found


def until(condition: Callable[[], object]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it takes too long")


@pytest.fixture
def line(detector: Path, tmp_path: Path) -> Line:
    return Line(tmp_path, detector)


@pytest.fixture
def spot(mvtec: Path) -> Path:
    return mvtec / "red/test/spot/003.png"


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_the_units(unit: Path, line: Line) -> None:
    need("systemd-analyze")
    text = unit.read_text().replace("/srv/line", str(line.folder)).replace("/opt/uadtool", str(line.folder))
    (line.folder / unit.name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", line.folder / unit.name], capture_output=True,
                          text=True, timeout=60)
    complaints = [complaint for complaint in done.stderr.splitlines() if unit.name in complaint]
    assert complaints == []


@pytest.mark.parametrize("script", sorted(EXAMPLE.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_posix(script: Path) -> None:
    assert subprocess.run(["sh", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_restart_goes_on_where_the_power_failed(line: Line, spot: Path) -> None:
    pytest.importorskip("watchdog")
    line.arrive(spot, "a.png")
    with line.follow() as process:
        until(lambda: len(line.images()) == 1)
        os.killpg(process.pid, signal.SIGKILL)
    with line.scores.open("a") as file:
        file.write('{"type": "im')
    line.arrive(spot, "b.png")
    with line.follow():
        until(lambda: len(line.images()) == 2)
        line.arrive(spot, "c.png")
        until(lambda: len(line.images()) == 3)
    assert [Path(image["path"]).name for image in line.images()] == ["a.png", "b.png", "c.png"]
    assert sum('"type": "run"' in text and text.startswith("{") for text in line.scores.read_text().splitlines()) == 2


def test_logs_rotate_and_no_image_is_scored_twice_or_lost(line: Line, spot: Path) -> None:
    need("logrotate")
    pytest.importorskip("watchdog")
    config = (EXAMPLE / "uadtool.logrotate").read_text().replace("/srv/line", str(line.folder))
    config = config.replace("    su line line\n", "").replace("systemctl try-restart", "echo >> restarted #")
    (line.folder / "config").write_text(config)
    line.folder.chmod(0o755)  # logrotate refuses folders into which others may write

    def rotate() -> None:
        done = subprocess.run(["logrotate", "-f", "-s", line.folder / "state", line.folder / "config"], text=True,
                              env=line.environment, cwd=line.folder, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")

    line.arrive(spot, "a.png")
    with line.follow():
        until(lambda: len(line.images()) == 1)
        rotate()
        line.arrive(spot, "b.png")
        until(lambda: len(line.images("scores.jsonl.1")) == 2)  # it still writes into the file that it opened
    assert (line.folder / "restarted").exists()
    line.arrive(spot, "c.png")
    with line.follow():
        until(lambda: len(line.images()) == 1)
    rotate()
    assert [Path(image["path"]).name for image in line.images("scores.jsonl.1")] == ["c.png"]
    assert (line.folder / "scores.jsonl.2.gz").exists()
    with line.follow():
        time.sleep(2)
        line.arrive(spot, "d.png")
        until(lambda: any(image["path"].endswith("d.png") for image in line.images()))
    assert not any(image["path"].endswith("c.png") for image in line.images())


def test_a_full_disk_loses_no_image(line: Line, spot: Path) -> None:
    """A limit of the size of files stands in for it: the service ends, and systemd starts it again until it is gone."""
    pytest.importorskip("watchdog")
    for number in range(30):
        line.arrive(spot, f"{number:02}.png")
    limited = ["bash", "-c", "trap '' XFSZ; ulimit -f 4; exec ./follow.sh unified.onnx incoming scores.jsonl -q"]
    for message in (b"cannot write to stdout: File too large", b"follow.sh: "):  # the second time, half a line is left
        with line.running(*limited) as process:
            assert process.wait(60) != 0
            assert message in process.stderr.read()
    before = len(line.images())
    assert 0 < before < 30
    with line.follow():
        until(lambda: len(line.images()) == 30)
    assert len({image["path"] for image in line.images()}) == 30


def test_frames_of_a_camera(line: Line) -> None:
    need("ffmpeg")
    source = "-re", "-f", "lavfi", "-i", "testsrc=size=64x48:rate=20:duration=4"
    with line.running("./camera.sh", "unified.onnx", "scores.jsonl", *source,
                      OPTIONS="-q --copy-anomalous suspicious --threshold -100") as process:
        assert process.wait(60) == 0, process.stderr.read()
    images = line.images()
    assert len(images) > 3
    assert all((line.folder / image["copy"]).exists() for image in images)
    with line.running("./camera.sh", "unified.onnx", "scores.jsonl", "-i", "no-such-camera", OPTIONS="-q") as process:
        assert process.wait(60) == 1
        assert b"no images to score" in process.stderr.read()
    with line.running("./camera.sh", "unified.onnx", "scores.jsonl", "-re", "-f", "lavfi", "-i", "testsrc=size=64x48",
                      OPTIONS="-q") as process:
        until(lambda: len(line.images()) > len(images) + 3)
    until(lambda: '"type": "summary"' in line.scores.read_text().splitlines()[-1])  # the pipe outlives its shell
    assert "dropped" in json.loads(line.scores.read_text().splitlines()[-1])


class Hook(http.server.BaseHTTPRequestHandler):
    """Answers the first request with an error."""

    requests: List[bytes] = []  # noqa: RUF012 of the test that runs

    def do_POST(self) -> None:
        self.requests.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(503 if len(self.requests) == 1 else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def record(number: int, **fields: Any) -> str:
    return json.dumps({"type": "image", "path": f"{number}.png", "time": f"2126-01-01T00:00:00.{number // 2:03}Z",
                       "anomalous": True, **fields}) + "\n"


def test_a_webhook_gets_every_alarm(line: Line) -> None:
    need("jq", "curl")
    Hook.requests.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (line.folder / "bin/sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.1\n")
    (line.folder / "bin/sleep").chmod(0o755)
    curl = "curl", "-sSf", "--data-binary", "@-", f"http://127.0.0.1:{server.server_port}/alarm"

    def told() -> List[str]:
        return [json.loads(request)["path"] for request in Hook.requests[1:]]

    line.scores.write_text(record(0, time="2026-01-01T00:00:00.000Z"))  # before the first start
    with line.running("./alarm.sh", "scores.jsonl", *curl):
        with line.scores.open("a") as file:
            file.write('{"type": "run"}\n' + record(1) + record(2, anomalous=False) + '{"cut sho\n' + record(3))
        until(lambda: told() == ["1.png", "3.png"])
        time.sleep(0.5)  # until the last is noted
    with line.scores.open("a") as file:  # it was the last one before a rotation while the service was down
        file.write(record(4))
    line.scores.rename(line.folder / "scores.jsonl.1")
    line.scores.write_text(record(5))
    with line.running("./alarm.sh", "scores.jsonl", *curl):
        until(lambda: told() == ["1.png", "3.png", "4.png", "5.png"])
        line.scores.rename(line.folder / "scores.jsonl.1")
        line.scores.write_text(record(6))
        until(lambda: told()[-1] == "6.png")
        time.sleep(0.5)
    Path(f"{line.scores}.told").write_text("")  # a power failure: it starts with what comes from now on
    with line.running("./alarm.sh", "scores.jsonl", *curl, FILTER="select(.error)"):
        with line.scores.open("a") as file:
            file.write(record(7) + record(8, error="broken", anomalous=None))
        until(lambda: told()[-1] == "8.png")
    with line.running("./alarm.sh", "scores.jsonl", *curl, TOLD="other.told"):
        with line.scores.open("a") as file:
            file.write(record(9))
        until(lambda: told()[-1] == "9.png")
    assert told()[:6] == ["1.png", "3.png", "4.png", "5.png", "6.png", "8.png"]
    server.shutdown()


def test_a_broker_gets_every_alarm(line: Line, spot: Path, mvtec: Path) -> None:
    """From an image that arrives to a message, over a broker on loopback."""
    need("mosquitto", "mosquitto_pub", "mosquitto_sub", "jq")
    pytest.importorskip("watchdog")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (line.folder / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    broker = "-h", "127.0.0.1", "-p", port, "-t", "line/anomalous", "-q", 1
    with line.running("mosquitto", "-c", "mosquitto.conf"):
        until(lambda: subprocess.run(["mosquitto_pub", *map(str, broker), "-m", "up"], env=line.environment,
                                     capture_output=True).returncode == 0)
        with line.follow(), line.running("./alarm.sh", "scores.jsonl", "mosquitto_pub", *broker, "-s"), \
                subprocess.Popen(["mosquitto_sub", *map(str, broker), "-C", "2"], env=line.environment,
                                 stdout=subprocess.PIPE) as subscriber:
            time.sleep(1)  # until it has subscribed
            line.arrive(mvtec / "red/test/good/000.png", "good.png")
            line.arrive(spot, "spot.png")
            line.arrive(spot, "other.png")
            assert subscriber.stdout
            messages = [json.loads(text) for text in subscriber.stdout]
    assert [message["path"] for message in messages] == ["incoming/spot.png", "incoming/other.png"]
    assert all(message["anomalous"] for message in messages)
