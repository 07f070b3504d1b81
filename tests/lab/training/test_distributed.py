"""Several processes train one model together, as torchrun starts them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_together
from conftest import run_here, validate

from uadtool.files import file_digest
from uadtool.lab.models import load_model
from uadtool.lab.training import distributed

pytestmark = pytest.mark.slow

METHODS = {
    "stfpm": ["--steps", 200],
    "rd": ["--steps", 60],
    "us": ["--steps", 60, "--option", "width=0.06"],
    "dinomaly": ["--steps", 60],
    "duet": ["--steps", 60, "--option", "entries=200"],
}
SHOP_FLOOR, CLASSES = Path(__file__).parents[4] / "shared/data/shop-floor", ("commutator", "magnetic_tile")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(processes, *arguments):
    """The command line that starts so many processes with the arguments."""
    return [sys.executable, "-m", "torch.distributed.run", f"--master-port={free_port()}",
            f"--nproc-per-node={processes}", *map(str, arguments)]


def run_together(processes, *arguments):
    return subprocess.run(torchrun(processes, *arguments), capture_output=True, text=True, timeout=300)


def messages(stderr):
    """The messages of uadtool, without those of torchrun."""
    return [line for line in stderr.splitlines() if line.startswith("uadtool: ")]


def train(data, output, *options):
    method = [] if "--method" in options else ["--method", "stfpm"]
    return ["-m", "uadtool", "train", data, "-o", output, "--image-size", 64, *method, *options]


# The parts


@pytest.fixture(scope="module")
def alone(textures, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "parts"
    train_together.main(str(textures), str(output))
    return torch.load(f"{output}.0", weights_only=False)


@pytest.fixture(scope="module", params=[2, 4])
def together(textures, tmp_path_factory, request):
    output = tmp_path_factory.mktemp("together") / "parts"
    done = run_together(request.param, train_together.__file__, textures, output)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{output}.{rank}", weights_only=False) for rank in range(request.param)]


def test_one_process_needs_no_group(alone):
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_every_process_has_all_features(alone, together):
    for found in together:
        for (images, features), (expected_images, expected) in zip(found["features"], alone["features"]):
            assert torch.equal(images, expected_images)
            torch.testing.assert_close(features, expected)


def test_gradients_weights_and_losses_are_those_of_one_process(alone, together):
    for found in together:
        torch.testing.assert_close(found["plain"]["gradients"], alone["plain"]["gradients"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["plain"]["state"], alone["plain"]["state"], rtol=1e-4, atol=1e-6)
        assert found["plain"]["outcome"].best_step == alone["plain"]["outcome"].best_step
        assert found["plain"]["outcome"].held_out_loss == pytest.approx(alone["plain"]["outcome"].held_out_loss)


def test_all_processes_end_with_the_same_model(together):
    first, *others = together
    for other in others:
        for name in ("plain", "normed"):
            assert other[name]["outcome"] == first[name]["outcome"]
            for key, value in first[name]["state"].items():
                assert torch.equal(other[name]["state"][key], value), key


def test_statistics_of_batch_norm_are_nearly_those_of_one_process(alone, together):
    for name in ("1.running_mean", "1.running_var"):
        expected, found = alone["normed"]["state"][name], together[0]["normed"]["state"][name]
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.01)


def test_no_two_processes_draw_the_same(alone, together):
    assert together[0]["drawn"][0] == alone["drawn"][0]
    assert len({found["drawn"][0] for found in together}) == len(together)


# Whole runs


@pytest.fixture(scope="module")
def by_two(textures, tmp_path_factory):
    output = tmp_path_factory.mktemp("two") / "model.safetensors"
    done = run_together(2, *train(textures, output, "--method", "duet", *METHODS["duet"]))
    assert done.returncode == 0, done.stderr
    return output, done


def test_only_one_process_logs_and_writes(by_two):
    output, done = by_two
    record = json.loads(done.stdout)
    validate(record, "train")
    assert record["processes"] == 2
    assert record["digest"] == file_digest(output)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert len([line for line in messages(done.stderr) if "with weights of" in line]) == 1
    assert load_model(output)[1].provenance[0]["processes"] == 2


def test_the_model_finds_anomalies(by_two, textures):
    assert auroc(by_two[0], textures)["image_auroc"] > 0.95


def auroc(model, *data):
    """Pooled figures of a model."""
    onnx = model.with_suffix(".onnx")
    run_here("export", model, "-o", onnx)
    metrics = json.loads(run_here("score", onnx, *data).splitlines()[-1])["metrics"]
    return {name: metrics[name]["pooled"] for name in ("image_auroc", "pixel_auroc") if name in metrics}


def interrupt(number, command, checkpoint):
    """Start the command, send the signal once a checkpoint exists, and return the messages."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert stdout == ""
    return stderr


@pytest.mark.parametrize(("number", "processes"), [
    (signal.SIGTERM, 1),  # the number of processes may change
    (signal.SIGINT, 2),
])
def test_an_interrupted_run_goes_on(textures, tmp_path, number, processes):
    output, checkpoint = tmp_path / "resumed", tmp_path / "resumed.checkpoint"
    options = "--method", "us", "--steps", 200
    stderr = interrupt(number, torchrun(2, *train(textures, output, *options)), checkpoint)
    assert messages(stderr).count("uadtool: interrupted") <= 1  # of SIGINT
    assert len([line for line in messages(stderr) if f"--resume continues from {checkpoint}" in line]) == 1
    assert not output.exists()
    start = (lambda *rest: torchrun(processes, *rest)) if processes > 1 else (lambda *rest: [sys.executable, *rest])
    resumed = subprocess.run([*map(str, start(*train(textures, output, *options, "--resume")))], capture_output=True,
                             text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    assert json.loads(resumed.stdout)["processes"] == processes
    assert not checkpoint.exists()
    if processes == 2:
        whole = run_together(2, *train(textures, tmp_path / "whole", *options))
        assert whole.returncode == 0, whole.stderr
        assert file_digest(output) == file_digest(tmp_path / "whole")


# What goes wrong


def test_more_processes_than_images(textures, tmp_path):
    (tmp_path / "dots/train/good").mkdir(parents=True)
    shutil.copy(textures / "dots/train/good/000.png", tmp_path / "dots/train/good")
    done = run_together(2, *train(tmp_path / "dots", tmp_path / "model", "--steps", 2))
    assert done.returncode == 1
    assert done.stdout == ""
    assert [line for line in messages(done.stderr) if "error" in line] == [
        "uadtool: error: there are more processes (2) than images in a batch (1); start at most 1"]


@pytest.fixture
def scheduler():
    """Start a process for each of the arguments, as if each had its own machine; returns outputs and exit codes."""
    started = []

    def start(*arguments):
        port = free_port()
        for rank, line in enumerate(arguments):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(arguments)),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            started.append(subprocess.Popen([sys.executable, *map(str, line)], env=environment, text=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return [(*process.communicate(timeout=120), process.returncode) for process in started]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": "elsewhere"}, "process 1 finds other images than process 0; every machine needs the same files under the "
                            "same path"),
    ({"data": "nowhere"}, "does not exist"),
    ({"data": "one class more"}, "process 1 has image count 60, process 0 has 40; start all processes with the same "
                                 "options"),
    ({"seed": 3}, "process 1 has seed 3, process 0 has 0; start all processes with the same options"),
    ({"method": "rd"}, "process 1 has method 'rd', process 0 has 'stfpm'; start all processes with the same options"),
])
def test_machines_that_do_not_agree(textures, tmp_path, scheduler, changes, message):
    if changes.get("data") in ("elsewhere", "one class more"):
        shutil.copytree(textures, tmp_path / changes["data"])
    if changes.get("data") == "one class more":
        shutil.copytree(next(textures.iterdir()), tmp_path / changes["data"] / "more")
    data = tmp_path / changes["data"] if "data" in changes else textures
    first, second = scheduler(train(textures, tmp_path / "model", "--steps", 2, "--seed", 0),
                              train(data, tmp_path / "model", "--steps", 2, "--seed", changes.get("seed", 0),
                                    "--method", changes.get("method", "stfpm")))
    assert [first[2], second[2]] == [1, 1]
    assert [line for _, stderr, _ in (first, second) for line in messages(stderr) if "error" in line] == [
        line for line in messages(second[1]) if message in line]
    assert first[0] == second[0] == ""
    assert not (tmp_path / "model").exists()


def test_all_processes_end_when_one_is_killed(textures, tmp_path):
    command = torchrun(4, *train(textures, tmp_path / "model", "--method", "us", "--steps", 2000))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "model.checkpoint").exists() and process.poll() is None:
            time.sleep(0.1)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[2]), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert stdout == ""
    assert len([line for line in messages(stderr) if "error" in line]) <= 1
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


# Figures


@pytest.mark.parametrize("method", METHODS)
def test_figures_do_not_depend_on_the_number_of_processes(textures, tmp_path, method):
    found = {}
    for processes in (1, 2, 4):
        output = tmp_path / f"{processes}.safetensors"
        done = run_together(processes, *train(textures, output, "--method", method, *METHODS[method]))
        assert done.returncode == 0, done.stderr
        found[processes] = auroc(output, textures)
    print(f"{method}, by the number of processes: {found}")
    for processes in (2, 4):
        assert found[processes] == pytest.approx(found[1], abs=0.05), found


@pytest.mark.skipif(not SHOP_FLOOR.exists(), reason="the shop-floor images are not here")
@pytest.mark.parametrize("method", ["stfpm", "duet"])
def test_figures_of_photographs(tmp_path, method):
    found = {}
    for processes in (1, 2, 4):
        output = tmp_path / f"{processes}.safetensors"
        done = run_together(processes, *train(SHOP_FLOOR, output, "--method", method, "--classes",
                                              ",".join(CLASSES), "--image-size", 128, "--steps", 200))
        assert done.returncode == 0, done.stderr
        found[processes] = auroc(output, *(SHOP_FLOOR / name for name in CLASSES))
    print(f"{method}, by the number of processes: {found}")
    for processes in (2, 4):
        assert found[processes] == pytest.approx(found[1], abs=0.05), found
