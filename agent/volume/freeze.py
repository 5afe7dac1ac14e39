"""A mounted filesystem held frozen for a moment, with a guard that thaws it whatever happens to this process.

A freezer that dies leaves every writer in uninterruptible sleep for ever. So the freezing is done by a process of its own (guard.py) that
has the mount point open before it freezes, and that thaws at the end of its time limit, of its socket, or of this process.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agent.contract.errors import FreezeFailed
from agent.system import block, run
from agent.system.clock import monotonic_s

_GUARD: Final = Path(__file__).with_name("guard.py")
_START_LIMIT_S: Final = 20.0


class Freeze:
    """How long the filesystem was frozen, known when the context has ended."""

    __slots__ = ("began_s", "ended_s")

    def __init__(self) -> None:
        self.began_s = self.ended_s = 0.0

    @property
    def milliseconds(self) -> float:
        """Time from the return of the freeze to the return of the thaw."""
        return (self.ended_s - self.began_s) * 1000


@contextmanager
def frozen(mount_point: Path, *, limit_s: float = 10.0) -> Iterator[Freeze]:
    """Hold the filesystem on ``mount_point`` frozen; FreezeFailed if it cannot be, or was thawed before the context ended.

    What was done inside is void then. If we die here the guard thaws. Nothing inside may write to the frozen filesystem.
    """
    mount_fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    ours, guards = socket.socketpair()
    measured = Freeze()
    ordered = False
    try:
        with ours:
            with guards:
                argv = [sys.executable, "-I", "-S", "-B", str(_GUARD), str(mount_point), str(limit_s), str(os.getpid())]
                guard = run.start(argv, stdin=guards.fileno())
            try:
                ours.settimeout(_START_LIMIT_S)
                _expect(ours, b"r", "the guard did not start")
                block.sync_filesystem(mount_fd)  # what is written back now is not written back under the freeze
                ours.settimeout(None)  # FIFREEZE ends when the writers in flight have, and cannot be interrupted
                ordered = True
                ours.send(b"f")
                _expect(ours, b"f", "the filesystem could not be frozen")
                measured.began_s = monotonic_s()
                try:
                    yield measured
                finally:
                    ours.settimeout(limit_s)
                    _thaw(ours, measured)
            finally:
                ours.close()  # whatever the guard waits for, it thaws and ends now
                if guard.wait(timeout=limit_s + _START_LIMIT_S) != 0 and ordered:
                    thaw_if_frozen(mount_point)  # somebody killed the guard, perhaps before it could answer
    finally:
        os.close(mount_fd)


def sync_mounted(mount_point: Path) -> None:
    """Write back everything dirty of a mounted filesystem, so that the freeze has little to write."""
    mount_fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        block.sync_filesystem(mount_fd)
    finally:
        os.close(mount_fd)


def thaw_if_frozen(mount_point: Path) -> bool:
    """Thaw what a dead freezer left; whether there was anything to thaw."""
    mount_fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        block.thaw(mount_fd)
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.EOPNOTSUPP}:
            return False
        raise
    finally:
        os.close(mount_fd)
    return True


def _thaw(ours: socket.socket, measured: Freeze) -> None:
    try:
        ours.send(b"t")
        _expect(ours, b"t", "the filesystem was thawed before the generation was complete")
    except OSError as error:
        raise FreezeFailed("the filesystem was thawed before the generation was complete", cause=str(error)) from error
    finally:
        measured.ended_s = monotonic_s()


def _expect(ours: socket.socket, word: bytes, otherwise: str) -> None:
    try:
        answer = ours.recv(16)
    except TimeoutError as error:
        raise FreezeFailed(otherwise, cause="the guard does not answer") from error
    if answer[:1] == b"e":
        number = int(answer[1:])
        raise FreezeFailed(otherwise, cause=f"{errno.errorcode.get(number)}: {os.strerror(number)}")
    if answer != word:
        raise FreezeFailed(otherwise, cause="the guard ended" if not answer else f"the guard said {answer!r}")
