"""What the verbs work on: the node's configuration, substrate, transfers, outbox and exports, and one job per volume at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Protocol
from uuid import UUID

from agent.config import Config
from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, NoSuchGeneration, NoSuchVolume, NotOurs, TransferBusy
from agent.contract.identity import GenerationId
from agent.recovery.rescue import FileReceiver
from agent.service.outbox import Outbox
from agent.service.term import Term
from agent.serving import address as addresses
from agent.serving import keeper
from agent.serving.address import Interface
from agent.serving.exports import Exports, Share
from agent.serving.keeper import KeeperOrder
from agent.serving.machine import Machine
from agent.serving.nfs import Nfs
from agent.serving.tenure import Tenures
from agent.system import files
from agent.system.failpoint import failpoint
from agent.system.neighbour import Link
from agent.transfer.store import TransferStore
from agent.volume.lvm_snapshot import LvmSnapshotSubstrate
from agent.volume.lvm_thin import LvmThinSubstrate
from agent.volume.reflink import ReflinkSubstrate
from agent.volume.substrate import Substrate, VolumeRecord
from agent.volume.watch import DeviceWatch

OPENED = "opened"
"""The private folder of generations that are mounted for somebody to look into."""

ProgressCall = Callable[[str, int, int], None]
"""Called with a step's name, how much is done and how much there is."""


class Reception(Protocol):
    """A reception that runs on after its verb was answered."""

    def cancel(self) -> None:
        """End it soon; what it had made durable stays."""

    def give_way(self) -> None:
        """End it now, for another reception of the same transfer."""


class Node:
    """One NAS node as its agent sees it."""

    def __init__(
        self,
        config: Config,
        machine: Machine | None = None,
        *,
        substrate: Substrate | None = None,
        keep: Callable[[KeeperOrder], None] = keeper.ensure,
    ) -> None:
        """Without more, the node is this machine; ``keep`` sees to it that a keeper is at work."""
        for folder in (config.state_dir, config.run_dir, config.mount_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.config = config
        self.machine = machine or Machine()
        self.substrate = substrate or _substrate(config)
        for folder in (config.state_dir / "differential").glob("*"):
            files.sweep(folder)
        self.store = TransferStore(config.state_dir / "transfers")
        self.outbox = Outbox(config.state_dir / "outbox")
        self.tenures = Tenures(config.run_dir / "tenure")
        folder, address, guest = config.run_dir / "samba", config.replication_address, config.smb_guest or config.lab
        nfs = Nfs(config.run_dir / "nfs", config.nfs_clients, config.nfs_security, config.nfs_squash)
        self.exports = Exports((self.machine.smb(folder, address, config.smb_port, guest, self._service_addresses), nfs))
        self.keeper = KeeperOrder(
            str(config.run_dir / "tenure"),
            str(config.mount_dir),
            str(folder),
            address,
            config.smb_port,
            guest,
            str(nfs.folder),
            nfs.clients,
            config.lease_margin_s,
        )
        self.keep = keep
        self.address_lock = self.machine.threads.lock()
        self.ending = self.machine.threads.event()
        self.term = Term(config.state_dir / "term")
        self.receptions: dict[UUID, Reception] = {}
        self.rescues: dict[UUID, FileReceiver] = {}
        self.watch: DeviceWatch | None = None
        self._jobs: dict[UUID, str] = {}
        self._lock = threading.Lock()

    def facts(self) -> m.NodeFacts:
        """Return who this node is."""
        return m.NodeFacts(self.config.node, version("landfall"), m.PROTOCOL, self.config.lab, (self.substrate.kind,), self.term.highest)

    def record(self, volume: UUID) -> VolumeRecord:
        """Return a volume's record; NoSuchVolume if it is not held here, NotOurs if it cannot be read."""
        for record in self.substrate.volumes():
            if record.id == volume:
                return record
        for found in self.substrate.unreadable():
            if found.volume == volume:
                raise NotOurs(f"the record of volume {volume} cannot be read", cause=f"{found.where}: {found.reason}")
        raise NoSuchVolume(f"node {self.config.node} holds no volume {volume}")

    def generation(self, wanted: GenerationId) -> m.GenerationFacts:
        """Return the facts of a generation; NoSuchGeneration unless all four parts of its identity match one held here."""
        self.record(wanted.volume)
        for facts in self.substrate.generations(wanted.volume):
            if facts.id == wanted:
                return facts
        raise NoSuchGeneration(f"node {self.config.node} does not hold generation {wanted.name} of volume {wanted.volume}")

    def mount_point(self, record: VolumeRecord) -> Path:
        """Return where a volume is mounted while this node serves it."""
        return self.config.mount_dir / record.name

    def share(self, record: VolumeRecord) -> Share:
        """Return what clients see of a volume."""
        return Share(record.name, self.mount_point(record))

    def serving(self, record: VolumeRecord) -> bool:
        """Whether this node has the volume mounted for clients."""
        return self.machine.mounts.is_mounted(self.mount_point(record))

    def private_folder(self, *parts: str) -> Path:
        """Return a folder of our own, 0700, for mounts nobody else should see."""
        folder = self.config.run_dir.joinpath("private", *parts)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def differential_state(self, volume: UUID) -> Path:
        """Where the digest tables and name indexes of a volume's generations lie."""
        folder = self.config.state_dir / "differential" / str(volume)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def link(self) -> Link:
        """Return the interface of the service addresses; CommandFailed if it is missing."""
        return self.machine.addresses.link_with(self.config.replication_address, self.config.service_interface)

    def drop_address(self, record: VolumeRecord, address: Interface | None = None) -> None:
        """Have the address of a volume no more, or the one named. If we die after it is gone, it is recorded still, and dropped again."""
        tenure = self.tenures.of(record.id)
        recorded = addresses.parse(tenure.address) if tenure is not None and tenure.address else None
        wanted = address or recorded
        if wanted is None:
            return
        failpoint("address.before_drop")
        self.machine.addresses.remove(wanted)
        failpoint("address.after_drop")
        if tenure is not None and recorded == wanted:
            self.tenures.have_address(record.id, record.name, tenure.epoch, "")

    def _service_addresses(self) -> tuple[str, ...]:
        return tuple(str(addresses.parse(tenure.address).ip) for tenure in self.tenures.all() if tenure.address)

    @contextmanager
    def job(self, volume: UUID, what: str) -> Iterator[None]:
        """Hold the volume for one job; TransferBusy names the other that has it."""
        self.claim(volume, what)
        try:
            yield
        finally:
            self.release(volume)

    def claim(self, volume: UUID, what: str) -> None:
        """Hold the volume until ``release``; for jobs that run on in the background."""
        with self._lock:
            if holder := self._jobs.get(volume):
                raise TransferBusy(f"volume {volume} is busy: {holder}")
            self._jobs[volume] = what

    def release(self, volume: UUID) -> None:
        """Let go of a volume."""
        with self._lock:
            self._jobs.pop(volume, None)

    def recover(self) -> None:
        """Thaw, unmount private leftovers, let the substrate finish or sweep; idempotent.

        An opened generation that somebody is looking into stays open: it is read-only, and ``generation.close`` ends it.
        """
        for record in self.substrate.volumes():
            if self.serving(record):
                self.machine.mounts.thaw(self.mount_point(record))
        for folder in self.config.run_dir.glob("private/*"):
            with suppress(*([DeviceBusy] if folder.name == OPENED else [])):
                self.machine.mounts.unmount_below(folder)
        self.tenures.recover()
        self.substrate.recover()

    def close(self) -> None:
        """End background jobs; clients keep their exports."""
        if self.watch is not None:
            self.watch.close()
        for running in list(self.receptions.values()):
            running.cancel()
        for rescue in list(self.rescues.values()):
            rescue.cancel()
        self.ending.set()


def _substrate(config: Config) -> Substrate:
    match config.substrate:
        case LvmThinSubstrate.kind:
            return LvmThinSubstrate.initialise(config.volume_group)
        case LvmSnapshotSubstrate.kind:
            return LvmSnapshotSubstrate(config.volume_group, snapshot_percent=config.snapshot_percent)
        case _:
            return ReflinkSubstrate.initialise(config.pool_dir)


@contextmanager
def open_mount(mount_point: Path) -> Iterator[int]:
    """Yield a descriptor of the root of a mount."""
    mount_fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield mount_fd
    finally:
        os.close(mount_fd)
