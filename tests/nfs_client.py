"""A process that holds one file of an NFS mount open and does with it what it is told, line by line.

A process of its own: whoever has such a file open waits for its server even where it starts a program, which closes the file.

    python -m tests.nfs_client PATH         write TEXT | append TEXT | read | lock | inode      -> ok [WORDS], or the name of an errno
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from agent.system.run import run


class Held:
    """The process, and its answers."""

    def __init__(self, path: Path) -> None:
        argv = [sys.executable, "-m", "tests.nfs_client", str(path)]
        root = Path(__file__).resolve().parents[1]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        self._said: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, words: str) -> None:
        """Give an order, whose answer may be long in coming."""
        assert self._process.stdin
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()

    def answer(self, limit_s: float) -> str:
        """Return the next answer; empty if there is none within that time."""
        try:
            return self._said.get(timeout=limit_s)
        except Empty:
            return ""

    def ask(self, words: str, limit_s: float = 120.0) -> str:
        """Return the answer to an order."""
        self.tell(words)
        return self.answer(limit_s)

    def end(self) -> None:
        """End it, if the kernel lets it."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10.0)

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._said.put(line.strip())


@contextmanager
def mounted(server: str, path: Path, point: Path, *, options: str = "hard") -> Iterator[Path]:
    """Yield where a client has mounted an export, in the network namespace of this thread."""
    point.mkdir(exist_ok=True)
    run(["mount", "-t", "nfs", "-o", f"vers=4.2,{options}", f"{server}:{path}", str(point)], timeout_s=120.0)
    try:
        yield point
    finally:
        run(["umount", "-f", "-l", str(point)], timeout_s=120.0, ok=(0, 32))


def _main(path: str) -> None:
    file_fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    for line in sys.stdin:
        verb, _, text = line.rstrip("\n").partition(" ")
        try:
            said = f"ok {_do(file_fd, verb, text)}"
        except OSError as error:
            said = errno.errorcode[error.errno or 0]
        sys.stdout.write(f"{said}\n")
        sys.stdout.flush()


def _do(file_fd: int, verb: str, text: str) -> str:
    match verb:
        case "write" | "append":
            os.pwrite(file_fd, text.encode(), 0 if verb == "write" else os.fstat(file_fd).st_size)
            os.fsync(file_fd)
        case "read":
            os.posix_fadvise(file_fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return os.pread(file_fd, 1 << 16, 0).decode()
        case "lock":
            fcntl.lockf(file_fd, fcntl.LOCK_EX)
        case "inode":
            return str(os.fstat(file_fd).st_ino)
    return ""


if __name__ == "__main__":
    _main(sys.argv[1])
