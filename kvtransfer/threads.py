"""Threads whose work can be seen to move on."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from tandem.progress import Work

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class WatchedThreads(ThreadPoolExecutor):
    """A pool of threads that knows how many jobs it was given and how many are done."""

    def __init__(self, num_threads: int, name: str) -> None:
        super().__init__(num_threads, name)
        self._lock = threading.Lock()
        self._num_submitted = 0
        self._num_done = 0

    def submit(
        self, function: Callable[Parameters, Result], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Result]:
        job = super().submit(function, *args, **kwargs)
        with self._lock:
            self._num_submitted += 1
        job.add_done_callback(self._count)
        return job

    def work(self) -> Work:
        return Work(self._num_done < self._num_submitted, self._num_done)

    def _count(self, job: Future[Result]) -> None:
        with self._lock:
            self._num_done += 1
