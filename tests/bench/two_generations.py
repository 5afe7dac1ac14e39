"""A volume on a pool of its own, filled and changed once: two generations, and what a DMI of them is built from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from agent.contract.identity import FilesystemKind, GenerationId, GenerationKind, next_generation
from agent.contract.messages import GenerationFacts, Role
from agent.differential.build import BuildRequest
from agent.differential.reader import View
from agent.system.clock import wall_ns
from agent.volume import filesystem
from agent.volume.reflink import ReflinkSubstrate
from agent.volume.substrate import VolumeRecord
from tests.bench.workloads import Workload


class TwoGenerations:
    """The volume, not mounted; ``work`` is a folder for all that belongs to it, ``pool`` a mounted filesystem that can clone."""

    def __init__(self, work: Path, pool: Path, kind: FilesystemKind, workload: Workload) -> None:
        self.work, self.kind = work, kind
        self.substrate = ReflinkSubstrate.initialise(pool / "pool")
        self.volume = VolumeRecord(uuid4(), "bench", kind, workload.volume_bytes, 512, Role.PRIMARY, 1)
        self.substrate.create(self.volume)
        with self.substrate.operational(self.volume.id) as device:
            filesystem.make(device, kind)
        self.base = self._next(workload.fill)
        self.target = self._next(lambda root: workload.change(root, 100))

    @contextmanager
    def request(self) -> Iterator[BuildRequest]:
        """Give what the DMI of base and target is built from, both mounted read-only."""
        with ExitStack() as opened:
            base, target = (opened.enter_context(self.viewed(generation)) for generation in (self.base, self.target))
            yield BuildRequest(
                uuid4(), self.base, self.target, 1, 2, self.volume.name, self.volume.size_bytes, 512, self.kind,
                filesystem.mkfs_arguments(target.device, self.kind), self.substrate.differential_identity(self.base),
                base, target, self.substrate.changed(self.base, self.target), self.work / "state",
            )  # fmt: skip

    @contextmanager
    def viewed(self, generation: GenerationId) -> Iterator[View]:
        """Give a generation, mounted read-only."""
        where = self.work / generation.name
        where.mkdir(exist_ok=True)
        with self.substrate.reading(generation) as device:
            filesystem.mount(device, where, self.kind, read_only=True)
            fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield View(device, where, fd)
            finally:
                os.close(fd)
                filesystem.unmount(where)

    def _next(self, act: Callable[[Path], None]) -> GenerationId:
        mount_point = self.work / "op"
        mount_point.mkdir(exist_ok=True)
        with self.substrate.operational(self.volume.id) as device:
            filesystem.mount(device, mount_point, self.kind, read_only=False)
            try:
                act(mount_point)
            finally:
                filesystem.unmount(mount_point)
        counter = self.substrate.generations(self.volume.id)[-1].id.counter
        facts = GenerationFacts(next_generation(self.volume.id, 1, counter), GenerationKind.FROZEN, wall_ns())
        self.substrate.take(self.volume.id, None, facts)
        return facts.id
