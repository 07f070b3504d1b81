"""Model files of the lab: a float or quantized detector as safetensors, with its metadata in the header."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from uadtool.errors import UadtoolError, reading
from uadtool.files import atomic_write
from uadtool.lab.detectors.contract import EXAMPLES, ROI, Detector
from uadtool.lab.detectors.registry import build_detector
from uadtool.lab.quantization.plan import QuantizationPlan
from uadtool.lab.quantization.ptq import empty_quantized
from uadtool.lab.quantization.targets import TARGETS
from uadtool.metadata import KEY, Metadata


def save_model(model: nn.Module, metadata: Metadata, path: Union[str, Path]) -> None:
    """Write a deployed detector or its quantized graph, with its metadata, atomically."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    content = save(tensors, metadata={KEY: metadata.to_json()})
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)  # save_file would replace the temporary file


def load_model(path: Union[str, Path]) -> tuple[nn.Module, Metadata]:
    """Read a model file: a ``Detector`` if its precision is fp32, otherwise a quantized graph.

    Raises:
        UadtoolError: the file cannot be read, is not a model of uadtool, or its tensors do not fit its metadata.
    """
    with _opened(path) as file:
        metadata = _metadata(file, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is not a dict
    for name, value in (("distance_mean", 0.0), ("distance_std", 1.0)):  # absent from files before 2026-12
        tensors.setdefault(name, torch.full((len(metadata.classes),), value))
    return assemble(tensors, metadata, str(path)), metadata


def assemble(tensors: Mapping[str, Tensor], metadata: Metadata, path: str) -> nn.Module:
    """The model of these tensors: a ``Detector`` if its precision is fp32, otherwise a quantized graph.

    Raises:
        UadtoolError: the tensors do not fit the metadata; the message names the ``path``.
    """
    # On "meta", tensors need no memory: the metadata could ask for any amount, but only the file's tensors are loaded.
    with torch.device("meta"):
        detector = build_detector(metadata)
        model = detector if metadata.precision == "fp32" else _quantized_graph(detector, metadata, path)
    try:
        expected = model.state_dict()
        # What earlier files lack: examples, without which they take no classes, and regions of interest.
        absent = {EXAMPLES: torch.zeros(expected[EXAMPLES].shape),
                  ROI: torch.ones(expected[ROI].shape, dtype=torch.bool)}
        dtypes = {name: tensor.dtype for name, tensor in expected.items()}
        model.load_state_dict({name: tensor.to(dtypes.get(name, tensor.dtype))
                               for name, tensor in {**absent, **tensors}.items()}, assign=True)
    except RuntimeError as error:
        mismatch = str(error).splitlines()[-1].strip()
        raise UadtoolError(f"the tensors of {path} do not fit its metadata: {mismatch}") from error
    return model.eval()


def read_metadata(path: Union[str, Path]) -> Metadata:
    """Read only the metadata of a model file.

    Raises:
        UadtoolError: the file cannot be read, or is not a model of uadtool.
    """
    with _opened(path) as file:
        return _metadata(file, path)


def _metadata(file: Any, path: Union[str, Path]) -> Metadata:
    return Metadata.from_json((file.metadata() or {}).get(KEY), str(path))


@contextmanager
def _opened(path: Union[str, Path]) -> Iterator[Any]:
    try:
        with reading(path), safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UadtoolError(f"{path} is not a safetensors file: {error}") from error


def _quantized_graph(detector: Detector, metadata: Metadata, path: str) -> nn.Module:
    if metadata.target not in TARGETS:
        raise UadtoolError(f"{path} is made for {metadata.target}; this version supports {', '.join(TARGETS)}")
    float_layers = metadata.quantization.float_layers if metadata.quantization else []
    return empty_quantized(QuantizationPlan(detector), metadata.precision, TARGETS[metadata.target], float_layers)


def load_float_model(path: Union[str, Path]) -> tuple[Detector, Metadata]:
    """``load_model`` for steps that require float weights.

    Raises:
        UadtoolError: as ``load_model``, or the model is already quantized.
    """
    model, metadata = load_model(path)
    if not isinstance(model, Detector):
        raise UadtoolError(f"{path} is quantized already; give the float model that it was made from")
    return model, metadata
