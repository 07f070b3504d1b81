"""Computing the next items in threads, in order."""

import queue
import threading
from concurrent.futures import Future, wait
from typing import Callable, Iterable, Iterator, Optional, Set, Tuple, TypeVar, Union

from uadtool.errors import UadtoolError

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int
               ) -> Iterator[Tuple[T, Union[R, UadtoolError]]]:
    """Yield each item with ``function(item)``, in order, computed in advance in ``threads`` threads.

    At most ``ahead`` items (at least 1) are taken from ``items`` beyond those yielded. A result is yielded as soon as
    it and all earlier results are known, even while ``items`` blocks. Closing the generator waits for running calls of
    ``function``, but not for ``items``. The threads iterate ``items``, one at a time.

    A UadtoolError that ``function`` raises is yielded in place of its result. Other exceptions of ``function``, and all
    exceptions of ``items``, are raised.
    """
    source = iter(items)
    taking, starting = threading.Lock(), threading.Lock()
    room = threading.Semaphore(ahead)
    results: "queue.SimpleQueue[Optional[Tuple[T, Future[Union[R, UadtoolError]]]]]" = queue.SimpleQueue()
    running: "Set[Future[Union[R, UadtoolError]]]" = set()
    over = threading.Event()
    failures = []

    def work() -> None:
        while True:
            with taking:
                room.acquire()
                if over.is_set():
                    return
                try:
                    item = next(source)
                except BaseException as error:
                    if not isinstance(error, StopIteration):
                        failures.append(error)
                    over.set()
                    results.put(None)
                    return
                future: "Future[Union[R, UadtoolError]]" = Future()
                with starting:
                    if over.is_set():
                        return
                    running.add(future)
                results.put((item, future))
            try:
                future.set_result(function(item))
            except UadtoolError as error:
                future.set_result(error)
            except BaseException as error:
                future.set_exception(error)
            running.discard(future)

    # Not a ThreadPoolExecutor: at exit, the interpreter would wait for a thread that waits for items.
    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    exhausted = False
    try:
        for item, future in iter(results.get, None):
            result = future.result()
            room.release()
            yield item, result
        exhausted = True
        for error in failures:
            raise error
    finally:
        # No call may run when the interpreter ends: it stops threads anywhere, which makes native code abort.
        with starting:
            over.set()
        for _ in workers:
            room.release()
        wait(list(running))
        for worker in workers if exhausted else []:
            worker.join()
