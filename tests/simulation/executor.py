"""Thread pools of simulated processes; stands for `concurrent.futures`."""

from collections import deque
from collections.abc import Callable
from concurrent import futures
from typing import Any

from tests.simulation.threads import Event, Thread


class NoLock:
    """Stands for the condition of a future that nobody blocks on."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def notify_all(self) -> None:
        pass


_NO_LOCK = NoLock()


class Job(futures.Future[Any]):
    """concurrent.futures.Future, made without a lock."""

    def __init__(self) -> None:
        self._condition = _NO_LOCK  # type: ignore[assignment]
        self._state = "PENDING"
        self._result = self._exception = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Callable[..., Any]] = []


class SimulatedExecutor(futures.Executor):
    """concurrent.futures.ThreadPoolExecutor: jobs begin a little later, at most `max_workers` at once."""

    def __init__(self, max_workers: int = 4, thread_name_prefix: str = "pool", **_: Any) -> None:
        self._max_workers = max_workers
        self._name = thread_name_prefix
        self._waiting: deque[tuple[Job, Callable[[], Any]]] = deque()
        self._num_running = 0
        self._idle = Event()
        self._idle.set()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "futures.Future[Any]":
        job = Job()
        self._waiting.append((job, lambda: function(*args, **kwargs)))
        self._idle.clear()
        if self._num_running < self._max_workers:
            self._num_running += 1
            Thread(target=self._work, name=self._name).start()
        return job

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if wait:
            self._idle.wait()

    def _work(self) -> None:
        try:
            while self._waiting:
                job, function = self._waiting.popleft()
                if not job.set_running_or_notify_cancel():
                    continue
                try:
                    result = function()
                except Exception as error:
                    job.set_exception(error)
                else:
                    job.set_result(result)
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()
