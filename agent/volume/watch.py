"""Watches the devices that a node's volumes stand on: one that goes, changes its size, or becomes read-only is said at once.

An event of the kernel's (through pyudev: udevd's where one runs, else the kernel's own) only wakes the watch; what is true is read from
/sys. `blockdev --setro` makes no event at all, so the watch also looks by itself now and then.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Final

import pyudev

from agent.system.clock import wall_ns

log = logging.getLogger("landfall.devices")

_SYS: Final = Path("/sys")
_UDEV_CONTROL: Final = Path("/run/udev/control")
PERIOD_S: Final = 2.0


class DeviceChange(StrEnum):
    """What has become of a device."""

    REMOVED = "removed"
    RETURNED = "returned"
    RESIZED = "resized"
    READ_ONLY = "read-only"
    WRITABLE = "writable"


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """A change of one device below the volumes, in words an operator reads in `landfall status`."""

    device: str
    change: DeviceChange
    at_ns: int
    message: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """A device as it was; its size is 0 while it is not there. ``troubles`` are the messages that still hold."""

    size_bytes: int
    read_only: bool
    troubles: tuple[tuple[DeviceChange, str], ...] = ()


def devices_below(device: Path, *, sys: Path = _SYS) -> frozenset[str]:
    """Return the kernel's names of a device and of all that it stands on, down to whole disks; empty if it is not there."""
    try:
        about = device.stat()
        folder = (sys / "dev" / "block" / f"{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}").resolve(strict=True)
    except OSError:
        return frozenset()
    return frozenset(_below(folder)) if stat.S_ISBLK(about.st_mode) else frozenset()


def _below(folder: Path) -> Iterable[str]:
    yield folder.name
    if (folder / "partition").exists():
        yield from _below(folder.parent)
    for slave in (folder / "slaves").glob("*"):
        yield from _below(slave.resolve())


class DeviceWatch:
    """Watches for as long as it is open; a device once seen below the volumes is watched from then on."""

    def __init__(
        self, below: Callable[[], frozenset[str]], heard: Callable[[DeviceEvent], None], *, sys: Path = _SYS, period_s: float = PERIOD_S
    ) -> None:
        """``below`` returns the names of the devices to watch now; ``heard`` is told of each event, in this watch's thread."""
        self._below, self._heard, self._sys, self._period_s = below, heard, sys, period_s
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()
        self._wake, self._closing = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="devices", daemon=True)
        self.look()
        self._thread.start()

    def troubles(self) -> tuple[str, ...]:
        """Return what is wrong with the devices now, one sentence each."""
        with self._lock:
            return tuple(message for seen in self._seen.values() for _, message in seen.troubles)

    def look(self) -> None:
        """Compare every device with what it was, and tell what changed."""
        with self._lock:
            events = [event for name in sorted(self._below() | self._seen.keys()) for event in self._changes(name)]
        for event in events:
            log.warning("%s", event.message)
            self._heard(event)

    def close(self) -> None:
        """Watch no longer."""
        os.close(self._closing)
        self._thread.join()
        os.close(self._wake)

    def _changes(self, name: str) -> list[DeviceEvent]:
        now, known = _read(self._sys / "class" / "block" / name), self._seen.get(name)
        if known is None:
            # Seen for the first time: that it can be written to is what volumes need; its size is what it is.
            known = replace(now, read_only=False)
        at_ns, events = wall_ns(), []
        troubles = dict(known.troubles)
        for change, holds_no_more, words in _differences(known, now):
            message = f"/dev/{name}, below the volumes, {words} at {_moment(at_ns)}"
            events.append(DeviceEvent(f"/dev/{name}", change, at_ns, message))
            if holds_no_more is not None:
                troubles.pop(holds_no_more, None)
            else:
                troubles[change] = message
        self._seen[name] = replace(now, size_bytes=now.size_bytes or known.size_bytes, troubles=tuple(troubles.items()))
        return events

    def _run(self) -> None:
        monitor = self._monitor()
        sources = [self._wake, *([monitor] if monitor is not None else [])]
        while True:
            ready, _, _ = select.select(sources, [], [], self._period_s)
            if self._wake in ready:
                return
            while monitor is not None and monitor.poll(0) is not None:
                continue
            try:
                self.look()
            except Exception:
                log.exception("the devices below the volumes could not be looked at")

    @staticmethod
    def _monitor() -> pyudev.Monitor | None:
        try:
            monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="udev" if _UDEV_CONTROL.exists() else "kernel")
            monitor.filter_by("block")
            monitor.start()
        except OSError as error:
            log.info("no events of devices are to be had, so they are looked at every %g s: %s", PERIOD_S, error)
            return None
        return monitor


def _differences(known: _Seen, now: _Seen) -> Iterable[tuple[DeviceChange, DeviceChange | None, str]]:
    """Yield what changed, the trouble that it ends (None: it is one), and the words for it."""
    was_gone = any(change is DeviceChange.REMOVED for change, _ in known.troubles)
    if not now.size_bytes:
        if not was_gone and known.size_bytes:
            yield DeviceChange.REMOVED, None, "went away"
        return
    if was_gone:
        yield DeviceChange.RETURNED, DeviceChange.REMOVED, "came back"
    if known.size_bytes != now.size_bytes:
        yield DeviceChange.RESIZED, None, f"changed its size from {known.size_bytes} to {now.size_bytes} bytes"
    if now.read_only and not known.read_only:
        yield DeviceChange.READ_ONLY, None, "became read-only"
    if known.read_only and not now.read_only:
        yield DeviceChange.WRITABLE, DeviceChange.READ_ONLY, "became writable again"


def _moment(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _read(folder: Path) -> _Seen:
    try:
        return _Seen(int((folder / "size").read_text()) * 512, (folder / "ro").read_text().strip() == "1")
    except (OSError, ValueError):
        return _Seen(0, read_only=False)
