"""PyTorch on the CPU: a model before export. Quantized models simulate their rounding in float."""

import time
from typing import Any, Dict, List, Tuple

import numpy as np
import torch

from uadtool.lab.models import load_model
from uadtool.lab.models import read_metadata as read_metadata  # for ``opening``, which is of the edge half
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import LayerTime, Output, Runtime


class Torch(Runtime):
    """A detector in a .safetensors file."""

    name = "torch"
    version = torch.__version__

    def __init__(self, path: str, metadata: Metadata, threads: int, streams: int = 1) -> None:
        super().__init__(path, metadata, threads, streams)
        torch.set_num_threads(max(1, threads // streams))  # affects the whole process
        self._model = load_model(path)[0]

    def run(self, images: np.ndarray) -> Output:
        with torch.inference_mode():
            output = self._model(torch.from_numpy(images))
        return Output(*(getattr(output, name).numpy() for name in Output._fields))

    def layer_times(self, images: np.ndarray, runs: int) -> List[LayerTime]:
        seconds: Dict[str, float] = {}
        kinds: Dict[str, str] = {}
        hooks: List[Any] = []
        for name, module in self._model.named_modules():
            if next(module.children(), None) is None:
                kinds[name] = type(module).__name__
                hooks += _timing(module, name, seconds)
        self.run(images)
        seconds.clear()  # the first run is slower
        for _ in range(runs):
            self.run(images)
        for hook in hooks:
            hook.remove()
        return [LayerTime(name, kinds[name], 1000 * total / runs) for name, total in seconds.items()]

    def close(self) -> None:
        vars(self).pop("_model", None)


def _timing(module: Any, name: str, seconds: Dict[str, float]) -> Tuple[Any, Any]:
    """Hooks that add the time of each forward pass of a module to ``seconds[name]``."""
    began = 0.0

    def before(*_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(*_: Any) -> None:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

    return module.register_forward_pre_hook(before), module.register_forward_hook(after)
