"""Training that can be interrupted, resumed and repeated."""
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
from uadtool.lab.training.data import TeacherFeatures, at_once
from uadtool.lab.training.precision import autocast, large_depthwise_float
from uadtool.progress import Progress
from uadtool.terminal import log

BATCH_SIZE = 16
WARM_UP = 50
EVALUATIONS = 20
"""Number of evaluations of the held-out loss in a run; they choose the best checkpoint."""

Loss = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Outcome:
    """The lowest held-out loss of a run and its step; the model has the state of this step."""

    best_step: int
    held_out_loss: float


@dataclass(frozen=True)
class Run:
    """The images, length and checkpoint file of a training.

    ``steps`` counts batches of 16. With ``resume`` the run continues from the checkpoint, if it exists and has the same
    ``config``.

    Processes that train together all hold ``training`` and ``held_out``. Each computes the losses of its share, given
    by ``training_batch`` and ``held_out_batches``. A detector that ignores this trains correctly, but no faster.
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
        """Images [N, H, W, 3] and the teacher's feature maps: this process's share of a step's batch."""
        return self.training.batch(self._own_indices(step))

    def training_images(self, step: int) -> Tensor:
        """The images of ``training_batch``, for a loss that has no use for their features."""
        return self.training.images(self._own_indices(step))

    def _own_indices(self, step: int) -> Sequence[int]:
        return distributed.share(batch_indices(len(self.training), step, self.seed))

    def held_out_batches(self) -> Iterator[tuple[int, tuple[Tensor, list[Tensor]]]]:
        """The held-out batches of this process's share, each with its number among all of them."""
        for number, indices in self.held_out_chunks():
            yield number, self.held_out.batch(indices)

    def held_out_chunks(self) -> Sequence[tuple[int, range]]:
        """The indices of the ``held_out_batches``, each with its number, for a loss that needs few of them."""
        return distributed.share(list(enumerate(self.held_out.chunks())))

    def distill(self, student: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss) -> Outcome:
        """``optimize`` with a loss of images and features.

        A batch of images above 256 x 256 pixels is learned in parts, whose gradients add up. Batch norm then takes its
        statistics, and the loss what it takes from a batch, from a part, as from the share of a process.

        Args:
            loss: of images, uint8 [N, H, W, 3], and the teacher's feature maps, all on the device.
        """
        def loss_of(images: Tensor, features: Sequence[Tensor]) -> Tensor:
            with autocast(self.device, self.dtype):
                return loss(images.to(self.device), [feature_map.to(self.device) for feature_map in features])

        def training_loss(step: int) -> Tensor:
            own, size = self._own_indices(step), at_once(BATCH_SIZE, self.training.reading.size)
            *first, last = (own[start:start + size] for start in range(0, len(own), size))

            def weighted_loss(part: Sequence[int]) -> Tensor:
                return len(part) / len(own) * loss_of(*self.training.batch(part))

            learned = 0.0
            for part in first:
                loss = weighted_loss(part)
                loss.backward()  # type: ignore[no-untyped-call]
                learned += loss.item()
            return weighted_loss(last) + learned

        return self.optimize(student, optimizer, training_loss, lambda: (
            (loss_of(*batch), len(batch[0])) for _, batch in self.held_out_batches()))

    def optimize(self, model: nn.Module, optimizer: torch.optim.Optimizer, training_loss: Callable[[int], Tensor],
                 held_out_losses: Callable[[], Iterable[tuple[Tensor, int]]]) -> Outcome:
        """The function ``optimize`` with the settings of this run. Each step seeds torch anew, e.g. for dropout.

        Args:
            training_loss: of ``training_batch(step)``, a mean over its images.
            held_out_losses: the loss of each of the ``held_out_batches``, in evaluation mode, and its number of images.
        """
        batch_size = min(BATCH_SIZE, len(self.training))

        def seeded_loss(step: int) -> Tensor:
            # The same after resuming. torch uses 32 bits of the seed, so up to 16 processes differ.
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
                            self.resume, share=len(distributed.share(range(batch_size))) / batch_size)


def optimize(model: nn.Module, optimizer: torch.optim.Optimizer, training_loss: Callable[[int], Tensor],
             held_out_loss: Callable[[], float], steps: int, checkpoint: Path, config: dict[str, Any], resume: bool,
             keep_start: bool = False, share: float = 1.0) -> Outcome:
    """Train a model, in place; it ends with the state of the lowest held-out loss.

    The learning rate warms up to the optimizer's and then decays to 0 as a cosine. After SIGINT, SIGTERM or SIGHUP the
    current step ends and the checkpoint is written; then the signal takes its usual effect.

    Args:
        model: the module whose state dict the checkpoint holds.
        training_loss: of the batch of a step; it depends only on the step and the model. It may add gradients of a part
            of the batch to those of the model, and return a loss that lacks them.
        steps, checkpoint, config, resume: as in ``Run``.
        keep_start: whether the state at the start also competes for the lowest loss.
        share: share of a batch's images that this process's training loss averages.

    Raises:
        UadtoolError: a loss is not finite, or the checkpoint belongs to another run.
        KeyboardInterrupt: a signal arrived; the checkpoint is written.
    """
    start, best_step, best_loss, best = 0, 0, math.inf, dict[str, Tensor]()
    rates = [group["lr"] for group in optimizer.param_groups]

    if saved := distributed.on_first(
            lambda: read_checkpoint(checkpoint, config) if resume and checkpoint.exists() else None):
        saved_progress, best = restore(saved, model, optimizer)
        start, best_step, best_loss = (saved_progress[name] for name in ("step", "best_step", "best_loss"))
        log.info("resuming at step %d of %d", start, steps)
    elif checkpoint.exists():
        log.warning("starting anew; with --resume the run would continue from %s", checkpoint)

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
        """Give all processes the gradients of the whole batch and the same batch norm statistics.

        DistributedDataParallel does not suit: it only sees gradients of what passes its ``forward``, but the losses
        call parts of the model. Its gain, communication during the backward pass, is small for small networks.
        Statistics are averaged in each step, so that they are the same wherever a run is interrupted.
        """
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]
                     if parameter.grad is not None]
        statistics = [buffer for module in model.modules() if module.training
                      for buffer in module.buffers(recurse=False) if buffer.is_floating_point()]
        distributed.average([*gradients, *statistics], share)

    if keep_start and start == 0:
        evaluate(0)
    interval = max(1, steps // EVALUATIONS)
    with Progress("training", steps, start) as progress, _deferred_signals() as stopped:
        for step in range(start, steps):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * _schedule(step, steps)
            optimizer.zero_grad()
            loss = training_loss(step)
            loss.backward()  # type: ignore[no-untyped-call]
            average()
            optimizer.step()
            note = f"loss {_finite(loss.item(), step + 1):.4f}"
            if (step + 1) % interval == 0 or step + 1 == steps:
                evaluate(step + 1)
                save(step + 1)
            progress.update(note=note)
            if distributed.any_process(stopped()):
                save(step + 1)
                log.warning("interrupted at step %d; --resume continues from %s", step + 1, checkpoint)
                raise KeyboardInterrupt
    model.load_state_dict(best)
    return Outcome(best_step, best_loss)


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise UadtoolError(f"the training diverged: at step {step} the loss is {loss}; try another --seed or teacher")
    return loss


def batch_indices(total: int, step: int, seed: int) -> list[int]:
    """The images of batch number ``step``. Each epoch is shuffled and cut into batches; a rest is left out.

    The order depends only on the seed and the epoch, so a resumed run sees the batches of an uninterrupted run.
    """
    size = min(BATCH_SIZE, total)
    epoch, batch = divmod(step, total // size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(total, generator=generator).tolist()
    return order[batch * size:(batch + 1) * size]


def steps_per_epoch(total: int) -> int:
    """The number of batches in an epoch over ``total`` images."""
    return total // min(BATCH_SIZE, total)


def _schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine to 0."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@contextmanager
def _deferred_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT, SIGTERM and SIGHUP only set a flag, which the yielded function returns. A second SIGINT
    interrupts. After the block the signals take their usual effect.

    An interrupt within an optimizer step would leave a state that does not occur in an uninterrupted run.
    """
    received: list[int] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: False
        return
    old_handlers = {number: signal.signal(number, handler) for number in (signal.SIGINT, *ending_signals())}
    try:
        yield lambda: bool(received)
    finally:
        for number, old_handler in old_handlers.items():
            signal.signal(number, old_handler)
        if received:
            signal.raise_signal(received[0])
