"""Doing something inside a network namespace of the lab, from a thread of this process.

A thread has a network namespace of its own (setns(2)); the rest of the process stays where it is. A thread that entered one is
not used for anything else afterwards. pyroute2's own way, a forked child, would carry our handlers of Ctrl-C into the child.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pyroute2 import IPRoute
from pyroute2.netns import setns

from agent.contract.errors import LabMissing
from mgmt.lab.layout import NAMESPACES

T = TypeVar("T")


def enter(name: str) -> None:
    """Move the calling thread, for the rest of its life, into a network namespace; LabMissing where it is not there."""
    path = NAMESPACES / name
    if not os.path.ismount(path):
        raise LabMissing(f"there is no network namespace {name}")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(descriptor)
    finally:
        os.close(descriptor)


def within(name: str, work: Callable[[], T]) -> T:
    """Return what ``work`` returns, done by a thread of its own inside the namespace."""

    def entered() -> T:
        enter(name)
        return work()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(entered).result()


def with_links(name: str, work: Callable[[IPRoute], T]) -> T:
    """Return what ``work`` returns, given a netlink connection of the namespace."""

    def connected() -> T:
        with IPRoute() as links:
            return work(links)

    return within(name, connected)
