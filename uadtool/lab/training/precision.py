"""The device, the cores and the number format that torch computes in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from uadtool.errors import UadtoolError
from uadtool.host import available_cores


def choose_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is cuda if available, otherwise cpu.

    Raises:
        UadtoolError: ``name`` is cuda and no CUDA device is available.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UadtoolError("no CUDA device is available; take --device cpu (or auto)")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def use_available_cores() -> None:
    """Let torch take at most the cores that this process may use: torch does not know the quota of a container."""
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def autocast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the processor computes it natively (at least twice as fast), otherwise float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        info = Path("/proc/cpuinfo")
        flags = info.read_text().split() if info.exists() else []
        native = "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if native else torch.float32


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute convolutions in ``dtype`` within the block."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


@contextmanager
def large_depthwise_float(network: nn.Module) -> Iterator[None]:
    """Within the block, depthwise convolutions that are strided or larger than 3 x 3 compute in float32.

    On a CPU their gradients are 3 to 9 times slower in bfloat16 (oneDNN has no kernel for it). That would cost a third
    of the training time of EfficientNet-Lite0.
    """
    slow = [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.groups > 1
            and (module.kernel_size[0] > 3 or module.stride[0] > 1)]
    for module in slow:
        module.forward = _without_autocast(module.forward)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for module in slow:
            del module.forward


def _without_autocast(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return forward(values.float()).to(values.dtype)

    return call
