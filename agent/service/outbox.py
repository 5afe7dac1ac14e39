"""Notifications for the management node, kept durable until it acknowledges them; it may be away for as long as it likes.

One file a notification, named by its sequence number. If we die while writing one, it is there whole or not at all; numbers never repeat,
because the highest one given is kept even when its notification was acknowledged.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from agent.contract.messages import Notification, from_document, to_document
from agent.system.clock import monotonic_s, wall_ns
from agent.system.files import remove_durably, sweep, write_durably


class Outbox:
    """The agent's outbox in ``folder``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep(folder)
        self._folder = folder
        self._changed = threading.Condition()
        last = folder / "last"
        self._last = max([int(last.read_text()) if last.exists() else 0, *self._numbers()])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let nobody read for as long as the context lasts: what is put meanwhile is durable at once, and read afterwards."""
        with self._changed:
            yield

    def put(self, kind: str, volume: UUID, transfer: UUID | None, message: str) -> Notification:
        """Return the notification, durable, and wake whoever waits for one."""
        with self._changed:
            self._last += 1
            notification = Notification(self._last, kind, volume, transfer, wall_ns(), message)
            write_durably(self._folder / f"{self._last:012d}.json", json.dumps(to_document(notification)).encode())
            self._changed.notify_all()
        return notification

    def read(self, after: int, wait_s: float) -> tuple[Notification, ...]:
        """Return what stands after ``after``; waits up to ``wait_s`` for the first."""
        until = monotonic_s() + wait_s
        with self._changed:
            while not any(number > after for number in self._numbers()):
                left = until - monotonic_s()
                if left <= 0 or not self._changed.wait(left):
                    break
            return tuple(self._load(number) for number in self._numbers() if number > after)

    def acknowledge(self, sequence: int) -> None:
        """Forget everything up to ``sequence``."""
        with self._changed:
            write_durably(self._folder / "last", str(self._last).encode())
            for number in self._numbers():
                if number <= sequence:
                    remove_durably(self._folder / f"{number:012d}.json")

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("[0-9]*.json"))

    def _load(self, number: int) -> Notification:
        return from_document(json.loads((self._folder / f"{number:012d}.json").read_bytes()), Notification)
