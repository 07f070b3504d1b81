"""Several processes that train one model together, started by torchrun on one machine or several.

They share the batches of a single process, so their number changes the speed but not the optimisation. With one process
every function does nothing, and torch.distributed is not initialised.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from uadtool.errors import UadtoolError
from uadtool.host import available_cores
from uadtool.terminal import log

T = TypeVar("T")


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun, or another program that sets its environment variables, started.

    Only the first process logs, and only the first that fails reports an error. Each process takes its share of the
    machine's cores and, unless ``device`` is cpu, a GPU of its own.

    Raises:
        UadtoolError: this machine has fewer GPUs than processes, or the variables are incomplete.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # lazy: some builds of torch lack it

    cuda = device != "cpu" and torch.cuda.is_available()
    try:
        store, rank, size = next(iter(rendezvous("env://")))
    except ValueError as error:
        raise UadtoolError(f"WORLD_SIZE is set without the other variables of torchrun ({error}); start with torchrun, "
                           "or unset WORLD_SIZE") from error
    if rank and not log.isEnabledFor(logging.DEBUG):  # -v shows which process fails
        log.setLevel(logging.ERROR)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun sets it to 1, whatever the number of cores
        torch.set_num_threads(own_cores())
    try:
        if cuda:
            _take_gpu()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _another_failed_before(store):
            raise SystemExit(1) from error
        raise
    dist.destroy_process_group()


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if _started() else 1


def rank() -> int:
    """The number of this process. The first process, 0, writes all files."""
    return dist.get_rank() if _started() else 0


def local_processes() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_cores() -> int:
    """The number of this machine's cores that this process takes."""
    return max(1, available_cores() // local_processes())


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that this process handles."""
    return items[rank()::world_size()]


def average(tensors: Sequence[Tensor], weight: float) -> None:
    """Replace each tensor, in place, by its weighted mean over the processes, whose weights add up to 1."""
    if world_size() == 1:
        return
    with torch.no_grad():
        flat = weight * torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _lost_process_reported():
            dist.all_reduce(flat)
        for tensor, values in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors])):
            tensor.copy_(values.view_as(tensor))


def total(*values: float) -> list[float]:
    """The sum of each value over the processes."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with _lost_process_reported():
        dist.all_reduce(sums)
    result: list[float] = sums.tolist()
    return result


def any_process(condition: bool) -> bool:
    """Whether the condition holds in at least one process."""
    return total(float(condition)) != [0.0]


def broadcast(values: Tensor, source: int) -> None:
    """Copy the contiguous values of the process ``source`` to all processes, in place."""
    with _lost_process_reported():
        dist.broadcast(values.view(torch.uint8), source)  # gloo does not support every number format


def copy_first(module: nn.Module) -> None:
    """Copy the first process's weights and buffers to all processes, in place."""
    state = on_first(module.state_dict)
    if rank():
        module.load_state_dict(state)


def on_first(function: Callable[[], T]) -> T:
    """Call the function in the first process only; all processes wait and return its result."""
    if world_size() == 1:
        return function()
    values: list[Any] = [function() if rank() == 0 else None]
    with _lost_process_reported():
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    result: T = values[0]
    return result


def require_same(config: Mapping[str, Any]) -> None:
    """Require that this process has the configuration of the first process.

    Raises:
        UadtoolError: a value differs; the message names it.
    """
    for name, value in on_first(lambda: config).items():
        if config[name] == value:
            continue
        if name == "images":
            raise UadtoolError(f"process {rank()} finds other images than process 0; every machine needs the same "
                               "files under the same path")
        raise UadtoolError(f"process {rank()} has {name} {config[name]!r:.200}, process 0 has {value!r:.200}; start "
                           "all processes with the same options")


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def _take_gpu() -> None:
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise UadtoolError(f"this machine has {count} CUDA devices for {local_processes()} processes; start at most "
                           f"{count} here (torchrun --nproc-per-node {count}), or take --device cpu")
    torch.cuda.set_device(index)


@contextmanager
def _lost_process_reported() -> Iterator[None]:
    """Report in one line that another process ended; torch only reports a broken connection."""
    try:
        yield
    except RuntimeError as error:  # from gloo or nccl
        raise UadtoolError("another process of this training ended; --resume continues from the last checkpoint, if "
                           "one exists") from error


def _another_failed_before(store: Any) -> bool:
    try:
        return bool(store.add("failed", 1) > 1)
    except RuntimeError:  # the process that holds the store failed before
        return True
