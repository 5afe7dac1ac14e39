"""A machine of the simulation: power, a clock, and for a NAS what of its kernel clients reach, with a disk that outlives all of that."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from agent.contract import messages as m
from agent.contract.errors import AddressTaken, DeviceBusy, LandfallError
from agent.contract.identity import FilesystemKind, GenerationId
from agent.serving.address import Claim, Interface
from agent.serving.exports import Share
from agent.serving.machine import Machine as Kernel
from agent.system.neighbour import Heard, Link
from agent.volume.substrate import ChangedRuns, Take, VolumeRecord, Workspace
from tests.simulation.world import KilledError, Process, S, SimThreads, World, current, pause

YEAR_2026_NS = 1_795_000_000 * S


class Clock:
    """A machine's clocks: they drift, begin anew at each boot, and the wall clock is wrong and jumps."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self.rate = 1 + world.rng.uniform(-0.004, 0.004)
        self.wall_offset_ns = round(world.rng.uniform(-3600, 3600) * S)
        self.stood_ns = 0  # while the machine was paused, where its clock stands still with it
        self.boots = 0
        self._since_ns = 0

    def boot(self) -> None:
        self.boots += 1
        self._since_ns, self.stood_ns = self._world.now_ns, 0

    def wall_ns(self) -> int:
        return YEAR_2026_NS + self.wall_offset_ns + round(self._world.now_ns * self.rate)

    def monotonic_s(self) -> float:
        return self.boottime_ns() / S

    def boottime_ns(self) -> int:
        return 7 * S + round((self._world.now_ns - self._since_ns - self.stood_ns) * self.rate)

    def boot_id(self) -> str:
        return f"{self._name}-{self.boots}"

    def sleep(self, seconds: float) -> None:
        pause(seconds / self.rate)


class Host:
    """A machine: its processes stand and fall with it."""

    def __init__(self, world: World, name: str, folder: Path) -> None:
        self.world = world
        self.name = name
        self.folder = folder
        self.clock = Clock(world, name)
        self.powered = True
        self.frozen_ns: int | None = None
        self.processes: list[Process] = []
        self.version = 0  # rises with every change that a client may see
        folder.mkdir(parents=True)
        self.clock.boot()

    @property
    def answers(self) -> bool:
        """Whether its kernel answers a packet."""
        return self.powered and self.frozen_ns is None

    def process(self, name: str) -> Process:
        """Return a new process of this machine."""
        made = Process(self.world, f"{self.name} {name}".strip(), self.clock)
        self.processes = [known for known in self.processes if known.alive]
        self.processes.append(made)
        if self.frozen_ns is not None:
            made.stop("machine")
        return made

    def lose_power(self) -> None:
        """Be off; what is on the disk stays."""
        if not self.powered:
            return
        self.powered, self.frozen_ns = False, None
        self.version += 1
        self.world.say(self.name, "loses its power")
        for process in self.processes:
            process.die()

    def freeze(self) -> None:
        """Stand still altogether, as a virtual machine that is paused."""
        if self.answers:
            self.frozen_ns = self.world.now_ns
            self.version += 1
            self.world.say(self.name, "stands still, all of it")
            for process in self.processes:
                process.stop("machine")

    def thaw(self, *, clock_stood: bool) -> None:
        """Go on where it stood."""
        if self.frozen_ns is None:
            return
        if clock_stood:
            self.clock.stood_ns += self.world.now_ns - self.frozen_ns
        self.frozen_ns = None
        self.version += 1
        self.world.say(self.name, "goes on" + (", and its clock where it stood" if clock_stood else ""))
        for process in self.processes:
            process.go_on("machine")


@dataclass
class Disk:
    """What of a NAS outlives its power: volumes, their roles and generations, each change in one step."""

    world: World
    records: dict[UUID, VolumeRecord] = field(default_factory=dict)
    held: dict[UUID, list[m.GenerationFacts]] = field(default_factory=dict)
    content: dict[GenerationId, int] = field(default_factory=dict)
    operational_content: dict[UUID, int] = field(default_factory=dict)
    kind: str = "reflink"
    branches: bool = True
    disk: Path | None = None

    def volumes(self) -> tuple[VolumeRecord, ...]:
        _alive()
        return tuple(self.records.values())

    def unreadable(self) -> tuple[m.Unreadable, ...]:
        return ()

    def free_bytes(self, workspace: Workspace | None = None) -> int:
        return 1 << 40

    def generations(self, volume: UUID) -> tuple[m.GenerationFacts, ...]:
        _alive()
        return tuple(sorted(self.held[volume], key=lambda facts: (facts.id.epoch, facts.id.counter)))

    def set_role(self, volume: UUID, role: m.Role, epoch: int) -> None:
        _takes(self.world, 0.001, 0.02)
        self.records[volume] = dataclasses.replace(self.records[volume], role=role, epoch=epoch)

    def clone_operational(self, volume: UUID, generation: GenerationId) -> None:
        _takes(self.world, 0.05, 0.5)
        self.operational_content[volume] = self.content[generation]

    def take(self, volume: UUID, mount_point: Path | None, facts: m.GenerationFacts) -> float:
        _takes(self.world, 0.01, 0.2)
        self.content[facts.id] = self.operational_content[volume]
        self.held[volume].append(facts)
        return 10.0

    def take_together(self, takes: Sequence[Take]) -> float:
        return max(self.take(take.volume, take.mount_point, take.facts) for take in takes)

    def receive(self, facts: m.GenerationFacts, content: int) -> None:
        """Hold a generation that came whole."""
        _alive()
        self.content[facts.id] = content
        self.held[facts.id.volume].append(facts)

    def drop(self, generation: GenerationId) -> None:
        _takes(self.world, 0.001, 0.05)
        self.held[generation.volume] = [facts for facts in self.held[generation.volume] if facts.id != generation]

    def changed(self, base: GenerationId, target: GenerationId) -> ChangedRuns:
        _takes(self.world, 0.01, 0.2)
        runs = 0 if self.content[base] == self.content[target] else 1
        blocks = np.zeros(runs, dtype=np.uint64)
        return ChangedRuns(blocks, blocks, blocks, np.zeros(runs, dtype=np.bool_))

    def refuse_written(self, generation: GenerationId) -> None:
        _alive()

    @contextmanager
    def operational(self, volume: UUID) -> Iterator[Path]:
        yield Path("/dev/simulated")

    def workspaces(self, volume: UUID) -> tuple[Workspace, ...]:
        return ()

    def exists(self, workspace: Workspace) -> bool:
        return False

    def discard(self, workspace: Workspace) -> None:
        _alive()

    def recover(self) -> None:
        _alive()

    def _not_played(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("no schedule comes to a verb that takes a disk with blocks")

    differential_identity = differential = reading = writing = _not_played
    create = foreign = adopt = remove = refuse_growth = grow = begin = branch = commit = replace = _not_played


class Nas(Host):
    """A NAS: mounts, exports and addresses go with its power, the disk does not."""

    def __init__(self, world: World, name: str, number: int, folder: Path) -> None:
        super().__init__(world, name, folder)
        self.address = f"192.0.2.{10 + number}"
        self.link = Link(1, "eth0", bytes([2, 0, 0, 0, 0, number]))
        self.disk = Disk(world)
        self.mounted: dict[Path, bool] = {}  # mount point: whether it takes writes
        self.shared: dict[str, Path] = {}  # share: its folder
        self.held: set[str] = set()  # service addresses
        self.others: list[Nas] = []
        self.reaches: Callable[[Host, Host], bool] = lambda one, other: True
        self.hears: Callable[[Link, Heard], None] = lambda link, said: None
        self.kernel = Kernel(
            mounts=_Mounts(self),
            addresses=_Addresses(self),
            smb=lambda folder, address, port, guest, more: _Smb(self),
            make_unwritable=self._make_unwritable,
            threads=SimThreads(world),
        )

    def lose_power(self) -> None:
        super().lose_power()
        self.mounted, self.shared, self.held = {}, {}, set()
        shutil.rmtree(self.folder / "run", ignore_errors=True)

    def _make_unwritable(self, mount_point: Path, *, limit_s: float) -> str:
        if mount_point not in self.mounted:
            return "not mounted"
        _takes(self.world, 0.05, 0.9 * limit_s)
        self.changes(lambda: self.mounted.pop(mount_point, None))
        return "unmounted"

    def changes(self, act: Callable[[], object]) -> None:
        """Do what a client may notice."""
        act()
        self.version += 1


@dataclass(frozen=True, slots=True)
class _Mounts:
    nas: Nas

    def is_mounted(self, mount_point: Path) -> bool:
        _alive()
        return mount_point in self.nas.mounted

    def is_writable(self, mount_point: Path) -> bool:
        _alive()
        return self.nas.mounted.get(mount_point, False)

    def device_of(self, mount_point: Path) -> Path | None:
        return Path("/dev/simulated") if mount_point in self.nas.mounted else None

    def mount(self, device: Path, mount_point: Path, kind: FilesystemKind, *, read_only: bool) -> None:
        _takes(self.nas.world, 0.05, 0.6)
        if mount_point in self.nas.mounted:
            raise DeviceBusy(f"{mount_point} is mounted")
        self.nas.changes(lambda: self.nas.mounted.update({mount_point: not read_only}))
        self._written(mount_point)

    def remount(self, mount_point: Path, *, read_only: bool) -> None:
        _takes(self.nas.world, 0.01, 0.2)
        if mount_point in self.nas.mounted:
            self.nas.changes(lambda: self.nas.mounted.update({mount_point: not read_only}))
            self._written(mount_point)

    def unmount(self, mount_point: Path) -> None:
        _takes(self.nas.world, 0.05, 0.6)
        self.nas.changes(lambda: self.nas.mounted.pop(mount_point, None))

    def unmount_below(self, folder: Path) -> None:
        _alive()

    def thaw(self, mount_point: Path) -> bool:
        return False

    def _written(self, mount_point: Path) -> None:
        """Whoever can write writes: what is mounted writable under its own name is another content from now on."""
        for record in self.nas.disk.records.values():
            if mount_point.name == record.name and self.nas.mounted[mount_point]:
                self.nas.disk.operational_content[record.id] = self.nas.world.rng.getrandbits(60)


@dataclass(frozen=True, slots=True)
class _Smb:
    nas: Nas
    protocol: str = "SMB"
    wanted: bool = True

    def shares(self) -> tuple[Share, ...]:
        _alive()
        return tuple(Share(name, path) for name, path in self.nas.shared.items())

    def prepare(self, share: Share, volume: UUID) -> None:
        _alive()

    def open(self, share: Share, volume: UUID) -> None:
        _takes(self.nas.world, 0.05, 0.4)
        self.nas.changes(lambda: self.nas.shared.update({share.name: share.path}))

    def export_all(self, shares: tuple[Share, ...], *, limit_s: float = 20.0) -> None:
        _takes(self.nas.world, 0.05, 0.4)
        self.nas.changes(lambda: setattr(self.nas, "shared", {share.name: share.path for share in shares}))

    def dismiss(self, share: Share) -> None:
        _takes(self.nas.world, 0.01, 0.2)
        self.nas.changes(lambda: self.nas.shared.pop(share.name, None))

    def close(self, share: Share) -> None:
        _alive()

    def follow(self) -> None:
        _takes(self.nas.world, 0.01, 0.3)

    def stop(self, *, limit_s: float = 20.0) -> None:
        _takes(self.nas.world, 0.01, min(0.2, limit_s))
        self.nas.changes(self.nas.shared.clear)

    def is_open(self, share: Share) -> bool:
        return share.name in self.nas.shared

    def problem(self, shares: tuple[Share, ...]) -> LandfallError | None:
        return None


@dataclass(frozen=True, slots=True)
class _Addresses:
    nas: Nas

    def link_with(self, replication_address: str, name: str = "") -> Link:
        _alive()
        return self.nas.link

    def is_held(self, address: Interface) -> bool:
        _alive()
        return str(address.ip) in self.nas.held

    def refuse_taken(self, link: Link, address: Interface) -> None:
        _takes(self.nas.world, 1.2, 1.25)
        for other in self.nas.others:
            reached = self.nas.reaches(self.nas, other) and self.nas.reaches(other, self.nas)
            if str(address.ip) in other.held and other.answers and reached:
                raise AddressTaken(f"{address.ip} is held by another node")

    def add(self, link: Link, address: Interface) -> None:
        _takes(self.nas.world, 0.001, 0.01)
        self.nas.changes(lambda: self.nas.held.add(str(address.ip)))

    def remove(self, address: Interface) -> None:
        _takes(self.nas.world, 0.001, 0.01)
        self.nas.changes(lambda: self.nas.held.discard(str(address.ip)))

    def announce(self, link: Link, address: Interface, claim: Claim) -> None:
        _alive()
        said = Heard(address.ip, link.mac, claim.mark(address.ip, link.mac))
        for other in self.nas.others:
            if other.answers and self.nas.reaches(self.nas, other):
                other.world.after(0.001, lambda other=other: other.hears(other.link, said))  # type: ignore[misc]


def _alive() -> None:
    if not current().process.alive:
        raise KilledError


def _takes(world: World, least_s: float, most_s: float) -> None:
    """Let what the kernel does take its time; what it does comes after that, or not at all if its caller died."""
    _alive()
    pause(world.rng.uniform(least_s, most_s))
