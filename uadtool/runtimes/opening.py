"""Running an exported detector: one interface, one module per runtime."""

import importlib
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import List, Optional

from uadtool.errors import UadtoolError, require_lab
from uadtool.files import file_identity
from uadtool.host import available_cores
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import Runtime
from uadtool.runtimes.onnx_file import read_metadata
from uadtool.tensorrt.engine_file import read_engine_metadata, require_fit

RUNTIMES = {"onnxruntime": "OnnxRuntime", "openvino": "OpenVino", "tensorrt": "TensorRt", "torch": "Torch"}
"""Class of each, in the module here that has the name of the package it needs."""

OPENVINO_TARGETS = ("openvino", "tensorrt")
"""Targets of quantized graphs that OpenVINO runs in integers and ONNX Runtime mostly in float."""

ATTEMPTS = 10
"""To open a file that others replace."""

log = logging.getLogger("uadtool")


def open_model(path: str, threads: Optional[int] = None, runtime: str = "auto", streams: int = 1) -> Runtime:
    """Open the model file ``path`` on ``threads`` cores (all available ones if None).

    A file that is replaced or written to meanwhile is opened anew.

    Args:
        streams: runs that share the cores; one is fastest for an image, as many as cores for many images.
        runtime: one of ``RUNTIMES``; "auto" takes the fastest for this kind of file of those that are installed, and
            says which where it had a choice.

    Raises:
        UadtoolError: there is no such file, it is damaged or not an exported detector, or is an engine that was not
            built for what is here.
        MissingPackage: the runtime, or any, is not installed.
    """
    path = os.fspath(path)
    if not Path(path).is_file():
        raise UadtoolError(f"{path}: no such model file")
    for _ in range(ATTEMPTS):
        identity = file_identity(path)
        try:
            model = _open(path, threads, runtime, streams)
        except UadtoolError:
            if identity == file_identity(path):
                raise
        else:
            model.identity = identity
            if identity == file_identity(path):
                return model
    raise UadtoolError(f"{path} was replaced whenever it was opened; run this again once it stays")


def _open(path: str, threads: Optional[int], runtime: str, streams: int) -> Runtime:
    metadata = _metadata(path, runtime)
    others: List[str] = []
    if runtime == "auto":
        runtime, *others = ["tensorrt"] if Path(path).suffix == ".engine" else _installed(metadata.target)
    module = importlib.import_module(f"uadtool.runtimes.{runtime}")
    try:
        model: Runtime = getattr(module, RUNTIMES[runtime])(path, metadata, threads or available_cores(), streams)
    except UadtoolError:
        raise
    except Exception as error:  # those of the runtimes have no common base
        raise UadtoolError(f"{path} cannot be loaded by {runtime}: {' '.join(str(error).split())}") from error
    if others:
        log.info("%s runs on %s (by its kind; --runtime %s runs it, too)", path, runtime, others[0])
    return model


def _metadata(path: str, runtime: str) -> Metadata:
    """Those of a model file that the runtime runs."""
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        if runtime != "torch":
            raise UadtoolError(f"{path} cannot be run as it is; export it first: uadtool export {path} -o model.onnx "
                               "(or take --runtime torch)")
        require_lab()
        from uadtool.runtimes.torch import read_metadata as of_safetensors

        return of_safetensors(path)
    if suffix not in (".onnx", ".engine"):
        raise UadtoolError(f"{path} is not a model that can be run: its name must end in .onnx, .engine or "
                           ".safetensors")
    if runtime == "torch":
        raise UadtoolError(f"torch runs .safetensors files, and not {path}")
    if suffix == ".engine":
        if runtime not in ("auto", "tensorrt"):
            raise UadtoolError(f"{path} is an engine, which {runtime} cannot run; give it the .onnx file")
        metadata, build = read_engine_metadata(path)
        require_fit(path, build)
        return metadata
    if runtime == "tensorrt":
        raise UadtoolError(f"TensorRT runs engines; first, on this device: uadtool export {path} -o "
                           f"{Path(path).with_suffix('.engine')}")
    return read_metadata(path)


def _installed(target: Optional[str]) -> List[str]:
    """The runtimes here that run an ONNX file of this target, the fastest first; ONNX Runtime if there is none.

    The order is a rule, from the latencies in the README; where neither is ahead throughout, ONNX Runtime is first. To
    measure here would take longer than to score an image, and two runs that chose differently could not be merged.
    """
    names = ["onnxruntime", "openvino"]
    if target in OPENVINO_TARGETS:
        names.reverse()
    return list(filter(find_spec, names)) or ["onnxruntime"]
