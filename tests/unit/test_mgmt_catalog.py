"""What the management node remembers."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path
from uuid import UUID

import pytest

from agent.contract.errors import ConfigInvalid, NoSuchTransfer, NoSuchVolume, VersionUnknown, VolumeExists
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Deletions, Differential, Notification
from mgmt.catalog import MIGRATIONS, Catalog, TransferEntry, VolumeEntry
from mgmt.determination import AtomicSet, Policy
from tests.unit.mgmt_dmis import BASE, TARGET, TRANSFER, VOLUME
from tests.unit.test_mgmt_report import statement

POLICY = Policy(Deletions.APPLY, (AtomicSet("database", ("db/log", "db/table\udcff")),))
ENTRY = VolumeEntry(VOLUME, "projects", "nas1", "nas2", FilesystemKind.XFS, 1 << 30, POLICY, (("mail", 5), ("db\udcff", 1)))


def test_a_volume_comes_back_as_it_was_also_with_names_that_are_not_utf8(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c")
    catalog.add_volume(ENTRY)
    catalog.close()
    again = Catalog(tmp_path / "c")
    assert again.volume("projects") == again.volume(str(VOLUME)) == ENTRY
    again.set_volume(VolumeEntry(VOLUME, "projects", "nas1", "nas2", FilesystemKind.XFS, 1 << 30))
    assert again.volumes()[0].policy == Policy()
    with pytest.raises(VolumeExists):
        again.add_volume(ENTRY)
    again.forget_volume(VOLUME)
    with pytest.raises(NoSuchVolume):
        again.volume("projects")
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o600


def test_transfers_and_how_they_ended(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c")
    entry = TransferEntry(TRANSFER, VOLUME, BASE, TARGET, Differential.SEND, 5)
    catalog.begin_transfer(entry)
    assert catalog.transfer(TRANSFER) == entry
    catalog.end_transfer(TRANSFER, "interrupted", 9)
    found = catalog.transfer(TRANSFER)
    assert found
    assert (found.ending, found.ended_ns) == ("interrupted", 9)
    catalog.begin_transfer(entry)
    assert catalog.transfer(TRANSFER) == entry
    assert catalog.transfer(UUID(int=0)) is None


def test_a_notification_that_is_read_twice_is_one(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c")
    said = Notification(1, "reception-failure", VOLUME, TRANSFER, 7, "gone")
    assert catalog.store_notifications("nas2", (said,)) == [said]
    assert catalog.store_notifications("nas2", (said,)) == []
    assert catalog.store_notifications("nas1", (said,)) == [said]
    assert len(catalog.notifications(VOLUME, pending_only=True)) == 2
    catalog.mark_handled(TRANSFER)
    assert catalog.notifications(pending_only=True) == []
    assert all(seen.handled for seen in catalog.notifications())


def test_loss_statements_stay_also_when_the_salvage_is_undone(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c")
    made = statement()
    catalog.add_salvage(made)
    assert catalog.newest_salvage(made.volume).statement == made
    catalog.undo_salvage(made.volume, 11)
    assert [entry.undone_ns for entry in catalog.salvages(made.volume)] == [11]
    with pytest.raises(NoSuchTransfer):
        catalog.newest_salvage(made.volume)


def test_F_a_catalog_of_a_newer_release_is_left_alone(tmp_path: Path) -> None:
    Catalog(tmp_path / "c").close()
    with sqlite3.connect(tmp_path / "c") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(VersionUnknown):
        Catalog(tmp_path / "c")


def test_C9_a_catalog_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"not a database, but long enough to look like one" * 50)
    with pytest.raises(ConfigInvalid):
        Catalog(tmp_path / "c")
