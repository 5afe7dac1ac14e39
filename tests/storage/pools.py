"""Filesystems with reflink in a file, for pools."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def pool_on(kind: str, folder: Path, size_bytes: int = 2 << 30) -> Iterator[Path]:
    """A fresh XFS or btrfs in a sparse file, mounted as long as the context lasts."""
    image, mount_point = folder / f"pool.{kind}", folder / f"pool-{kind}"
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    mount_point.mkdir()
    subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True)
    with ExitStack() as after:
        after.callback(image.unlink)
        subprocess.run(["mount", "-o", "loop", str(image), str(mount_point)], check=True)
        after.callback(unmounted, mount_point)
        yield mount_point


def unmounted(mount_point: Path, limit_s: float = 20.0) -> None:
    """Unmounts. A mount namespace that is being made elsewhere holds copies of our mounts for a moment, and so our devices."""
    end = time.monotonic() + limit_s
    while subprocess.run(["umount", str(mount_point)], capture_output=True, check=False).returncode != 0:
        if time.monotonic() > end:
            subprocess.run(["umount", "-l", str(mount_point)], check=True)
            raise AssertionError(f"{mount_point} stayed in use")
        threading.Event().wait(0.1)
