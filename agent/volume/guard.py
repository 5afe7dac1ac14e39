"""A program of its own: freezes one mounted filesystem on demand and thaws it come what may.

It talks over its standard input, one byte each way: it answers ``r`` when it has the mount point open; ``f`` freezes and answers
``f``, or ``e`` with the errno; ``t`` thaws and answers ``t``. It thaws by itself when the time limit is over, when the other end of
the socket closes, and when the process that started it is gone. It runs without site packages and imports nothing of Landfall, so
that it is there within milliseconds.

Usage: guard.py MOUNT_POINT LIMIT_S PARENT_PID
"""

import fcntl
import os
import select
import signal
import sys
import time

FIFREEZE = 0xC0045877  # include/uapi/linux/fs.h
FITHAW = 0xC0045878


def main(mount_point: str, limit_s: float, parent: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    mount_fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        watched = [0, os.pidfd_open(parent)]
    except ProcessLookupError:
        return
    os.write(0, b"r")
    if _next(watched, None) != b"f":
        return
    until = time.monotonic() + limit_s
    try:
        fcntl.ioctl(mount_fd, FIFREEZE, 0)
    except OSError as error:
        os.write(0, b"e" + str(error.errno).encode())
        return
    try:
        os.write(0, b"f")
        order = _next(watched, until)
    except OSError:
        order = b""
    finally:
        fcntl.ioctl(mount_fd, FITHAW, 0)
    if order == b"t":
        os.write(0, b"t")


def _next(watched: list[int], until: float | None) -> bytes:
    """Return the next order, or nothing at the end of the socket, of the parent, or of the time."""
    left = None if until is None else max(0.0, until - time.monotonic())
    ready = select.select(watched, [], [], left)[0]
    if ready != [0]:
        return b""
    return os.read(0, 1)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
