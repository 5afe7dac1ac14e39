"""What the management node remembers."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from agent.contract.errors import ConfigInvalid, NoSuchTransfer, NoSuchVolume, VersionUnknown, VolumeExists
from agent.contract.identity import FilesystemKind
from agent.contract.messages import Deletions, Differential, Notification
from mgmt.catalog import MIGRATIONS, Catalog, Hold, TransferEntry, VolumeEntry
from mgmt.determination import AtomicSet, Policy
from mgmt.keep import Keep
from tests.unit.mgmt_dmis import BASE, TARGET, TRANSFER, VOLUME
from tests.unit.test_mgmt_report import statement

POLICY = Policy(Deletions.APPLY, (AtomicSet("database", ("db/log", "db/table\udcff")),))
ENTRY = VolumeEntry(VOLUME, "projects", "nas1", "nas2", FilesystemKind.XFS, 1 << 30, POLICY, (("mail", 5), ("db\udcff", 1)))
ENTRY = replace(ENTRY, epoch=3, address="192.0.2.100/24", schedule="hourly", keep=Keep(last=4, daily=7))


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


def test_what_is_said_again_and_again_is_one_entry_of_the_history(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c")
    for at_ns in (1, 2, 3):
        catalog.note(VOLUME, "cycle", "Waits until noon.", at_ns)
    catalog.note(VOLUME, "failover", "nas2 serves it.", 4, {"rto_s": 3.5})
    catalog.note(VOLUME, "cycle", "Waits until noon.", 5)
    catalog.note(VOLUME, "cycle", "Replicated.", 6)
    found = catalog.history(VOLUME)
    assert [(entry.kind, entry.sentence, entry.at_ns, entry.last_ns, entry.times) for entry in found] == [
        ("cycle", "Waits until noon.", 1, 5, 4),
        ("failover", "nas2 serves it.", 4, 4, 1),
        ("cycle", "Replicated.", 6, 6, 1),
    ]
    assert catalog.history(VOLUME, kind="failover")[0].facts == {"rto_s": 3.5}
    assert [entry.sentence for entry in catalog.history(VOLUME, newest=1)] == ["Replicated."]


def test_holds_are_laid_and_released(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c")
    catalog.add_volume(ENTRY)
    catalog.hold(VOLUME, Hold("g1", "audit", 5))
    catalog.hold(VOLUME, Hold("g1", "audit of 2026", 6))
    assert catalog.holds(VOLUME) == [Hold("g1", "audit of 2026", 6)]
    assert catalog.release(VOLUME, "g1")
    assert not catalog.release(VOLUME, "g1")


def test_a_catalog_of_the_first_version_is_brought_to_this_one(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "c")
    old.executescript(
        MIGRATIONS[0] + f"INSERT INTO volume VALUES ('{VOLUME}', 'projects', 'nas1', 'nas2', 'xfs', 1, 'hold'); PRAGMA user_version = 1;"
    )
    old.close()
    assert Catalog(tmp_path / "c").volumes() == [VolumeEntry(VOLUME, "projects", "nas1", "nas2", FilesystemKind.XFS, 1)]


def test_a_second_connection_of_a_process_does_not_end_the_locks_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "c"
    first = Catalog(path)
    first.note(VOLUME, "cycle", "The first.", 1)
    Catalog(path).close()
    # Another process that believes itself alone would take the log away when it leaves, and what is said afterwards would be lost.
    script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('SELECT count(*) FROM history').fetchone(); db.close()"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60)
    first.note(VOLUME, "cycle", "The second.", 2)
    script = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM history').fetchone()[0])"
    seen = subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=60, capture_output=True, text=True)
    assert seen.stdout.strip() == "2"
