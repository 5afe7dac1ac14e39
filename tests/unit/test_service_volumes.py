"""Verbs on volumes: what a refusal leaves behind, and which names two volumes may have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import cast
from uuid import UUID, uuid4

import pytest

from agent.contract import messages as m
from agent.contract.errors import CommandFailed, NameRefused, NoSuchGeneration, VolumeExists
from agent.contract.identity import FilesystemKind, GenerationKind, empty_generation
from agent.service import serving, volumes
from agent.service.node import Node
from agent.serving.exports import Share
from agent.serving.tenure import Tenures
from agent.volume import filesystem
from agent.volume.substrate import VolumeRecord


class World:
    """A node without devices: what there is, and what is mounted and exported."""

    def __init__(self, folder: Path) -> None:
        self.records: dict[UUID, VolumeRecord] = {}
        self.mounted: set[str] = set()
        self.shared: set[str] = set()
        self.broken = False
        substrate = SimpleNamespace(
            volumes=lambda: tuple(self.records.values()),
            unreadable=lambda: (),
            create=lambda record: self.records.update({record.id: record}),
            remove=self.records.pop,
            operational=self.operational,
            generations=lambda volume: (m.GenerationFacts(empty_generation(volume), GenerationKind.EMPTY, 0),),
        )
        exports = SimpleNamespace(
            open=self.export,
            dismiss=lambda share: self.shared.discard(share.name),
            close=lambda _: None,
            protocols=lambda share: ("SMB",) if share.name in self.shared else (),
        )
        mounts = SimpleNamespace(
            mount=lambda _, mount_point, *__, **___: self.mounted.add(mount_point.name),
            unmount=lambda mount_point: self.mounted.discard(mount_point.name),
            device_of=lambda _: Path("/dev/null"),
        )
        self.node = cast(
            Node,
            SimpleNamespace(
                config=SimpleNamespace(node="nas1", lease_margin_s=10.0),
                substrate=substrate,
                exports=exports,
                machine=SimpleNamespace(mounts=mounts),
                job=self.job,
                tenures=Tenures(folder / "tenure"),
                keeper=SimpleNamespace(folder=folder / "tenure"),
                address_lock=Lock(),
                drop_address=lambda _: None,
                record=lambda volume: self.records[volume],
                serving=lambda record: record.name in self.mounted,
                mount_point=lambda record: folder / record.name,
                share=lambda record: Share(record.name, folder / record.name),
            ),
        )

    @contextmanager
    def job(self, *_: object) -> Iterator[None]:
        yield

    @contextmanager
    def operational(self, _: UUID) -> Iterator[Path]:
        yield Path("/dev/null")

    def export(self, share: Share, _: UUID) -> None:
        if self.broken:
            raise CommandFailed("smbd did not start")
        self.shared.add(share.name)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(volumes, "kind_of", lambda _: None)
    monkeypatch.setattr(filesystem, "make", lambda *_: None)
    monkeypatch.setattr(filesystem, "refuse_unsupported", lambda *_: None)
    return made


def create(world: World, name: str) -> m.VolumeFacts:
    return volumes.create(world.node, m.CreateVolume(uuid4(), name, FilesystemKind.EXT4, 1 << 20, 512, ()), lambda *_: None)


def test_a_volume_that_cannot_be_served_leaves_nothing(world: World) -> None:
    world.broken = True
    with pytest.raises(CommandFailed):
        create(world, "projects")
    assert (world.records, world.mounted, world.shared) == ({}, set(), set())
    world.broken = False
    assert create(world, "projects").serving


def test_two_volumes_are_two_shares(world: World) -> None:
    create(world, "Projects")
    with pytest.raises(VolumeExists):
        create(world, "projects")
    with pytest.raises(NameRefused):
        create(world, "homes")
    assert world.shared == {"Projects"}


def test_a_replica_that_holds_nothing_is_not_promoted(world: World) -> None:
    volume = uuid4()
    volumes.admit(world.node, m.AdmitReplica(volume, "projects", FilesystemKind.XFS, 1 << 30, 512), lambda *_: None)
    with pytest.raises(NoSuchGeneration, match="never replicated"):
        serving.promote(world.node, m.PromoteVolume(volume, 2), lambda *_: None)
    assert world.records[volume].role is m.Role.SECONDARY
