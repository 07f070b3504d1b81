"""Opens a model file with a runtime that suits it."""

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import List, Optional

from uadtool.errors import UadtoolError, require_lab
from uadtool.files import file_identity
from uadtool.host import adds_int8_exactly, available_cores
from uadtool.metadata import Metadata
from uadtool.runtimes.contract import Runtime
from uadtool.runtimes.onnx_file import read_metadata
from uadtool.tensorrt.engine_file import read_engine_metadata, require_fit
from uadtool.terminal import log

RUNTIMES = {"onnxruntime": "OnnxRuntime", "openvino": "OpenVino", "tensorrt": "TensorRt", "torch": "Torch"}
"""Name of a runtime -> its class, in the module of that name beside this one."""

OPENVINO_TARGETS = ("openvino", "tensorrt")
"""Targets of quantized graphs that OpenVINO runs in integers and ONNX Runtime mostly in float."""

ATTEMPTS = 10
"""Attempts to open a file that other processes replace."""


def open_model(path: str, threads: Optional[int] = None, runtime: str = "auto", streams: int = 1) -> Runtime:
    """Open the model file ``path``. If the file changes meanwhile, open it anew.

    Args:
        threads: cores to use; None: all available cores.
        runtime: one of ``RUNTIMES``, or "auto" for the fastest installed runtime for this kind of file. With a choice,
            "auto" logs which runtime it took.
        streams: parallel runs that share the cores. One stream is fastest for a single image, one per core for many.

    Raises:
        UadtoolError: the file does not exist, is damaged, is not an exported detector, or is an engine that was not
            built for this machine.
        MissingPackage: the runtime is not installed.
    """
    path = os.fspath(path)
    if Path(path).is_dir():
        raise UadtoolError(f"{path} is a folder, not a model; the model comes first")
    if not Path(path).is_file():
        raise UadtoolError(f"{path}: no such model file")
    for _ in range(ATTEMPTS):
        identity = file_identity(path)
        try:
            model = _open(path, threads or available_cores(), runtime, streams)
        except UadtoolError:
            if identity == file_identity(path):
                raise
        else:
            model.identity = identity
            if identity == file_identity(path):
                return model
    raise UadtoolError(f"{path} was replaced whenever it was opened; run this again once it stays")


def _open(path: str, threads: int, runtime: str, streams: int) -> Runtime:
    _require_suitable(path, runtime)
    metadata = _read_metadata(path)
    names = [runtime] if runtime != "auto" else _suitable_runtimes(path, metadata)
    module = importlib.import_module(f"uadtool.runtimes.{names[0]}")  # each imports a package that may be missing
    try:
        model: Runtime = getattr(module, RUNTIMES[names[0]])(path, metadata, threads, streams)
    except UadtoolError:
        raise
    except Exception as error:  # the runtimes' errors have no common base
        raise UadtoolError(f"{path} cannot be loaded by {names[0]}: {' '.join(str(error).split())}") from error
    if len(names) > 1:
        log.info("%s runs on %s (chosen by its kind; --runtime %s also runs it)", path, *names)
    return model


def _require_suitable(path: str, runtime: str) -> None:
    """Require that the runtime runs files of this kind."""
    suffix = Path(path).suffix
    if suffix not in (".onnx", ".engine", ".safetensors"):
        raise UadtoolError(f"{path} is not a model that can be run: its name must end in .onnx, .engine or "
                           ".safetensors; the model comes first")
    if suffix == ".safetensors" and runtime != "torch":
        raise UadtoolError(f"{path} cannot be run as it is; export it first: uadtool export {path} -o model.onnx "
                           "(or choose --runtime torch)")
    if suffix != ".safetensors" and runtime == "torch":
        raise UadtoolError(f"torch runs .safetensors files, not {path}")
    if suffix == ".engine" and runtime not in ("auto", "tensorrt"):
        raise UadtoolError(f"{path} is an engine, which {runtime} cannot run; give it the .onnx file")
    if suffix == ".onnx" and runtime == "tensorrt":
        raise UadtoolError(f"TensorRT runs engines; first, on this device: uadtool export {path} -o "
                           f"{Path(path).with_suffix('.engine')}")


def _read_metadata(path: str) -> Metadata:
    suffix = Path(path).suffix
    if suffix == ".onnx":
        return read_metadata(path)
    if suffix == ".engine":
        metadata, build = read_engine_metadata(path)
        require_fit(path, build)
        return metadata
    require_lab()
    from uadtool.runtimes.torch import read_metadata as read_safetensors  # needs torch

    return read_safetensors(path)


def _suitable_runtimes(path: str, metadata: Metadata) -> List[str]:
    """The installed runtimes for a file, fastest first; the default runtime if none is installed.

    The order is a rule based on measured latencies (examples/results); where neither is faster throughout, ONNX Runtime
    is first. Measuring here would take longer than scoring an image, and runs with different choices could not be
    merged.
    """
    if Path(path).suffix == ".engine":
        return ["tensorrt"]
    names = ["onnxruntime", "openvino"]
    if metadata.target in OPENVINO_TARGETS and adds_int8_exactly():  # else OpenVINO's scores are far off
        names.reverse()
    return list(filter(find_spec, names)) or ["onnxruntime"]
