"""Computing what is asked for next in threads, in order."""

import queue
import threading
from concurrent.futures import Future, wait
from typing import Callable, Iterable, Iterator, Optional, Set, Tuple, TypeVar, Union

from uadtool.errors import UadtoolError

T = TypeVar("T")


R = TypeVar("R")


def read_ahead(
    function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int
) -> Iterator[Tuple[T, Union[R, UadtoolError]]]:
    """Yield each item, in order, with ``function(item)``, computed in ``threads`` threads before it is asked for.

    At most ``ahead`` items (at least 1) are taken from ``items`` beyond those yielded. A result is yielded as soon as
    it and those before it are known, even while ``items`` blocks, and closing the generator does not wait for
    ``items`` either, but for the calls of ``function`` that have begun. ``items`` is iterated in these threads, by one
    at a time.

    A UadtoolError that ``function`` raises is yielded in place of a result; other exceptions of ``function``, and all
    those of ``items``, are raised.
    """
    source = iter(items)
    taking, beginning = threading.Lock(), threading.Lock()
    room = threading.Semaphore(ahead)
    line: "queue.SimpleQueue[Optional[Tuple[T, Future[Union[R, UadtoolError]]]]]" = queue.SimpleQueue()
    running: "Set[Future[Union[R, UadtoolError]]]" = set()
    over = threading.Event()
    failure = []

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
                        failure.append(error)
                    over.set()
                    line.put(None)
                    return
                future: "Future[Union[R, UadtoolError]]" = Future()
                with beginning:
                    if over.is_set():
                        return
                    running.add(future)
                line.put((item, future))
            try:
                future.set_result(function(item))
            except UadtoolError as error:
                future.set_result(error)
            except BaseException as error:
                future.set_exception(error)
            running.discard(future)

    # Not a ThreadPoolExecutor: the interpreter would wait at exit for a thread that waits for items.
    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    exhausted = False
    try:
        for item, future in iter(line.get, None):
            result = future.result()
            room.release()
            yield item, result
        exhausted = True
        for error in failure:
            raise error
    finally:
        # None may be at work when the interpreter ends: it stops threads anywhere, and native code aborts at that.
        with beginning:
            over.set()
        for _ in workers:
            room.release()
        wait(list(running))
        for worker in workers if exhausted else []:
            worker.join()
