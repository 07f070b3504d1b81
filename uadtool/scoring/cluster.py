"""Scoring on the machines of a Ray cluster. https://docs.ray.io/en/latest/ray-core/tasks.html

Only the process that was started writes. It hands out chunks of images and receives their predictions in order, however
often Ray repeats a chunk because a machine was lost. Each image therefore has exactly one line.
"""

import contextlib
import functools
import io
import signal
import socket
import tempfile
from collections import deque
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, Tuple, Union

from uadtool import __version__
from uadtool.data.samples import Sample
from uadtool.data.storage import is_url
from uadtool.errors import UadtoolError, require
from uadtool.host import ending_signals
from uadtool.runtimes.contract import Runtime
from uadtool.runtimes.opening import open_model
from uadtool.scoring.predict import Prediction, Predictions, predict_samples
from uadtool.terminal import log

CHUNK = 16
"""Images in a task: enough to make its overhead, some milliseconds, negligible."""

AHEAD = 4
"""Unfinished tasks for each core."""

TIMEOUT = 5
"""Seconds to wait for the answer of a cluster."""

Results = List[Union[Prediction, UadtoolError]]


class _Model(NamedTuple):
    """A model as nodes open it: the same file, with the same versions of uadtool and the runtime."""

    name: str
    runtime: str
    versions: Tuple[str, str]


@contextlib.contextmanager
def connected(address: str, runtime: Runtime) -> Iterator["Cluster"]:
    """The Ray cluster at ``address`` (HOST:PORT; auto: the cluster of this machine; local: a new cluster).

    Within the block ``sys.stdout`` is redirected to the log.

    Raises:
        UadtoolError: no cluster answers, it runs another version of Ray or Python, or the model is an engine.
        MissingPackage: Ray is not installed.
    """
    if Path(runtime.path).suffix == ".engine":
        raise UadtoolError(f"{runtime.path} runs only on the GPU it was built for; give the cluster the .onnx file")
    ray = require("ray", "ray")
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon:
        try:
            socket.create_connection((host, int(port)), TIMEOUT).close()  # Ray would try for a minute
        except (OSError, OverflowError, ValueError) as error:
            raise UadtoolError(f"no Ray cluster answers at {address}: {error}") from error
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ending_signals())}
    with contextlib.redirect_stdout(_ToLog()):  # Ray prints messages about nodes
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            raise UadtoolError(f"cannot use the Ray cluster at {address}: {_first_line(error)}") from error
        finally:
            signal.signal(signal.SIGTERM, before[signal.SIGTERM])  # Ray's handler exits with another code
        received: List[int] = []
        try:
            for number, handler in before.items():
                if callable(handler):
                    signal.signal(number, _recording(handler, received))
            yield Cluster(ray, runtime, received)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            ray.shutdown()


def _recording(handler: Callable[[int, Any], Any], received: List[int]) -> Callable[[int, Any], None]:
    """The signal handler, which also records the signal: an exception is lost if it is raised in a callback of Ray."""
    def record(number: int, frame: Any) -> None:
        received.append(number)
        handler(number, frame)

    return record


class _ToLog(io.TextIOBase):
    """A file that logs its lines as debug messages."""

    def write(self, text: str) -> int:
        if text.strip():
            log.debug("%s", text.strip())
        return len(text)


class Cluster:
    """A cluster that holds the file of an open model; ``received`` collects the signals that arrive meanwhile."""

    def __init__(self, ray: Any, runtime: Runtime, received: List[int]) -> None:
        self._ray, self._received = ray, received
        self._model = _Model(Path(runtime.path).name, runtime.name, (__version__, runtime.version))
        self._content = ray.put(Path(runtime.path).read_bytes())

    def size(self) -> Dict[str, int]:
        """``nodes`` and ``cores`` of the cluster now."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        return {"nodes": len(nodes), "cores": max(1, int(self._ray.cluster_resources().get("CPU", 0)))}

    def predict(self, runtime: Runtime, samples: Iterable[Sample], batch_size: int = 1, pixels: bool = False
                ) -> Predictions:
        """As ``predict_samples``, with the model that the cluster holds."""
        task = self._ray.remote(num_cpus=1)(_predict)
        source = iter(samples)
        pending: Deque[Tuple[List[Sample], Any]] = deque()
        before = self.size()
        while True:
            size = self.size()
            if size["nodes"] < before["nodes"]:
                log.warning("the cluster lost a node; the %d remaining nodes repeat its unfinished work",
                            size["nodes"])
            before = size
            while len(pending) < AHEAD * size["cores"]:
                chunk = list(islice(source, CHUNK))
                if not chunk:
                    break
                # In a list: Ray would replace a bare reference by its content for every task.
                arguments = self._model, [self._content], list(map(_anywhere, chunk)), batch_size, pixels
                pending.append((chunk, task.remote(*arguments)))
            if not pending:
                return
            chunk, reference = pending.popleft()
            try:
                results: Union[Results, UadtoolError] = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error  # the exception of the task, without its traceback
                raise UadtoolError(f"the cluster failed: {_first_line(cause)}") from error
            if isinstance(results, UadtoolError):
                raise results
            yield from zip(chunk, results)
            if self._received:
                signal.raise_signal(self._received[0])


def _anywhere(sample: Sample) -> Sample:
    """The sample with paths that do not depend on the current folder."""
    def absolute(name: str) -> str:
        return name if is_url(name) else str(Path(name).absolute())

    return replace(sample, path=absolute(sample.path), masks=tuple(map(absolute, sample.masks)))


def _predict(model: _Model, content: List[Any], samples: List[Sample], batch_size: int, pixels: bool
             ) -> Union[Results, UadtoolError]:
    """The work of a node. It returns an error, since Ray would wrap an exception in pages of text."""
    try:
        return [result for _, result in predict_samples(_opened(model, content[0]), samples, batch_size, pixels)]
    except UadtoolError as error:
        return UadtoolError(f"{error} (on {socket.gethostname()})")


@functools.lru_cache(maxsize=1)
def _opened(model: _Model, content: Any) -> Runtime:
    """The model, opened once in each process of a node."""
    import ray  # on a node, which has it

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / model.name
        path.write_bytes(ray.get(content))
        runtime = open_model(str(path), 1, model.runtime)
    versions = __version__, runtime.version
    if versions != model.versions:
        raise UadtoolError(f"a node has uadtool {versions[0]} and {model.runtime} {versions[1]}, this machine "
                           f"{model.versions[0]} and {model.versions[1]}; install the same versions on all machines")
    return runtime


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
