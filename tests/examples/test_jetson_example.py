"""examples/jetson against a real sshd, whose login has Python 3.8 and nothing else, as a Jetson with JetPack 5 has.

There is no GPU: ONNX Runtime runs the model there.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow  # installs packages on the device
EXAMPLE = Path(__file__).parents[2] / "examples/jetson"
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")

LOGIN = """#!/bin/sh
cd {home} && exec env -i HOME={home} PATH={home}/bin:/usr/bin:/bin PIP_CONFIG_FILE="{pip_config}" {pip_index} \\
    sh -c "$SSH_ORIGINAL_COMMAND"
"""


@pytest.fixture(scope="module")
def device(python38, tmp_path_factory):
    """The home folder on the device, and the command that logs in."""
    if not (SSHD and shutil.which("ssh")):
        pytest.skip("no sshd or no ssh on this machine")
    folder = tmp_path_factory.mktemp("device")
    home = folder / "home"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python3").symlink_to(python38)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    login = folder / "login"
    pip_index = " ".join(f"{name}='{value}'" for name, value in os.environ.items() if name.startswith("PIP_"))
    config = subprocess.run([sys.executable, "-m", "pip", "config", "debug"], capture_output=True, text=True).stdout
    existing = [line.split(",")[0].strip() for line in config.splitlines() if "exists: True" in line]
    login.write_text(LOGIN.format(home=home, pip_index=pip_index, pip_config=existing[-1] if existing else ""))
    login.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    settings = {"Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "PidFile": "none",
                "AuthorizedKeysFile": folder / "user.pub", "StrictModes": "no", "UsePAM": "no", "ForceCommand": login,
                "PermitRootLogin": "yes", "PasswordAuthentication": "no"}
    (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    sshd = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "config"], stderr=subprocess.PIPE)
    ssh = (f"ssh -p {port} -i {folder / 'user'} -o BatchMode=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR "
           f"-o UserKnownHostsFile=/dev/null")
    for _ in range(100):
        if subprocess.run([*ssh.split(), "127.0.0.1", "true"], capture_output=True).returncode == 0:
            break
        assert sshd.poll() is None, sshd.stderr.read()
        time.sleep(0.1)
    yield home, ssh
    sshd.terminate()
    sshd.wait()


@pytest.fixture(scope="module")
def make(device, int8, textures, preloaded, tmp_path_factory):
    """Run a target of the example for the device; gives the finished process, and the folder of results."""
    out = tmp_path_factory.mktemp("deploy") / "out"

    def make(target, **variables):
        settings = {"JETSON": "127.0.0.1", "SSH": device[1], "MODEL": int8.path, "DATA": textures, "OUT": out,
                    "RUNTIME": "onnxruntime", "UADTOOL": preloaded, "PYTHON": sys.executable,
                    "BENCH_OPTIONS": "--duration 0.2 --repetitions 1", **variables}
        command = ["make", "-C", str(EXAMPLE), target, *(f"{name}={value}" for name, value in settings.items())]
        return subprocess.run(command, capture_output=True, text=True)

    make.out = out
    return make


@pytest.fixture(scope="module")
def deployed(make):
    done = make("deploy")
    assert done.returncode == 0, done.stderr
    return done


def test_the_device_scores_what_the_workstation_scores(deployed, make, textures, device):
    scores = {name: [json.loads(line) for line in (make.out / f"{name}.scores.jsonl").read_text().splitlines()]
              for name in ("workstation", "device")}
    assert scores["device"][0]["host"]["python"].startswith("3.8.")
    assert [record.get("path") for record in scores["device"]] == [record.get("path") for record in
                                                                  scores["workstation"]]
    for here, there in zip(scores["workstation"][1:-1], scores["device"][1:-1]):
        assert there["score"] == pytest.approx(here["score"], abs=0.05)
    assert scores["device"][-1]["errors"] == 0
    bench = json.loads((make.out / "device.bench.json").read_text())
    assert bench["host"]["python"].startswith("3.8.")
    packages = {path.name for path in device[0].glob("uadtool/.venv/lib/*/site-packages/*")}
    assert packages >= {"uadtool", "onnxruntime"}
    assert not packages & {"torch", "onnx"}


def test_the_device_gets_the_modules_that_there_are(deployed, make):
    wheel, = (make.out / "wheels").glob("uadtool-*.whl")
    package = EXAMPLE.parents[1] / "uadtool"
    with ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.endswith(".py")}
    assert found == {f"uadtool/{path.relative_to(package)}" for path in package.rglob("*.py")}


def test_the_comparison_has_both(deployed):
    header, = [line for line in deployed.stdout.splitlines() if line.startswith("metric")]
    assert header.split()[1:] == ["int8.onnx", "int8.onnx", "change"]
    assert len([line for line in deployed.stdout.splitlines() if line.startswith("runtime")]) == 1
    rows = {line[:20].strip(): line for line in deployed.stdout.splitlines()}
    for name in ("image AUROC, mean", "latency p50, ms", "95% interval"):
        assert name in rows


def test_what_is_done_is_not_done_again(deployed, make, int8):
    files = sorted(make.out.glob("*.*"))
    before = [path.stat().st_mtime_ns for path in files]
    again = make("deploy")
    assert again.returncode == 0, again.stderr
    assert [path.stat().st_mtime_ns for path in files] == before
    (make.out / "device.scores.jsonl").unlink()  # as if it had been interrupted there
    assert make("deploy").returncode == 0
    changed = [path.name for path, time in zip(files, before) if path.stat().st_mtime_ns != time]
    assert changed == ["device.scores.jsonl"]


@pytest.mark.slow
def test_what_is_on_another_device_does_not_count(deployed, make):
    bench = make.out / "device.bench.json"
    (make.out / "device").write_text("another machine\n")  # as if this one had been flashed since
    before = bench.stat().st_mtime_ns
    assert make(str(bench)).returncode == 0
    assert bench.stat().st_mtime_ns != before


@pytest.mark.slow
def test_another_setting_is_no_reason_to_show_old_results(deployed, make):
    before = (make.out / "device.bench.json").stat().st_mtime_ns
    changed = make("deploy", BENCH_OPTIONS="--duration 0.1 --repetitions 2")
    assert changed.returncode == 0, changed.stderr
    bench = json.loads((make.out / "device.bench.json").read_text())
    assert bench["settings"]["repetitions"] == 2
    assert (make.out / "device.bench.json").stat().st_mtime_ns != before


@pytest.mark.parametrize(("variables", "message"), [
    ({"REMOTE": ""}, "REMOTE must not be empty"), ({"REMOTE": "my folder"}, "REMOTE must not have spaces"),
    ({"OUT": ""}, "OUT must not be empty"), ({"DATA": "a b"}, "DATA must not have spaces"),
    ({"OUT": "here", "MODEL": "here/model.onnx"}, "MODEL must not lie in OUT"),
])
def test_folders_that_would_do_harm_are_refused(make, variables, message):
    done = make("deploy", MAKEFLAGS="n", **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert "rm -rf" not in done.stdout


@pytest.mark.slow
def test_a_gate_that_is_not_met(deployed, make):
    done = make("deploy", GATES="'image_auroc>=1.5'")
    assert done.returncode == 2
    assert "gate failed" in done.stderr


@pytest.mark.slow
def test_a_device_that_is_not_there(make, tmp_path):
    done = make("deploy", SSH="ssh -p 1 -o BatchMode=yes -o ConnectTimeout=2 -o LogLevel=ERROR", OUT=tmp_path / "out")
    assert done.returncode == 2
    assert "cannot log in to 127.0.0.1; check that it is on, on this network, and has your key" in done.stderr
    assert "name the device: make deploy JETSON=user@host" in make("deploy", JETSON="", OUT=tmp_path / "out").stderr


@pytest.mark.slow
def test_a_device_without_internet_installs_from_the_wheelhouse(make, device, tmp_path):
    out, machine = tmp_path / "out", platform.machine()
    done = make("wheelhouse", OUT=out, MACHINE=machine)
    assert done.returncode == 0, done.stderr
    names = {path.name.split("-")[0].lower() for path in (out / "wheelhouse").glob("*-*")}
    assert names >= {"uadtool", "click", "numpy", "pillow", "scipy", "tabulate", "onnxruntime"}
    assert list((out / "wheelhouse").glob(f"numpy-*-cp38-*{machine}.whl"))
    done = make(f"{out}/installed.stamp", OUT=out, MACHINE=machine, REMOTE="offline")
    assert done.returncode == 0, done.stderr
    assert "--no-index --find-links wheelhouse" in done.stdout
    assert next(device[0].glob("offline/.venv/lib/python3.8/site-packages/onnxruntime")).is_dir()


@pytest.mark.parametrize(("python", "glibc"), [("3.8", 31), ("3.10", 35), ("3.12", 39)])
@pytest.mark.slow
def test_the_wheelhouse_of_a_jetson_is_complete(make, tmp_path, python, glibc):
    done = make("wheelhouse", OUT=tmp_path, JETPACK_PYTHON=python)
    assert done.returncode == 0, done.stderr
    wheel, = (tmp_path / "wheelhouse").glob("uadtool-*.whl")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--find-links", wheel.parent,
               "--ignore-requires-python",  # it compares with the Python that runs pip
               "--only-binary=:all:", "--target", tmp_path / "target", "--python-version", python,
               "--platform=manylinux2014_aarch64", *(f"--platform=manylinux_2_{minor}_aarch64"
                                                     for minor in range(17, glibc + 1)),
               f"{wheel}[onnxruntime]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


JETPACK = """#!/bin/sh
# A Python of JetPack: environments that it makes begin with the packages that JetPack has.
"{python}" "$@" || exit
for last; do :; done
"$last/bin/python" -m pip install --quiet {packages}
"""


@pytest.mark.parametrize(("version", "packages"), [
    ("3.8", "pip==20.0.2 setuptools==45.2.0 numpy==1.17.4"), ("3.10", "pip==22.0.2 setuptools==59.6.0 numpy==1.21.5"),
    ("3.12", "pip==24.0 setuptools==68.1.2 numpy==1.26.4")])
@pytest.mark.slow
def test_python_and_packages_of_each_jetpack(make, device, int8, textures, tmp_path, version, packages):
    """Of JetPack 5, 6 and 7, without their TensorRT. The system's packages lie in the environment itself."""
    found = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    python = str(found[-1]) if found else shutil.which(f"python{version}")
    if not python:
        pytest.skip(f"no Python {version} on this machine")
    jetpack = tmp_path / "python3"
    jetpack.write_text(JETPACK.format(python=python, packages=packages))
    jetpack.chmod(0o755)
    out = tmp_path / "out"
    done = make(f"{out}/device.scores.jsonl", OUT=out, REMOTE=f"jetpack-{version}", REMOTE_PYTHON=jetpack)
    assert done.returncode == 0, done.stderr
    first, *_, last = map(json.loads, (out / "device.scores.jsonl").read_text().splitlines())
    assert first["host"]["python"].startswith(f"{version}.")
    assert last["errors"] == 0


@pytest.mark.parametrize(("variables", "message"), [
    ({"UADTOOL": "false"}, "score failed on this workstation; uadtool and ONNX Runtime must be installed"),
    ({"REMOTE_PYTHON": "python3.99", "REMOTE": "none"},
     "making an environment failed on 127.0.0.1; sudo apt-get install python3-venv"),
    ({"BENCH_OPTIONS": "--none"}, "bench failed on this workstation; check BENCH_OPTIONS"),
])
@pytest.mark.slow
def test_a_step_that_fails_is_named_with_its_side(deployed, make, tmp_path, variables, message):
    target = f"{tmp_path}/installed.stamp" if "REMOTE" in variables else "deploy"
    done = make(target, OUT=tmp_path, **variables)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
def test_a_device_without_tensorrt_is_told_what_to_install(deployed, make, fp32, tmp_path):
    done = make(f"{tmp_path}/model.stamp", OUT=tmp_path, MODEL=fp32.path, RUNTIME="tensorrt", REMOTE="uadtool")
    assert done.returncode == 2
    assert "error: TensorRT is not installed" in done.stderr
    assert "building the engine failed on 127.0.0.1; TensorRT comes with JetPack: sudo apt-get install " in done.stderr


@pytest.mark.slow
def test_a_soak_over_ssh(deployed, device):
    def soak(hours):
        return subprocess.run(["bash", EXAMPLE / "soak.sh", "127.0.0.1", "int8.onnx", "data", str(hours)], text=True,
                              capture_output=True, env={**os.environ, "SSH": device[1], "SOAK_OPTIONS": "--every 0.5"})

    done = soak(4 / 3600)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["type"] for record in records] == ["start", *["minute"] * (len(records) - 2), "verdict"]
    assert records[0]["host"]["python"].startswith("3.8.")
    assert done.returncode == (not records[-1]["ok"])
    assert soak(1).stdout == done.stdout  # one that has ended is not started again
    assert subprocess.run(["bash", EXAMPLE / "soak.sh", "127.0.0.1"], capture_output=True).returncode == 2


def test_a_model_that_cannot_run_there_is_refused_at_once(make, int8, tmp_path):
    for variables, message in (({"MODEL": "missing.onnx"}, "MODEL=missing.onnx does not exist; give an absolute path"),
                               ({"DATA": "parts"}, "DATA=parts does not exist; give an absolute path"),
                               ({"RUNTIME": "tensorrt"}, f"{int8.path} was quantized for another runtime")):
        done = make("deploy", OUT=tmp_path / "out", **variables)
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_commands_for_tensorrt(make, fp32, tmp_path):
    """What would run there, for here is no GPU."""
    done = make("deploy", MODEL=fp32.path, RUNTIME="tensorrt", OUT=tmp_path / "out", MAKEFLAGS="n")
    assert done.returncode == 0, done.stderr
    assert 'pip install --quiet  "$(ls wheels/uadtool-*.whl)"' in done.stdout
    assert "export fp32.onnx -o fp32.engine --timing-cache timing --workspace 1024" in done.stdout
    assert "score fp32.engine data" in done.stdout
    assert "bench fp32.engine" in done.stdout
