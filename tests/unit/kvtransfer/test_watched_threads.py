"""Threads that can be asked whether they have work, and how much of it is done."""

import threading

import pytest

from kvtransfer.threads import WatchedThreads
from tandem.progress import Work


def test_work_is_waiting_until_the_last_job_is_done_however_it_ends() -> None:
    leave = threading.Event()
    with WatchedThreads(2, "test") as threads:
        assert threads.work() == Work(False, 0)
        held, broken = threads.submit(leave.wait, 10), threads.submit(int, "no number")
        with pytest.raises(ValueError, match="no number"):
            broken.result()
        assert threads.work().waiting
        leave.set()
        assert held.result()
    assert threads.work() == Work(False, 2)
