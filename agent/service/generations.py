"""Verbs on generations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, LandfallError, RequestRefused
from agent.contract.identity import GenerationId, GenerationKind, next_generation
from agent.differential import build as differential
from agent.differential.reader import View
from agent.service.node import OPENED, Node, ProgressCall, open_mount
from agent.system.clock import wall_ns
from agent.volume import filesystem
from agent.volume.substrate import Take, VolumeRecord


def take(node: Node, arguments: m.TakeGeneration, progress: ProgressCall) -> m.Taken:
    """Freeze, clone, thaw. If we die here the guard thaws, and a generation is held whole or not at all."""
    taken = take_together(node, m.TakeTogether((arguments.volume,)), progress)
    return m.Taken(taken.generations[0], taken.frozen_ms)


def take_together(node: Node, arguments: m.TakeTogether, progress: ProgressCall) -> m.TakenTogether:
    """Freeze all, clone each, thaw all: the generations are of one moment, and say so by one time.

    RequestRefused for a volume that is named twice. If we die here the guards thaw, and each generation is held whole or not at all; of an
    order that failed none is left.
    """
    records = [node.record(volume) for volume in sorted(arguments.volumes)]  # always in one order: two orders cannot wait for each other
    if not records or len({record.id for record in records}) != len(records):
        raise RequestRefused("generations are taken of one volume or several different ones", fix="Name each volume once.")
    with ExitStack() as jobs:
        for record in records:
            jobs.enter_context(node.job(record.id, "generation.take"))
        for record in records:
            if not node.serving(record):
                settle(node, record)
        taken_ns = wall_ns()
        takes = [_of_now(node, record, taken_ns) for record in records]
        try:
            frozen_ms = node.substrate.take_together(takes)
        except BaseException:
            for take in takes:
                with suppress(LandfallError):
                    node.substrate.drop(take.facts.id)
            raise
    by_volume = {take.volume: take.facts for take in takes}
    return m.TakenTogether(tuple(by_volume[volume] for volume in arguments.volumes), frozen_ms)


def _of_now(node: Node, record: VolumeRecord, taken_ns: int) -> Take:
    newest = max(facts.id.counter for facts in node.substrate.generations(record.id))
    facts = m.GenerationFacts(next_generation(record.id, record.epoch, newest), GenerationKind.FROZEN, taken_ns)
    return Take(record.id, node.mount_point(record) if node.serving(record) else None, facts)


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
