"""What the management node remembers, in SQLite: volumes and their policies, transfers, notifications seen, salvages.

It is never trusted over the agents: which generations and transfers there are is asked of them each time. What stands here is what
only the management node knows (who replicates to whom, what the administrator laid down) and what must outlive the nodes
(notifications, loss statements). Every change is one transaction; the file is 0600.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from agent.contract.errors import ConfigInvalid, NoSuchTransfer, NoSuchVolume, VersionUnknown, VolumeExists
from agent.contract.identity import FilesystemKind, GenerationId
from agent.contract.messages import Deletions, Differential, Notification, from_document, to_document
from mgmt.determination import AtomicSet, Policy
from mgmt.keep import Keep
from mgmt.report import LossStatement
from mgmt.view import from_json, to_json

MIGRATIONS: Final = (
    """
    CREATE TABLE volume (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, primary_node TEXT NOT NULL, secondary_node TEXT NOT NULL,
        filesystem TEXT NOT NULL, size_bytes INTEGER NOT NULL, deletions TEXT NOT NULL
    ) STRICT;
    CREATE TABLE priority (
        volume TEXT NOT NULL REFERENCES volume ON DELETE CASCADE, prefix TEXT NOT NULL, level INTEGER NOT NULL,
        PRIMARY KEY (volume, prefix)
    ) STRICT;
    CREATE TABLE atomic_set (
        volume TEXT NOT NULL REFERENCES volume ON DELETE CASCADE, name TEXT NOT NULL, pattern TEXT NOT NULL,
        PRIMARY KEY (volume, name, pattern)
    ) STRICT;
    CREATE TABLE transfer (
        id TEXT PRIMARY KEY, volume TEXT NOT NULL, base TEXT NOT NULL, target TEXT NOT NULL, differential TEXT NOT NULL,
        begun_ns INTEGER NOT NULL, ended_ns INTEGER, ending TEXT NOT NULL DEFAULT ''
    ) STRICT;
    CREATE TABLE notification (
        node TEXT NOT NULL, sequence INTEGER NOT NULL, at_ns INTEGER NOT NULL, kind TEXT NOT NULL, volume TEXT NOT NULL,
        transfer TEXT, message TEXT NOT NULL, handled INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (node, sequence, at_ns)
    ) STRICT;
    CREATE TABLE salvage (
        number INTEGER PRIMARY KEY, transfer TEXT NOT NULL, volume TEXT NOT NULL, at_ns INTEGER NOT NULL,
        statement TEXT NOT NULL, undone_ns INTEGER
    ) STRICT;
    """,
    """
    ALTER TABLE volume ADD COLUMN epoch INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE volume ADD COLUMN address TEXT NOT NULL DEFAULT '';
    ALTER TABLE volume ADD COLUMN schedule TEXT NOT NULL DEFAULT '';
    ALTER TABLE volume ADD COLUMN keep TEXT NOT NULL DEFAULT '';
    CREATE TABLE hold (
        volume TEXT NOT NULL REFERENCES volume ON DELETE CASCADE, generation TEXT NOT NULL, reason TEXT NOT NULL, at_ns INTEGER NOT NULL,
        PRIMARY KEY (volume, generation)
    ) STRICT;
    CREATE TABLE history (
        number INTEGER PRIMARY KEY, volume TEXT NOT NULL, kind TEXT NOT NULL, sentence TEXT NOT NULL, facts TEXT NOT NULL,
        at_ns INTEGER NOT NULL, last_ns INTEGER NOT NULL, times INTEGER NOT NULL DEFAULT 1
    ) STRICT;
    CREATE INDEX history_of_volume ON history (volume, number);
    """,
    """
    CREATE TABLE term (number INTEGER NOT NULL) STRICT;
    INSERT INTO term VALUES (1);
    """,
    """
    CREATE TABLE failover (
        id TEXT PRIMARY KEY, volume TEXT NOT NULL, plan TEXT NOT NULL, operator TEXT NOT NULL, lost_ns INTEGER NOT NULL,
        begun_ns INTEGER NOT NULL, ended_ns INTEGER, ending TEXT NOT NULL DEFAULT ''
    ) STRICT;
    CREATE UNIQUE INDEX one_open_failover ON failover (volume) WHERE ended_ns IS NULL;
    CREATE TABLE failover_step (
        failover TEXT NOT NULL REFERENCES failover ON DELETE CASCADE, step TEXT NOT NULL, begun_ns INTEGER NOT NULL, ended_ns INTEGER,
        facts TEXT NOT NULL DEFAULT '{}', PRIMARY KEY (failover, step)
    ) STRICT;
    CREATE TABLE fence (
        number INTEGER PRIMARY KEY, volume TEXT NOT NULL, node TEXT NOT NULL, epoch INTEGER NOT NULL, agent TEXT NOT NULL,
        code INTEGER NOT NULL, proved INTEGER NOT NULL, words TEXT NOT NULL, at_ns INTEGER NOT NULL, seconds REAL NOT NULL
    ) STRICT;
    CREATE TABLE split_brain (
        volume TEXT PRIMARY KEY REFERENCES volume ON DELETE CASCADE, node TEXT NOT NULL, epoch INTEGER NOT NULL, at_ns INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE lease (
        volume TEXT NOT NULL REFERENCES volume ON DELETE CASCADE, node TEXT NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (volume, node)
    ) STRICT;
    """,
    """
    ALTER TABLE lease ADD COLUMN term INTEGER NOT NULL DEFAULT 0;
    """,
    """
    ALTER TABLE volume ADD COLUMN together TEXT NOT NULL DEFAULT '';
    """,
)
"""Each takes the catalog from the version that is its index to the next."""


@dataclass(frozen=True, slots=True)
class VolumeEntry:
    """A volume, its two nodes and what the administrator laid down for it."""

    id: UUID
    name: str
    primary: str
    secondary: str
    filesystem: FilesystemKind
    size_bytes: int
    policy: Policy = field(default_factory=Policy)
    priorities: tuple[tuple[str, int], ...] = ()  # (path prefix, higher is earlier)
    epoch: int = 1  # the highest that an agent was seen with
    address: str = ""  # where clients find it, such as 192.0.2.100/24
    schedule: str = ""  # when it is replicated, in systemd's calendar syntax; empty: when somebody says so
    keep: Keep = field(default_factory=Keep)
    together: str = ""  # those of one name and one primary are replicated together when one of them is due; empty: it is by itself


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """Something that was done for a volume, or not done, in one sentence. Said again and again, it is one entry of many ``times``."""

    volume: UUID
    kind: str  # cycle, failover, failback, drill ...
    sentence: str
    facts: dict[str, Any]
    at_ns: int
    last_ns: int
    times: int = 1


@dataclass(frozen=True, slots=True)
class Hold:
    """A generation that retention must not let go, and why."""

    generation: str  # its name
    reason: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class TransferEntry:
    """A transfer that the management node ordered. ``ending`` is committed, interrupted, primary-lost, salvaged, discarded or empty."""

    id: UUID
    volume: UUID
    base: GenerationId
    target: GenerationId
    differential: Differential
    begun_ns: int
    ended_ns: int | None = None
    ending: str = ""


@dataclass(frozen=True, slots=True)
class SeenNotification:
    """A notification as it was stored; ``handled`` once a resume, salvage or discard answered it."""

    node: str
    notification: Notification
    handled: bool


@dataclass(frozen=True, slots=True)
class SalvageEntry:
    """A salvage and its loss statement."""

    transfer: UUID
    volume: UUID
    at_ns: int
    statement: LossStatement
    undone_ns: int | None


class Catalog:
    """The catalog in ``path``, made or brought to this release's version when it is opened."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            # Made, never opened: whoever closes the file by itself ends the locks that this process's other connections hold on it
            # (sqlite.org/howtocorrupt.html, 2.2), and the next process to come takes their log away under them.
            os.mknod(path, 0o600)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30.0, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._migrate()
        except sqlite3.DatabaseError as error:
            raise ConfigInvalid(
                f"the catalog {path} cannot be used", cause=str(error), fix="Restore it, or move it away: agents know."
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # --- volumes ---

    def add_volume(self, entry: VolumeEntry) -> None:
        """Record a volume; VolumeExists if the name is taken."""
        row = (str(entry.id), entry.name, entry.primary, entry.secondary, entry.filesystem.value, entry.size_bytes)
        try:
            with self.change() as db:
                db.execute("INSERT INTO volume VALUES (?, ?, ?, ?, ?, ?, '', 1, '', '', '', '')", row)
                self._set_rules(db, entry)
        except sqlite3.IntegrityError as error:
            raise VolumeExists(f"there is a volume {entry.name} already") from error

    def set_volume(self, entry: VolumeEntry) -> None:
        """Replace all that is recorded of a volume but its identity, filesystem and size."""
        with self.change() as db:
            for table in ("priority", "atomic_set"):
                db.execute(f"DELETE FROM {table} WHERE volume = ?", (str(entry.id),))  # noqa: S608 - a name of ours
            self._set_rules(db, entry)

    def grow_volume(self, volume: UUID, size_bytes: int) -> None:
        """Record a volume's new size."""
        with self.change() as db:
            db.execute("UPDATE volume SET size_bytes = ? WHERE id = ?", (size_bytes, str(volume)))

    def forget_volume(self, volume: UUID) -> None:
        """Remove a volume that came to nothing."""
        with self.change() as db:
            db.execute("DELETE FROM volume WHERE id = ?", (str(volume),))

    def volume(self, name: str) -> VolumeEntry:
        """Return a volume by name or UUID; NoSuchVolume."""
        for entry in self.volumes():
            if name in {entry.name, str(entry.id)}:
                return entry
        raise NoSuchVolume(f"there is no volume {name!r}")

    def volumes(self) -> list[VolumeEntry]:
        """Return all volumes by name."""
        return [self._volume(row) for row in self._db.execute("SELECT * FROM volume ORDER BY name").fetchall()]

    def _volume(self, row: tuple[str, str, str, str, str, int, str, int, str, str, str, str]) -> VolumeEntry:
        number, name, primary, secondary, filesystem, size_bytes, deletions, epoch, address, schedule, keep, together = row
        priorities = self._db.execute("SELECT prefix, level FROM priority WHERE volume = ? ORDER BY level DESC, prefix", (number,))
        patterns: dict[str, list[str]] = {}
        for atomic, pattern in self._db.execute("SELECT name, pattern FROM atomic_set WHERE volume = ? ORDER BY name, pattern", (number,)):
            patterns.setdefault(_text(atomic), []).append(_text(pattern))
        sets = tuple(AtomicSet(atomic, tuple(listed)) for atomic, listed in patterns.items())
        return VolumeEntry(
            UUID(number),
            name,
            primary,
            secondary,
            FilesystemKind(filesystem),
            size_bytes,
            Policy(Deletions(deletions), sets),
            tuple((_text(prefix), level) for prefix, level in priorities),
            epoch,
            address,
            schedule,
            Keep.parse(keep),
            together,
        )

    @staticmethod
    def _set_rules(db: sqlite3.Connection, entry: VolumeEntry) -> None:
        number = str(entry.id)
        laid_down = {
            "primary_node": entry.primary,
            "secondary_node": entry.secondary,
            "deletions": entry.policy.deletions.value,
            "epoch": entry.epoch,
            "address": entry.address,
            "schedule": entry.schedule,
            "keep": str(entry.keep),
            "together": entry.together,
        }
        columns = ", ".join(f"{column} = ?" for column in laid_down)
        db.execute(f"UPDATE volume SET {columns} WHERE id = ?", (*laid_down.values(), number))  # noqa: S608 - names of ours
        db.executemany("INSERT INTO priority VALUES (?, ?, ?)", [(number, _stored(prefix), level) for prefix, level in entry.priorities])
        rows = [(number, _stored(atomic.name), _stored(pattern)) for atomic in entry.policy.atomic_sets for pattern in atomic.patterns]
        db.executemany("INSERT OR IGNORE INTO atomic_set VALUES (?, ?, ?)", rows)

    # --- holds ---

    def hold(self, volume: UUID, held: Hold) -> None:
        """Record that a generation is not to be let go; said again, the new reason counts."""
        with self.change() as db:
            db.execute("INSERT OR REPLACE INTO hold VALUES (?, ?, ?, ?)", (str(volume), held.generation, held.reason, held.at_ns))

    def release(self, volume: UUID, generation: str) -> bool:
        """Forget a hold; whether there was one."""
        with self.change() as db:
            return bool(db.execute("DELETE FROM hold WHERE volume = ? AND generation = ?", (str(volume), generation)).rowcount)

    def holds(self, volume: UUID) -> list[Hold]:
        """Return the holds of a volume by generation."""
        rows = self._db.execute("SELECT generation, reason, at_ns FROM hold WHERE volume = ? ORDER BY generation", (str(volume),))
        return [Hold(*row) for row in rows]

    # --- history ---

    def note(self, volume: UUID, kind: str, sentence: str, at_ns: int, facts: dict[str, Any] | None = None) -> None:
        """Add to a volume's history; what its newest entry of this kind says already is counted there."""
        document = json.dumps(facts or {}, sort_keys=True)
        with self.change() as db:
            newest = db.execute(
                "SELECT number, sentence, facts FROM history WHERE volume = ? AND kind = ? ORDER BY number DESC LIMIT 1",
                (str(volume), kind),
            ).fetchone()
            if newest is not None and newest[1:] == (sentence, document):
                db.execute("UPDATE history SET last_ns = ?, times = times + 1 WHERE number = ?", (at_ns, newest[0]))
            else:
                row = (str(volume), kind, sentence, document, at_ns, at_ns)
                db.execute("INSERT INTO history (volume, kind, sentence, facts, at_ns, last_ns) VALUES (?, ?, ?, ?, ?, ?)", row)

    def history(self, volume: UUID, *, kind: str | None = None, newest: int = 100) -> list[HistoryEntry]:
        """Return the newest entries of a volume's history, oldest first."""
        rows = self._db.execute(
            "SELECT volume, kind, sentence, facts, at_ns, last_ns, times FROM history "
            "WHERE volume = ?1 AND (?2 IS NULL OR kind = ?2) ORDER BY number DESC LIMIT ?3",
            (str(volume), kind, newest),
        ).fetchall()
        return [
            HistoryEntry(UUID(about), said, sentence, json.loads(facts), *when) for about, said, sentence, facts, *when in reversed(rows)
        ]

    # --- who may write ---

    def note_split_brain(self, volume: UUID, node: str, epoch: int, at_ns: int) -> None:
        """Record that a volume was promoted at ``epoch`` without proof that ``node`` cannot write."""
        with self.change() as db:
            db.execute("INSERT OR REPLACE INTO split_brain VALUES (?, ?, ?, ?)", (str(volume), node, epoch, at_ns))

    def end_split_brain(self, volume: UUID) -> None:
        """Forget a split brain: what the other node held is kept, and it follows again."""
        with self.change() as db:
            db.execute("DELETE FROM split_brain WHERE volume = ?", (str(volume),))

    def split_brain(self, volume: UUID) -> str | None:
        """Return the node of which nothing proved that it could not write; None if there is no split brain."""
        return next((node for (node,) in self.rows("SELECT node FROM split_brain WHERE volume = ?", str(volume))), None)

    def failover_open(self, volume: UUID) -> bool:
        """Whether a failover of the volume is under way, or was broken off."""
        return bool(self.rows("SELECT 1 FROM failover WHERE volume = ? AND ended_ns IS NULL", str(volume)))

    def note_lease(self, volume: UUID, node: str, seconds: float) -> None:
        """Record, before it is asked for, that a node may have a lease of this length: a fence that waits leases out has to know."""
        with self.change() as db:
            db.execute(
                "INSERT INTO lease (volume, node, seconds) VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET seconds = max(seconds, excluded.seconds)",
                (str(volume), node, seconds),
            )

    def note_leased(self, volume: UUID, node: str, term: int) -> None:
        """Record that a node said, ordered in ``term``, that it serves under the lease that was noted."""
        with self.change() as db:
            db.execute("UPDATE lease SET term = ? WHERE volume = ? AND node = ?", (term, str(volume), node))

    def forget_lease(self, volume: UUID, node: str) -> None:
        """Record, before it is ordered, that a node may serve without a lease."""
        with self.change() as db:
            db.execute("DELETE FROM lease WHERE volume = ? AND node = ?", (str(volume), node))

    def lease(self, volume: UUID, node: str) -> float:
        """Return the seconds of the longest lease that a node may have; 0 unless it said, in the term of now, that it serves under one."""
        query = "SELECT seconds FROM lease WHERE volume = ? AND node = ? AND term = (SELECT number FROM term)"
        return next((seconds for (seconds,) in self.rows(query, str(volume), node)), 0.0)

    # --- transfers ---

    def begin_transfer(self, entry: TransferEntry) -> None:
        """Record a transfer before anything of it is ordered; a known one is begun again."""
        base, target = (json.dumps(to_document(generation)) for generation in (entry.base, entry.target))
        with self.change() as db:
            db.execute(
                "INSERT INTO transfer VALUES (?, ?, ?, ?, ?, ?, NULL, '') ON CONFLICT (id) DO UPDATE SET ended_ns = NULL, ending = ''",
                (str(entry.id), str(entry.volume), base, target, entry.differential.value, entry.begun_ns),
            )

    def end_transfer(self, transfer: UUID, ending: str, at_ns: int) -> None:
        """Record how a session of a transfer ended."""
        with self.change() as db:
            db.execute("UPDATE transfer SET ended_ns = ?, ending = ? WHERE id = ?", (at_ns, ending, str(transfer)))

    def transfer(self, transfer: UUID) -> TransferEntry | None:
        """Return what is recorded of a transfer."""
        row = self._db.execute("SELECT * FROM transfer WHERE id = ?", (str(transfer),)).fetchone()
        if row is None:
            return None
        return _transfer(row)

    def transfers(self, volume: UUID) -> list[TransferEntry]:
        """Return what is recorded of a volume's transfers, oldest first."""
        rows = self._db.execute("SELECT * FROM transfer WHERE volume = ? ORDER BY begun_ns", (str(volume),))
        return [_transfer(row) for row in rows]

    def last_begun_ns(self, volume: UUID) -> int | None:
        """Return when a transfer of a volume was begun last; None if none ever was."""
        (found,) = self._db.execute("SELECT max(begun_ns) FROM transfer WHERE volume = ?", (str(volume),)).fetchone()
        return None if found is None else int(found)

    def last_committed_ns(self, volume: UUID) -> int | None:
        """Return when a transfer of a volume was committed last; None if none ever was."""
        row = self._db.execute("SELECT max(ended_ns) FROM transfer WHERE volume = ? AND ending = 'committed'", (str(volume),)).fetchone()
        return None if row[0] is None else int(row[0])

    # --- notifications ---

    def store_notifications(self, node: str, notifications: tuple[Notification, ...]) -> list[Notification]:
        """Keep what an agent said, durable on return; return those that are new here."""
        new = []
        with self.change() as db:
            for said in notifications:
                row = (
                    node,
                    said.sequence,
                    said.at_ns,
                    said.kind,
                    str(said.volume),
                    str(said.transfer) if said.transfer else None,
                    said.message,
                )
                if db.execute("INSERT OR IGNORE INTO notification VALUES (?, ?, ?, ?, ?, ?, ?, 0)", row).rowcount:
                    new.append(said)
        return new

    def notifications(self, volume: UUID | None = None, *, pending_only: bool = False) -> list[SeenNotification]:
        """Return the notifications of a volume, or all, oldest first."""
        rows = self._db.execute(
            "SELECT node, sequence, kind, volume, transfer, at_ns, message, handled FROM notification "
            "WHERE (?1 IS NULL OR volume = ?1) AND (NOT ?2 OR NOT handled) ORDER BY at_ns, node, sequence",
            (str(volume) if volume else None, pending_only),
        )
        return [
            SeenNotification(
                node, Notification(number, kind, UUID(about), UUID(transfer) if transfer else None, at_ns, message), bool(handled)
            )
            for node, number, kind, about, transfer, at_ns, message, handled in rows
        ]

    def mark_handled(self, transfer: UUID) -> None:
        """Note that what was said of a transfer has been answered."""
        with self.change() as db:
            db.execute("UPDATE notification SET handled = 1 WHERE transfer = ?", (str(transfer),))

    def mark_over(self, node: str, volume: UUID, kind: str) -> None:
        """Note that what a node said of a volume, in notifications of one kind, is not so any more."""
        with self.change() as db:
            db.execute("UPDATE notification SET handled = 1 WHERE node = ? AND volume = ? AND kind = ?", (node, str(volume), kind))

    # --- salvages ---

    def add_salvage(self, statement: LossStatement) -> None:
        """Keep a loss statement."""
        row = (str(statement.transfer), str(statement.volume), statement.circumstances.at_ns, to_json(statement))
        with self.change() as db:
            db.execute("INSERT INTO salvage (transfer, volume, at_ns, statement) VALUES (?, ?, ?, ?)", row)

    def undo_salvage(self, volume: UUID, at_ns: int) -> None:
        """Note that the newest salvage of a volume was undone; its statement stays."""
        with self.change() as db:
            db.execute(
                "UPDATE salvage SET undone_ns = ? WHERE number = (SELECT max(number) FROM salvage WHERE volume = ? AND undone_ns IS NULL)",
                (at_ns, str(volume)),
            )

    def salvages(self, volume: UUID) -> list[SalvageEntry]:
        """Return the salvages of a volume, oldest first."""
        rows = self._db.execute(
            "SELECT transfer, volume, at_ns, statement, undone_ns FROM salvage WHERE volume = ? ORDER BY number", (str(volume),)
        )
        return [SalvageEntry(UUID(transfer), UUID(about), at_ns, from_json(text), undone) for transfer, about, at_ns, text, undone in rows]

    def statements(self, name: str) -> list[SalvageEntry]:
        """Return the salvages of a volume by name, oldest first, also of one that was removed; NoSuchVolume for a name nobody ever had."""
        known = next((entry.id for entry in self.volumes() if name in {entry.name, str(entry.id)}), None)
        if known is not None:
            return self.salvages(known)
        rows = self._db.execute("SELECT DISTINCT volume FROM salvage WHERE json_extract(statement, '$.volume_name') = ?", (name,))
        found = [entry for (volume,) in rows.fetchall() for entry in self.salvages(UUID(volume))]
        if not found:
            raise NoSuchVolume(f"there is no volume {name!r}, nor a loss statement of one")
        return found

    def newest_salvage(self, volume: UUID) -> SalvageEntry:
        """Return the salvage that stands; NoSuchTransfer if there is none."""
        for entry in reversed(self.salvages(volume)):
            if entry.undone_ns is None:
                return entry
        raise NoSuchTransfer("no salvage of this volume stands")

    # --- who is in charge ---

    @property
    def term(self) -> int:
        """The term in which this management node orders; an agent that has heard of a higher one refuses."""
        (number,) = self._db.execute("SELECT number FROM term").fetchone()
        return int(number)

    def set_term(self, number: int) -> None:
        """Order in another term from now on."""
        with self.change() as db:
            db.execute("UPDATE term SET number = ?", (number,))

    # --- the file ---

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise VersionUnknown(f"the catalog has version {version}, this release knows {len(MIGRATIONS)}")
        for number in range(version, len(MIGRATIONS)):
            self._db.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return what a query finds."""
        return self._db.execute(query, values).fetchall()

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection inside one transaction, for a module that keeps tables of its own here."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _transfer(row: tuple[str, str, str, str, str, int, int | None, str]) -> TransferEntry:
    number, volume, base, target, differential, begun_ns, ended_ns, ending = row
    first, last = (from_document(json.loads(text), GenerationId) for text in (base, target))
    return TransferEntry(UUID(number), UUID(volume), first, last, Differential(differential), begun_ns, ended_ns, ending)


def _stored(text: str) -> str:
    """Return a path as SQLite takes it: JSON, since a lone surrogate is no UTF-8."""
    return json.dumps(text)


def _text(stored: str) -> str:
    return str(json.loads(stored))
