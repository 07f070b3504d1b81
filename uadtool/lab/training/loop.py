"""Training that can be interrupted, resumed and repeated."""

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from uadtool.errors import UadtoolError
from uadtool.host import ending_signals
from uadtool.lab.training import distributed
from uadtool.lab.training.checkpoint import read_checkpoint, restore, save_checkpoint
from uadtool.lab.training.data import TeacherFeatures, chunks
from uadtool.lab.training.precision import autocast, large_depthwise_float
from uadtool.progress import Progress

BATCH_SIZE = 16
WARM_UP = 50
EVALUATIONS = 20
"""How often in a run the held-out loss is taken, to choose the best checkpoint."""

Loss = Callable[[Tensor, Sequence[Tensor]], Tensor]

log = logging.getLogger("uadtool")


@dataclass(frozen=True)
class Outcome:
    """How a training run ended; ``held_out_loss`` is the lowest, at ``best_step``, whose state the model has."""

    best_step: int
    held_out_loss: float


@dataclass(frozen=True)
class Run:
    """What a detector trains on, how long, and where the state of the run lies while it lasts.

    ``steps`` counts batches of 16. ``config`` is what a checkpoint must agree in with this run, and with ``resume`` the
    run goes on from it, if there is one.

    Processes that train together have all of ``training`` and ``held_out``. Each computes the losses of its share, the
    ``training_batch`` and the ``held_out_batches``; a detector that takes losses of more is trained as well, but no
    faster.
    """

    training: TeacherFeatures
    held_out: TeacherFeatures
    steps: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    checkpoint: Path
    config: dict[str, Any]
    resume: bool

    def training_batch(self, step: int) -> tuple[Tensor, list[Tensor]]:
        """Images [N, H, W, 3] and the teacher's feature maps of them: this process's share of a step's batch."""
        return self.training.batch(distributed.share(batch_indices(len(self.training), step, self.seed)))

    def held_out_batches(self) -> Iterator[tuple[int, tuple[Tensor, list[Tensor]]]]:
        """The held-out batches that are this process's share, each with its number among all of them."""
        for number, indices in distributed.share(list(enumerate(chunks(len(self.held_out))))):
            yield number, self.held_out.batch(indices)

    def distill(self, student: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss) -> Outcome:
        """Train the student, in place; it ends with the weights of the lowest held-out loss.

        Each epoch shuffles all images of all classes with a seed of its own, so a run that resumes sees the batches
        that an uninterrupted one would have seen. ``optimize`` tells the rest.

        Args:
            loss: of images, uint8 [N, H, W, 3], and the teacher's feature maps of them, all on the device.
        """
        def loss_of(images: Tensor, features: Sequence[Tensor]) -> Tensor:
            with autocast(self.device, self.dtype):
                return loss(images.to(self.device), [f.to(self.device) for f in features])

        def training_loss(step: int) -> Tensor:
            return loss_of(*self.training_batch(step))

        return self.optimize(student, optimizer, training_loss, lambda: (
            (loss_of(*batch), len(batch[0])) for _, batch in self.held_out_batches()))

    def optimize(self, model: nn.Module, optimizer: torch.optim.Optimizer, training_loss: Callable[[int], Tensor],
                 held_out_losses: Callable[[], Iterable[tuple[Tensor, int]]]) -> Outcome:
        """The function ``optimize`` with the settings of this run. Each step has a seed of its own, of dropout, say.

        Args:
            training_loss: of ``training_batch(step)``, a mean over its images.
            held_out_losses: loss of each of the ``held_out_batches``, computed in evaluation mode, and how many images
                it has.
        """
        size = min(BATCH_SIZE, len(self.training))

        def seeded_loss(step: int) -> Tensor:
            # A run that resumes repeats it. Of the seed 32 bits count, so up to 16 processes differ.
            torch.manual_seed(self.seed * 1_000_003 + step + (distributed.rank() << 28))
            return training_loss(step)

        def held_out_loss() -> float:
            model.eval()
            with torch.inference_mode():
                losses = [(loss.item() * count, count) for loss, count in held_out_losses()]
            model.train()
            total, images = distributed.total(sum(loss for loss, _ in losses), sum(count for _, count in losses))
            return total / images

        model.train()
        with large_depthwise_float(model) if self.device.type == "cpu" else nullcontext():
            return optimize(model, optimizer, seeded_loss, held_out_loss, self.steps, self.checkpoint, self.config,
                            self.resume, share=len(distributed.share(range(size))) / size)


def optimize(model: nn.Module, optimizer: torch.optim.Optimizer, training_loss: Callable[[int], Tensor],
             held_out_loss: Callable[[], float], steps: int, checkpoint: Path, config: dict[str, Any], resume: bool,
             keep_start: bool = False, share: float = 1.0) -> Outcome:
    """Train a model, in place; it ends with the state of the lowest held-out loss.

    The learning rate warms up to the optimizer's and sinks to 0 as a cosine. After SIGINT, SIGTERM or SIGHUP the step
    in progress ends and the checkpoint is written; then the signal does what it would have done.

    Args:
        model: its state dict is what a checkpoint holds.
        training_loss: of the batch of a step; it depends on nothing but the step and the model.
        steps, checkpoint, config, resume: as in ``Run``.
        keep_start: the state at the start may be the best one, too.
        share: of the images of a batch, those that this process's training loss is the mean of.

    Raises:
        UadtoolError: a loss is not finite, or the checkpoint is of another run.
        KeyboardInterrupt: a signal came; the checkpoint is written.
    """
    start, best_step, best_loss, best = 0, 0, math.inf, dict[str, Tensor]()
    rates = [group["lr"] for group in optimizer.param_groups]

    def read() -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        return read_checkpoint(checkpoint, config) if resume and checkpoint.exists() else None

    if found := distributed.on_first(read):
        progress_so_far, best = restore(found, model, optimizer)
        start, best_step, best_loss = (progress_so_far[k] for k in ("step", "best_step", "best_loss"))
        log.info("resuming at step %d of %d", start, steps)
    elif checkpoint.exists():
        log.warning("starting anew; with --resume the run would go on from %s", checkpoint)

    def evaluate(step: int) -> None:
        nonlocal best_step, best_loss, best
        current = _finite(held_out_loss(), step)
        if current < best_loss:
            best_loss, best_step = current, step
            best = {name: value.clone() for name, value in model.state_dict().items()}

    def save(step: int) -> None:
        state = {"step": step, "best_step": best_step, "best_loss": best_loss}
        distributed.on_first(lambda: save_checkpoint(checkpoint, config, state, model, best, optimizer))

    def average() -> None:
        """Let all processes have the gradients of the whole batch, and the same statistics of batch norm.

        Not by DistributedDataParallel: it sees the gradients of what passes its ``forward``, but losses are functions
        of their own, which call parts of the model. Its gain, to communicate while the backward pass still runs, is
        small for so small networks. Averaged after each step, statistics are the same wherever a run is interrupted.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        statistics = [buffer for module in model.modules() if module.training
                      for buffer in module.buffers(recurse=False) if buffer.is_floating_point()]
        distributed.average([*gradients, *statistics], share)

    if keep_start and start == 0:
        evaluate(0)
    every = max(1, steps // EVALUATIONS)
    with Progress("training", steps, start) as progress, _deferred_signals() as stopped:
        for step in range(start, steps):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * _schedule(step, steps)
            loss = training_loss(step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            average()
            optimizer.step()
            progress.update(note=f"loss {_finite(loss.item(), step + 1):.4f}")
            if (step + 1) % every == 0 or step + 1 == steps:
                evaluate(step + 1)
                save(step + 1)
            if distributed.any_of_them(stopped()):
                save(step + 1)
                log.warning("interrupted at step %d; --resume goes on from %s", step + 1, checkpoint)
                raise KeyboardInterrupt
    model.load_state_dict(best)
    return Outcome(best_step, best_loss)


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise UadtoolError(f"the training diverged: at step {step} the loss is {loss}; try another --seed, or another "
                           "teacher")
    return loss


def batch_indices(total: int, step: int, seed: int) -> list[int]:
    """The images of batch number ``step``: a shuffled epoch is cut into batches, a rest is left out."""
    size = min(BATCH_SIZE, total)
    epoch, place = divmod(step, total // size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(total, generator=generator).tolist()
    return order[place * size:(place + 1) * size]


def steps_per_epoch(total: int) -> int:
    """How many batches an epoch over ``total`` images has."""
    return total // min(BATCH_SIZE, total)


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then a cosine to 0."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@contextmanager
def _deferred_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT, SIGTERM and SIGHUP only set a flag, which the yielded function tells; a second SIGINT
    interrupts. After the block they do what they would have done.

    An interrupt in the middle of an optimizer step would leave a state that no uninterrupted run passes through.
    """
    came: list[int] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield lambda: False
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, *ending_signals())}
    try:
        yield lambda: bool(came)
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        if came:
            signal.raise_signal(came[0])
