"""Several processes that train one model together, started by torchrun on one machine or several.

They share the batches that a single process would take, so their number changes the speed and not the optimisation.
With one process every function does nothing, and torch.distributed is not initialised.
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

T = TypeVar("T")


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Within the block the processes that torchrun (or whoever set its environment variables) started work together.

    The first one says what there is to say, and the first that fails why it did. Each takes its share of the machine's
    cores and, unless ``device`` is cpu, a GPU of its own.

    Raises:
        UadtoolError: there are fewer GPUs than processes on this machine, or the variables are not complete.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # a build of torch without torch.distributed lacks it

    cuda = device != "cpu" and torch.cuda.is_available()
    try:
        store, rank, size = next(iter(rendezvous("env://")))
    except ValueError as error:
        raise UadtoolError(f"WORLD_SIZE is set, but not what torchrun sets with it ({error}); start with torchrun, or "
                           "unset WORLD_SIZE") from error
    log = logging.getLogger("uadtool")
    if rank and not log.isEnabledFor(logging.DEBUG):  # -v shows where which of them fails
        log.setLevel(logging.ERROR)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun sets it, whatever the number of cores
        torch.set_num_threads(own_cores())
    try:
        if cuda:
            _take_gpu()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=size)
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _others_failed_before(store):
            raise SystemExit(1) from error
        raise
    dist.destroy_process_group()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _started() else 1


def rank() -> int:
    """The number of this process. The first one, 0, writes what is written."""
    return dist.get_rank() if _started() else 0


def processes_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_cores() -> int:
    """How many cores of this machine this process takes."""
    return max(1, available_cores() // processes_here())


def share(items: Sequence[T]) -> Sequence[T]:
    """What of the items this process takes on."""
    return items[rank()::world_size()]


def average(tensors: Sequence[Tensor], weight: float) -> None:
    """Let each of the tensors, in place, be its weighted mean over the processes, whose weights add up to 1."""
    if world_size() == 1:
        return
    with torch.no_grad():
        values = weight * torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _all_there():
            dist.all_reduce(values)
        for tensor, part in zip(tensors, torch.split(values, [tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def total(*values: float) -> list[float]:
    """The sum of each of the values over the processes."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with _all_there():
        dist.all_reduce(sums)
    result: list[float] = sums.tolist()
    return result


def any_of_them(condition: bool) -> bool:
    """Whether the condition holds in one process at least."""
    return total(float(condition)) != [0.0]


def broadcast(values: Tensor, source: int) -> None:
    """Let all processes have the contiguous values that the process ``source`` has, in place."""
    with _all_there():
        dist.broadcast(values.view(torch.uint8), source)  # gloo does not know every number format


def copy_first(module: nn.Module) -> None:
    """Let all processes have the weights and buffers of the first one's module, in place."""
    state = on_first(module.state_dict)
    if rank():
        module.load_state_dict(state)


def on_first(function: Callable[[], T]) -> T:
    """What the function returns in the first process, which alone calls it. The others wait."""
    if world_size() == 1:
        return function()
    values: list[Any] = [function() if rank() == 0 else None]
    with _all_there():
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    result: T = values[0]
    return result


def require_same(config: Mapping[str, Any]) -> None:
    """Require that all processes have the configuration of the first one.

    Raises:
        UadtoolError: this one has another; it says in what.
    """
    for name, value in on_first(lambda: config).items():
        if config[name] == value:
            continue
        if name == "images":
            raise UadtoolError(f"process {rank()} finds other images than process 0; every machine needs the same "
                               "files under the same path")
        raise UadtoolError(f"process {rank()} has {name} {config[name]!r:.200}, process 0 has {value!r:.200}; start "
                           "all of them with the same options")


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def _take_gpu() -> None:
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise UadtoolError(f"this machine has {count} CUDA devices for {processes_here()} processes; start at most "
                           f"{count} here (torchrun --nproc-per-node {count}), or take --device cpu")
    torch.cuda.set_device(index)


@contextmanager
def _all_there() -> Iterator[None]:
    """Say in one line that a process is gone, which the others learn from a broken connection."""
    try:
        yield
    except RuntimeError as error:  # of gloo and of nccl
        raise UadtoolError("another process of this training ended; --resume goes on from the last checkpoint, if "
                           "there is one") from error


def _others_failed_before(store: Any) -> bool:
    try:
        return bool(store.add("failed", 1) > 1)
    except RuntimeError:  # the process that holds the store is gone: so it failed before
        return True
