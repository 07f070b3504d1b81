"""Scoring on the machines of a Ray cluster. https://docs.ray.io/en/latest/ray-core/tasks.html

The process that was started stays the only one that writes: it hands out chunks of images and gets back what the model
says, in order, however often Ray has to compute a chunk because a machine was lost. So each image has one line.
"""

import contextlib
import functools
import io
import logging
import signal
import socket
import tempfile
from collections import deque
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, Tuple, Union

from uadtool import __version__
from uadtool.data.dataset import Sample
from uadtool.data.storage import is_url
from uadtool.errors import UadtoolError, require
from uadtool.host import ending_signals
from uadtool.runtimes.contract import Runtime
from uadtool.runtimes.opening import open_model
from uadtool.scoring.predict import Prediction, predict_samples

log = logging.getLogger("uadtool")

CHUNK = 16
"""Images of a task: enough to make what a task costs, some milliseconds, small."""

AHEAD = 4
"""Tasks for each core that are begun or waiting before the first of them is done."""

SECONDS = 5
"""To wait for an answer of a cluster."""

Results = List[Union[Prediction, UadtoolError]]


class _Model(NamedTuple):
    """What a node needs to open the model that is open here: it must be the same, by the same versions."""

    name: str
    runtime: str
    versions: Tuple[str, str]


@contextlib.contextmanager
def connected(address: str, runtime: Runtime) -> Iterator["Cluster"]:
    """The Ray cluster at ``address`` (HOST:PORT; auto: the one of this machine; local: a new one), with the model.

    Within the block ``sys.stdout`` is another one.

    Raises:
        UadtoolError: no cluster answers there, it is of another version of Ray or Python, or the model is an engine.
        MissingPackage: Ray is not installed.
    """
    if Path(runtime.path).suffix == ".engine":
        raise UadtoolError(f"{runtime.path} was built for the GPU of this machine; give the cluster the .onnx file")
    ray = require("ray", "ray")
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon:
        try:
            socket.create_connection((host, int(port)), SECONDS).close()  # Ray itself would try for a minute
        except (OSError, OverflowError, ValueError) as error:
            raise UadtoolError(f"no Ray cluster answers at {address}: {error}") from error
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ending_signals())}
    with contextlib.redirect_stdout(_ToLog()):  # Ray prints what happens to nodes
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            raise UadtoolError(f"cannot use the Ray cluster at {address}: {_first_line(error)}") from error
        finally:
            signal.signal(signal.SIGTERM, before[signal.SIGTERM])  # Ray's would end with another exit code
        came: List[int] = []
        try:
            for number, handler in before.items():
                if callable(handler):
                    signal.signal(number, _noting(handler, came))
            yield Cluster(ray, runtime, came)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            ray.shutdown()


def _noting(handler: Callable[[int, Any], Any], came: List[int]) -> Callable[[int, Any], None]:
    """The signal handler, which also notes what came: what it raises is lost where Ray calls back into Python."""
    def noting(number: int, frame: Any) -> None:
        came.append(number)
        handler(number, frame)

    return noting


class _ToLog(io.TextIOBase):
    """Debug messages of what is written."""

    def write(self, text: str) -> int:
        if text.strip():
            log.debug("%s", text.strip())
        return len(text)


class Cluster:
    """A cluster that has been given the file of an open model; ``came`` are the signals that came since."""

    def __init__(self, ray: Any, runtime: Runtime, came: List[int]) -> None:
        self._ray, self._came = ray, came
        self._model = _Model(Path(runtime.path).name, runtime.name, (__version__, runtime.version))
        self._content = ray.put(Path(runtime.path).read_bytes())

    def size(self) -> Dict[str, int]:
        """``nodes`` and ``cores`` of the cluster now."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        return {"nodes": len(nodes), "cores": max(1, int(self._ray.cluster_resources().get("CPU", 0)))}

    def predict(
        self, runtime: Runtime, samples: Iterable[Sample], batch_size: int = 1
    ) -> Iterator[Tuple[Sample, Union[Prediction, UadtoolError]]]:
        """As ``predict_samples``, of the model that the cluster was given."""
        task = self._ray.remote(num_cpus=1)(_predict)
        source = iter(samples)
        pending: Deque[Tuple[List[Sample], Any]] = deque()
        before = self.size()
        while True:
            size = self.size()
            if size["nodes"] < before["nodes"]:
                log.warning("the cluster lost a node; what it had begun is done again by the %d that are left",
                            size["nodes"])
            before = size
            while len(pending) < AHEAD * size["cores"]:
                chunk = list(islice(source, CHUNK))
                if not chunk:
                    break
                # In a list, for a reference that stands alone would be replaced by its content for every task.
                arguments = self._model, [self._content], list(map(_anywhere, chunk)), batch_size
                pending.append((chunk, task.remote(*arguments)))
            if not pending:
                return
            chunk, reference = pending.popleft()
            try:
                found: Union[Results, UadtoolError] = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error  # what a task raised, without the text of its process
                raise UadtoolError(f"the cluster failed: {_first_line(cause)}") from error
            if isinstance(found, UadtoolError):
                raise found
            yield from zip(chunk, found)
            if self._came:
                signal.raise_signal(self._came[0])


def _anywhere(sample: Sample) -> Sample:
    """With paths that do not depend on the folder in which a process runs."""
    def absolute(name: str) -> str:
        return name if is_url(name) else str(Path(name).absolute())

    return replace(sample, path=absolute(sample.path), mask=absolute(sample.mask) if sample.mask else None)


def _predict(model: _Model, content: List[Any], samples: List[Sample], batch_size: int) -> Union[Results, UadtoolError]:
    """What a node does. An error is returned, for Ray would wrap what is raised in pages of text."""
    try:
        return [found for _, found in predict_samples(_opened(model, content[0]), samples, batch_size)]
    except UadtoolError as error:
        return UadtoolError(f"{error} (on {socket.gethostname()})")


@functools.lru_cache(maxsize=1)
def _opened(model: _Model, content: Any) -> Runtime:
    """The model, opened once in each process of a node."""
    import ray

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / model.name
        path.write_bytes(ray.get(content))
        runtime = open_model(str(path), 1, model.runtime)
    versions = __version__, runtime.version
    if versions != model.versions:
        raise UadtoolError(f"a node has uadtool {versions[0]} and {model.runtime} {versions[1]}, this machine "
                           f"{model.versions[0]} and {model.versions[1]}; install the same on all")
    return runtime


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
