"""An SMB client that reads one file again and again over one connection, and connects anew whenever that is lost: what people notice.

It lives in a network of its own beside the nodes, and knows nothing but the volume's address and the file's content.
"""

from __future__ import annotations

import os
import select
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from agent.contract.errors import DrillFailed
from agent.system.clock import monotonic_s
from agent.system.run import start
from mgmt.drill.clients import SmbClient

EVERY_S: Final = 0.2
ANSWER_LIMIT_S: Final = 4.0
"""After which a connection that says nothing is lost."""
CONNECT_LIMIT_S: Final = 2.0
"""The same of one that was never any good, so that a gap is measured to about this."""
FIRST_LIMIT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Gap:
    """A time without the file: from the last answer before to the first one after, on the clock that never jumps."""

    begun_s: float
    ended_s: float | None  # None: it never came back

    @property
    def seconds(self) -> float | None:
        """How long it was."""
        return None if self.ended_s is None else self.ended_s - self.begun_s


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client saw of a volume: how often it read the file, how often it had to connect anew, and the gaps."""

    reads: int
    connections: int
    gaps: tuple[Gap, ...]


class Onlooker:
    """The client, from ``with`` to its end; ``content`` is what stands in the file ``path`` of the share all the time."""

    def __init__(self, client: SmbClient, path: str, content: bytes) -> None:
        self._argv = client.argv("")[:-2]  # without -c: it stays, and takes commands
        self._command = f'get "{path.replace("/", chr(92))}" -\n'.encode()
        self._content = content
        self._ending = threading.Event()
        self._first = threading.Event()
        self._reads = self._connections = 0
        self._gaps: list[Gap] = []
        self._last_s: float | None = None
        self._thread = threading.Thread(target=self._look, name="onlooker", daemon=True)

    def __enter__(self) -> Self:
        """Return once it has read the file."""
        self._thread.start()
        if not self._first.wait(FIRST_LIMIT_S):
            self._ending.set()
            raise DrillFailed("an SMB client cannot read the volume at its address", cause=" ".join(self._argv))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join()

    def seen(self) -> Seen:
        """Return what it saw until now; in a gap that lasts it is waited for some attempts more."""
        reads, until = self._reads, monotonic_s() + 3 * (ANSWER_LIMIT_S + CONNECT_LIMIT_S)
        while self._reads == reads and monotonic_s() < until:
            self._ending.wait(EVERY_S)
        open_gap = () if self._reads > reads or self._last_s is None else (Gap(self._last_s, None),)
        return Seen(self._reads, self._connections, (*self._gaps, *open_gap))

    def _look(self) -> None:
        while not self._ending.is_set():
            self._connection()
            self._ending.wait(EVERY_S)

    def _connection(self) -> None:
        """Connect, and read until that fails or we are told to end."""
        reading, commands = os.pipe()
        answers, writing = os.pipe()
        try:
            process = start(self._argv, stdin=reading, stdout=writing, stderr=writing)
        finally:
            os.close(reading)
            os.close(writing)
        self._connections += 1
        limit_s, lost = CONNECT_LIMIT_S, self._last_s
        try:
            while not self._ending.is_set() and self._read(commands, answers, limit_s):
                now = monotonic_s()
                if lost is not None:
                    self._gaps.append(Gap(lost, now))
                self._last_s, lost, limit_s = now, None, ANSWER_LIMIT_S
                self._reads += 1
                self._first.set()
                self._ending.wait(EVERY_S)
        finally:
            os.close(commands)
            os.close(answers)
            process.kill()
            process.wait()

    def _read(self, commands: int, answers: int, limit_s: float) -> bool:
        """Whether the file was read once, whole."""
        try:
            os.write(commands, self._command)
        except BrokenPipeError:
            return False
        until, said = monotonic_s() + limit_s, b""
        while (left := until - monotonic_s()) > 0 and select.select([answers], [], [], left)[0]:
            part = os.read(answers, 1 << 16)
            said += part
            if not part or b"NT_STATUS" in said:
                return False
            if self._content in said:
                return True
        return False
