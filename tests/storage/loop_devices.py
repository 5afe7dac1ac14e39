"""Loop devices over image files, with direct I/O, gone when the test ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from agent.system.run import run


@contextlib.contextmanager
def attached(image: Path, *, sector_bytes: int = 512, read_only: bool = False) -> Iterator[Path]:
    """Give the loop device of ``image`` as long as the context lasts; nothing of the image is in the page cache then."""
    forget(image)
    options = ["--direct-io=on", f"--sector-size={sector_bytes}", *(["--read-only"] if read_only else [])]
    device = Path(run(["losetup", "--find", "--show", *options, str(image)]).text.strip())
    try:
        yield device
    finally:
        run(["losetup", "--detach", str(device)])


def forget(path: Path) -> None:
    """Write back and drop what the page cache has of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
