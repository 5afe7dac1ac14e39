"""Verbs on generations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy
from agent.contract.identity import GenerationId, GenerationKind, next_generation
from agent.differential import build as differential
from agent.differential.reader import View
from agent.service.node import OPENED, Node, ProgressCall, open_mount
from agent.system.clock import wall_ns
from agent.volume import filesystem
from agent.volume.substrate import VolumeRecord


def take(node: Node, arguments: m.TakeGeneration, progress: ProgressCall) -> m.Taken:
    """Freeze, clone, thaw. If we die here the guard thaws, and a generation is held whole or not at all."""
    record = node.record(arguments.volume)
    with node.job(record.id, "generation.take"):
        newest = max(facts.id.counter for facts in node.substrate.generations(record.id))
        facts = m.GenerationFacts(next_generation(record.id, record.epoch, newest), GenerationKind.FROZEN, wall_ns())
        mount_point = node.mount_point(record) if node.serving(record) else None
        if mount_point is None:
            settle(node, record)
        frozen_ms = node.substrate.take(record.id, mount_point, facts)
    return m.Taken(facts, frozen_ms)


def drop(node: Node, arguments: m.DropGeneration, progress: ProgressCall) -> m.Done:
    """Give up a generation and what was derived from it; DeviceBusy while a transfer needs it."""
    with node.job(arguments.generation.volume, "generation.drop"):
        node.generation(arguments.generation)
        for transfer in map(node.store.load, node.store.list()):
            if transfer.state is not m.TransferState.COMMITTED and arguments.generation in (transfer.base, transfer.target):
                raise DeviceBusy(f"transfer {transfer.id} needs generation {arguments.generation.name}", fix="Discard the transfer first.")
        node.substrate.drop(arguments.generation)
        differential.drop(node.differential_state(arguments.generation.volume), arguments.generation)
    return m.Done()


def open_generation(node: Node, arguments: m.OpenGeneration, progress: ProgressCall) -> m.Opened:
    """Mount a generation read-only; asked twice, once."""
    record = node.record(arguments.generation.volume)
    node.generation(arguments.generation)
    mount_point = _opened_at(node, arguments.generation)
    if not filesystem.is_mounted(mount_point):
        with node.substrate.reading(arguments.generation) as device:
            filesystem.mount(device, mount_point, record.filesystem, read_only=True)
    return m.Opened(str(mount_point))


def close_generation(node: Node, arguments: m.CloseGeneration, progress: ProgressCall) -> m.Done:
    """Unmount what ``open_generation`` mounted."""
    mount_point = _opened_at(node, arguments.generation)
    if filesystem.is_mounted(mount_point):
        filesystem.unmount(mount_point)
    return m.Done()


@contextmanager
def view(node: Node, record: VolumeRecord, generation: GenerationId, purpose: str) -> Iterator[View]:
    """Yield a generation's device and read-only mount, in the private folder of one ``purpose``."""
    mount_point = node.private_folder(purpose, f"{record.id}-{generation.name}")
    with node.substrate.reading(generation) as device:
        filesystem.mount(device, mount_point, record.filesystem, read_only=True)
        try:
            with open_mount(mount_point) as mount_fd:
                yield View(device, mount_point, mount_fd)
        finally:
            filesystem.unmount(mount_point)


def settle(node: Node, record: VolumeRecord) -> None:
    """Let the filesystem of a volume that is not mounted replay its journal: after a crash the device alone is not what it holds."""
    mount_point = node.private_folder("settle", str(record.id))
    with node.substrate.operational(record.id) as device:
        node.machine.mounts.mount(device, mount_point, record.filesystem, read_only=False)
    node.machine.mounts.unmount(mount_point)


def _opened_at(node: Node, generation: GenerationId) -> Path:
    return node.private_folder(OPENED, f"{generation.volume}-{generation.name}")
