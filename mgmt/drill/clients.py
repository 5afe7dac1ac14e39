"""The part of the drill's changes that real SMB clients make, by smbclient."""

from __future__ import annotations

import contextlib
import os
import random
import select
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from agent.contract.errors import CommandFailed
from agent.system.clock import monotonic_s
from agent.system.run import run, start
from mgmt.drill.changes import ChangeCounts, KindCount

_AT_ONCE = 40
_WRITE_SOON = ("-m", "SMB2_02", "-b", "65536")
"""Makes smbclient write every 64 KiB; by later dialects it collects 8 MiB first."""


@dataclass(frozen=True, slots=True)
class SmbClient:
    """How a share is reached. ``prefix`` runs the client elsewhere, such as ``("ip", "netns", "exec", NAME)``."""

    host: str
    share: str
    prefix: tuple[str, ...] = ()
    options: tuple[str, ...] = ("-N",)
    timeout_s: float = 120.0

    def argv(self, command: str) -> list[str]:
        """Return the argument list that runs ``command`` of smbclient(1)."""
        return [*self.prefix, "smbclient", f"//{self.host}/{self.share}", *self.options, "-c", command]

    def run(self, commands: Sequence[str]) -> None:
        """Run commands in one session after another; CommandFailed with the client's words if one is refused."""
        for at in range(0, len(commands), _AT_ONCE):
            output = run(self.argv("; ".join(commands[at : at + _AT_ONCE])), timeout_s=self.timeout_s)
            # A session of several commands ends with 0 though one of them was refused.
            if b"NT_STATUS_" in output.stdout + output.stderr:
                words = (output.stdout + output.stderr).decode("utf-8", "replace").strip()[-800:]
                raise CommandFailed("the SMB server refused a client's command", cause=words)

    def delete(self, path: str) -> None:
        """Delete a file."""
        self.run([f'del "{_backslashes(path)}"'])


def smb_changes(client: SmbClient, seed: int, files: int = 60) -> ChangeCounts:
    """Put, overwrite, rename and delete ``files`` files in a directory of their own. The first call fills it, later ones change it.

    Call once before the base generation with an even ``seed`` and once after it with an odd one to have changes of every kind.
    """
    generator = random.Random(seed)
    counts: dict[str, int] = {}
    commands: list[str] = []
    written = 0
    second = bool(seed % 2)
    with tempfile.TemporaryDirectory(prefix="landfall-drill-") as directory:

        def put(name: str, kind: str) -> None:
            nonlocal written
            content = generator.randbytes(min(int(generator.lognormvariate(9.0, 1.2)), 1 << 20))
            local = Path(directory) / str(len(commands))
            local.write_bytes(content)
            commands.append(f'put "{local}" "{_backslashes(name)}"')
            counts[kind] = counts.get(kind, 0) + 1
            written += len(content)

        if not second:
            commands.append('mkdir "smb clients"')
            for number in range(files):
                put(f"smb clients/report {number:03}.doc", "smb_put")
        else:
            commands.append('mkdir "smb clients\\later"')
            counts["smb_mkdir"] = 1
            for number in range(files):
                name = f"smb clients/report {number:03}.doc"
                match number % 5:
                    case 0:
                        put(name, "smb_overwrite")
                    case 1:
                        commands.append(f'rename "{_backslashes(name)}" "smb clients\\later\\{number:03}.doc"')
                        counts["smb_rename"] = counts.get("smb_rename", 0) + 1
                    case 2:
                        commands.append(f'del "{_backslashes(name)}"')
                        counts["smb_delete"] = counts.get("smb_delete", 0) + 1
                    case 3:
                        put(f"smb clients/later/new {number:03}.xls", "smb_put")
                    case _:
                        put(f"smb clients/~{number:03}.tmp", "smb_safe_save")
                        commands.append(f'del "{_backslashes(name)}"')
                        commands.append(f'rename "smb clients\\~{number:03}.tmp" "{_backslashes(name)}"')
        client.run(commands)
    return ChangeCounts(tuple(KindCount(*item) for item in sorted(counts.items())), written)


class _Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


@dataclass(slots=True)
class OpenWrite:
    """A client that has a file open and is writing it, from ``begin`` to ``end``: what a freeze meets in real life.

    ``path`` is the file on the share, ``served`` the same file where the server keeps it. If we die here, the pipe ends and
    the client with it.
    """

    client: SmbClient
    path: str
    served: Path
    _process: _Process | None = field(default=None)
    _pipe: int = field(default=-1)

    def begin(self, at_least_bytes: int = 512 << 10, timeout_s: float = 30.0) -> None:
        """Return once the server has that much of the file, which is still open; CommandFailed if that does not come."""
        reading, self._pipe = os.pipe()
        client = replace(self.client, options=(*self.client.options, *_WRITE_SOON))
        try:
            process = self._process = start(client.argv(f'put - "{_backslashes(self.path)}"'), stdin=reading)
        finally:
            os.close(reading)
        os.set_blocking(self._pipe, False)
        limit, left, chunk = monotonic_s() + timeout_s, at_least_bytes + (1 << 20), os.urandom(64 << 10)
        while not self.served.exists() or self.served.stat().st_size < at_least_bytes:
            if monotonic_s() > limit or _ended(process, 0.005):
                self.end(0.0)
                raise CommandFailed("the SMB client did not come to write", cause=self.path)
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                left -= os.write(self._pipe, chunk) if left > 0 else 0

    def write(self, content: bytes) -> None:
        """Let the client write on; returns when the pipe has taken it all."""
        os.set_blocking(self._pipe, True)
        while content:
            content = content[os.write(self._pipe, content) :]

    def end(self, timeout_s: float = 30.0) -> None:
        """Let the client finish; it is killed if it does not, as when its server is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        os.close(self._pipe)
        if not _ended(process, timeout_s):
            process.kill()
        process.wait()


def _ended(process: _Process, timeout_s: float) -> bool:
    if process.poll() is not None:
        return True
    watch = os.pidfd_open(process.pid)
    try:
        return bool(select.select([watch], [], [], timeout_s)[0])
    finally:
        os.close(watch)


@contextlib.contextmanager
def deleted_while_open(client: SmbClient, path: str, served: Path) -> Iterator[None]:
    """A file that somebody on the server has open while a client deletes it: no name, but blocks, for as long as the context lasts."""
    descriptor = os.open(served, os.O_RDWR | os.O_CLOEXEC)
    try:
        client.delete(path)
        os.write(descriptor, b"written after its last name was gone")
        yield
    finally:
        os.close(descriptor)


def _backslashes(path: str) -> str:
    return path.replace("/", "\\")
