"""I/O priorities as the kernel has them, told by ionice."""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.system.priority import IoPriority, io_priority


def told() -> str:
    argv = ["ionice", "-p", str(threading.get_native_id())]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(("priority", "words"), [(IoPriority.LOW, "best-effort: prio 7"), (IoPriority.IDLE, "idle")])
def test_a_thread_and_those_it_begins_have_the_priority_until_the_end(priority: IoPriority, words: str) -> None:
    before = told()
    with io_priority(priority), ThreadPoolExecutor(1) as begun:
        assert told() == words
        assert begun.submit(told).result() == words
    assert told() == before
    with ThreadPoolExecutor(1) as begun:
        assert begun.submit(told).result() == before


def test_a_normal_one_is_left_alone() -> None:
    before = told()
    with io_priority(IoPriority.LOW), io_priority(IoPriority.NORMAL):
        assert told() == "best-effort: prio 7"
    assert told() == before
