"""Mounted filesystems held frozen for a moment, each with a guard that thaws it whatever happens to this process.

A freezer that dies leaves every writer in uninterruptible sleep for ever. So the freezing is done by a process of its own (guard.py) that
has the mount point open before it freezes, and that thaws at the end of its time limit, of its socket, or of this process.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
def frozen(*mount_points: Path, limit_s: float = 10.0) -> Iterator[Freeze]:
    """Hold filesystems frozen, all at once; FreezeFailed if one cannot be, or was thawed before the context ended.

    What was done inside is void then. The last is frozen before the context begins, and none is thawed before it ends: so what is seen
    inside of all of them is of one moment. Each has a guard of its own, whose time runs from its own freeze. If we die here the guards
    thaw. Nothing inside may write to a frozen filesystem.
    """
    measured = Freeze()
    with ExitStack() as guards:
        # All guards are there, and all is written back, before the first filesystem is frozen: none is frozen for longer than need be.
        held = [guards.enter_context(_guarded(mount_point, limit_s)) for mount_point in mount_points]
        for guard in held:
            guard.freeze()
            measured.began_s = measured.began_s or monotonic_s()
        try:
            yield measured
        finally:
            failures = [error for guard in held if (error := guard.thawed()) is not None]
            measured.ended_s = monotonic_s() if held else 0.0
            if failures:
                raise failures[0]


class _Guard:
    """The process that freezes one filesystem and thaws it come what may."""

    def __init__(self, ours: socket.socket, limit_s: float) -> None:
        self._ours = ours
        self._limit_s = limit_s
        self.ordered = False

    def freeze(self) -> None:
        """Freeze it; FreezeFailed. FIFREEZE ends when the writers in flight have, and cannot be interrupted."""
        self._ours.settimeout(None)
        self.ordered = True
        self._ours.send(b"f")
        _expect(self._ours, b"f", "the filesystem could not be frozen")

    def thawed(self) -> FreezeFailed | None:
        """Thaw it; return why what was done meanwhile is void, if it is."""
        self._ours.settimeout(self._limit_s)
        otherwise = "the filesystem was thawed before the generation was complete"
        try:
            self._ours.send(b"t")
            _expect(self._ours, b"t", otherwise)
        except FreezeFailed as error:
            return error
        except OSError as error:
            return FreezeFailed(otherwise, cause=str(error))
        return None


@contextmanager
def _guarded(mount_point: Path, limit_s: float) -> Iterator[_Guard]:
    """Give the guard of a mounted filesystem, which has it open and written back; whatever it did is undone at the end."""
    mount_fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    ours, guards = socket.socketpair()
    try:
        with ours:
            with guards:
                argv = [sys.executable, "-I", "-S", "-B", str(_GUARD), str(mount_point), str(limit_s), str(os.getpid())]
                process = run.start(argv, stdin=guards.fileno())
            guard = _Guard(ours, limit_s)
            try:
                ours.settimeout(_START_LIMIT_S)
                _expect(ours, b"r", "the guard did not start")
                block.sync_filesystem(mount_fd)  # what is written back now is not written back under the freeze
                yield guard
            finally:
                ours.close()  # whatever the guard waits for, it thaws and ends now
                if process.wait(timeout=limit_s + _START_LIMIT_S) != 0 and guard.ordered:
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
