"""A small training that test_distributed.py runs in one process and in several, to compare its parts.

    torchrun train_together.py DATA OUTPUT

Every process writes OUTPUT.RANK: the teacher's features, the weights and losses of a student without batch norm, the
statistics of a student with batch norm, and the random numbers that the process drew.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from uadtool.data.dataset import training_samples
from uadtool.lab.training import data, distributed
from uadtool.lab.training.loop import Run
from uadtool.metadata import Reading


def main(folder: str, output: str) -> None:
    data.CHUNK = 5  # so that nearly every process has something to do
    samples = training_samples(folder)
    torch.manual_seed(0)
    teacher = nn.Conv2d(3, 4, 3, stride=4).requires_grad_(False)
    plain = nn.Conv2d(3, 4, 3, stride=4)
    normed = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4))

    def pixels(images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 3, 1, 2) / 255

    # 14 images to train on, which 4 processes cannot share evenly, and 8 held out
    training, held_out = (data.TeacherFeatures(part, Reading((64, 64)), lambda images: [teacher(pixels(images))], 1)
                          for part in (samples[:14], samples[-8:]))
    for part in (training, held_out):
        part.hold(features=True)
    drawn = []

    def fit(student: nn.Module) -> dict:
        run = Run(training, held_out, 4, 7, torch.device("cpu"), torch.float32, Path(f"{output}.checkpoint"), {}, False)

        def loss(images: torch.Tensor, features: list) -> torch.Tensor:
            drawn.append(torch.rand(()).item())
            return F.mse_loss(student(pixels(images)), features[0])

        outcome = run.distill(student, torch.optim.SGD(student.parameters(), 0.5, 0.9), loss)
        return {"outcome": outcome, "state": student.state_dict(), "gradients": [p.grad for p in student.parameters()]}

    torch.save({"features": [part.batch(range(len(part))) for part in (training, held_out)], "plain": fit(plain),
                "normed": fit(normed), "drawn": drawn}, f"{output}.{distributed.rank()}")


if __name__ == "__main__":
    with distributed.process_group("cpu"):
        main(*sys.argv[1:])
