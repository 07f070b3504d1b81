"""Compare images per second and the time to a first score with anomalib: medians of rounds in which all take turns.

usage: python against_anomalib.py FOLDER MODEL.onnx...

FOLDER is one class in MVTec layout. anomalib is installed into ./anomalib-venv (six gigabytes, once), where it trains
its STFPM (ResNet-18, 256 px, one step from random weights, which do not affect speed) and exports it for its OpenVINO
inferencer. All read the same image files on all cores, and no masks.
"""

import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from throughput import score_rate

VENV = Path("anomalib-venv").absolute()
PYTHON = VENV / "bin" / "python"
MODEL, CHECKPOINT = Path("anomalib/weights/openvino/model.xml"), Path("anomalib/model.ckpt")
ROUNDS = 3

OFFLINE = """
import sys, timm
create = timm.create_model
timm.create_model = lambda *positional, **named: create(*positional, **{**named, "pretrained": False})
"""
PREPARE = OFFLINE + """
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import Stfpm
data = Folder(name="data", normal_dir=sys.argv[1], num_workers=0, train_batch_size=8)
model = Stfpm()
engine = Engine(max_epochs=1, limit_train_batches=1, limit_val_batches=1, accelerator="cpu", logger=False,
                default_root_dir="anomalib")
engine.fit(model, datamodule=data)
engine.trainer.save_checkpoint(sys.argv[2])
engine.export(model, ExportType.OPENVINO, export_root="anomalib", input_size=(256, 256))
"""
# The inferencer takes only images of the model's size.
INFER = """
import sys, time
from anomalib.deploy import OpenVINOInferencer
from PIL import Image
inferencer, paths = OpenVINOInferencer(sys.argv[1], device="CPU"), sys.argv[2:]
def infer(path):
    inferencer.predict(Image.open(path).convert("RGB").resize((256, 256)))
infer(paths[0])
began = time.perf_counter()
for path in paths:
    infer(path)
print(len(paths) / (time.perf_counter() - began))
"""
PREDICT = OFFLINE + """
from anomalib.cli.cli import main
main()
"""


def anomalib(code: str, *arguments: object) -> str:
    command = [PYTHON, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def seconds(run: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


def main(folder: str, *models: str) -> None:
    if not (VENV / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "anomalib[openvino]>=2.7"], check=True)
        (VENV / "installed").touch()
    if not MODEL.exists():
        anomalib(PREPARE, Path(folder) / "train" / "good", CHECKPOINT)
    images = sorted(path for path in Path(folder, "test").glob("*/*") if path.is_file())
    rates, starts = defaultdict(list), defaultdict(list)
    for _ in range(ROUNDS):
        rates["anomalib's OpenVINOInferencer"].append(float(anomalib(INFER, MODEL, *images).split()[-1]))
        starts["anomalib predict"].append(seconds(
            anomalib, PREDICT, "predict", "--model", "Stfpm", "--data", images[0], "--ckpt_path", CHECKPOINT))
        for model in models:
            rates[f"uadtool score {model}"].append(score_rate(model, f"{folder}/test"))
            command = [sys.executable, "-m", "uadtool", "score", "-q", model, images[0]]
            starts[f"uadtool score {model}"].append(seconds(subprocess.check_output, command))
    for unit, found in (("images/s", rates), ("s to the first score", starts)):
        first = statistics.median(next(iter(found.values())))
        for name, values in found.items():
            median = statistics.median(values)
            factor = median / first if found is rates else first / median
            print(f"{median:8.2f} {unit} ({min(values):.2f} to {max(values):.2f}), {factor:.1f} times: {name}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
