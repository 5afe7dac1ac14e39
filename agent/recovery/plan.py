"""The tree that a salvage makes: which inode has which names, and in which generation's state, from the DMI, the designation and the
policy; and what of that is to be done to a clone. Pure.

The result is one. A roll forward has a clone of the base to make it of, a roll back one of the target in which some files are not whole:
the plan is what differs between the result and that side.

Paths follow the target: an inode that is in base and target is placed at its target names, designated or not; a new one only if it is
designated (a directory also if something needs it as parent). A deleted inode is held or removed by policy; it stays in any case where a
new file that is not whole would take its name. Every name is a pair of directory and single component, so that nobody resolves a path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final, NamedTuple

from agent.contract.dmi import Change, Dmi, FileKind, Side
from agent.contract.errors import DmiMalformed
from agent.contract.identity import empty_generation
from agent.contract.messages import FileOutcome, Outcome

UNLISTED: Final = -1
"""As ``Folder.row``: the directory is not in the DMI, so it is what it was in the base."""

HELD: Final = b".landfall-held"
_REPLACED: Final = "the file that replaces it is not whole"
_KEPT: Final = "it was deleted on the primary; a partial salvage keeps it"


class Folder(NamedTuple):
    """A directory of the salvaged tree."""

    inode: int
    row: int = UNLISTED


class Slot(NamedTuple):
    """A name: one component in one directory."""

    folder: Folder
    name: bytes


@dataclass(frozen=True, slots=True)
class Placement:
    """How the names of one inode change. ``aside`` are base paths, to be made below the folder of held files."""

    row: int
    leave: tuple[Slot, ...] = ()
    stay: tuple[Slot, ...] = ()
    take: tuple[Slot, ...] = ()
    aside: tuple[bytes, ...] = ()

    @property
    def names(self) -> tuple[Slot, ...]:
        """The names it has afterwards, those aside not counted."""
        return self.stay + self.take


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done to a clone of the base (``side`` BASE) or of the target. Rows are rows of the DMI's files.

    What is created or updated gets the other side's content and attributes; ``keep`` are rows that are designated, or needed as
    directories, and are as they must be already: on the base's side there are none.
    """

    side: Side
    root: Folder
    root_row: int  # UNLISTED if the root is as it must be
    held_name: bytes  # of the folder in the root for held files whose name is taken
    create: tuple[int, ...]  # inodes that are made
    update: tuple[int, ...]  # inodes of this side that get the other's content and attributes
    keep: tuple[int, ...]
    names: dict[int, tuple[Slot, ...]]  # of each inode that is created, updated or kept the names to be verified
    move: tuple[Placement, ...]  # everything whose names change and that stays in the tree
    remove: tuple[Placement, ...]
    paths: dict[Folder, bytes]  # path on this side of directories that the DMI does not list
    outcomes: tuple[FileOutcome, ...]  # where the result differs from the designation

    def unlisted(self) -> dict[Folder, bytes]:
        """Return the directories that the DMI does not list and that hold a name that changes, or of what is stored or kept."""
        folders = {slot.folder for placement in (*self.move, *self.remove) for slot in placement.leave + placement.names}
        folders |= {slot.folder for names in self.names.values() for slot in names}
        return {folder: path for folder, path in self.paths.items() if folder in folders}


def make_plan(
    dmi: Dmi,
    designated: Collection[int],
    *,
    apply_deletions: bool,
    expected: Outcome | None = None,
    root_names: Collection[bytes] = (),
    side: Side = Side.BASE,
) -> Plan:
    """Return the plan; DmiMalformed if the names contradict each other.

    ``expected`` is what the instruction says of deleted files (DELETED or HELD); each that fares otherwise is in ``outcomes``.
    ``root_names`` are names in the base's root that the folder of held files must not have.
    """
    names, chosen = _Names(dmi), set(designated)
    placed = _placed(dmi, names, chosen)
    taken = {slot: row for row in placed for slot in names.target[row]}
    absent = {slot for row in names.fresh - placed for slot in names.target[row]}
    occupied = {slot.name for slot in (*taken, *absent) if slot.folder == names.root} | set(root_names)
    held_name = next(name for name in _held_names() if name not in occupied)
    result = {row: _Settled(tuple(names.target[row])) for row in sorted(placed)}
    outcomes: list[FileOutcome] = []
    for row, settled in _Gone(dmi, names, taken, absent, held_name, hold=not apply_deletions).settle():
        result[row] = settled
        outcome = Outcome.HELD if settled.there else Outcome.DELETED
        if outcome is not (expected or outcome) or settled.moved:
            reason = _REPLACED if apply_deletions else _KEPT
            outcomes.append(FileOutcome(row, outcome, reason, settled.path.decode("utf-8", "surrogateescape") if settled.moved else ""))
    for row in sorted((placed & names.fresh) - chosen):
        outcomes.append(FileOutcome(row, Outcome.RECOVERED, "a recovered file lies in it"))
    return _difference(names, result, chosen, side, held_name, tuple(outcomes))


def _difference(
    names: _Names, result: dict[int, _Settled], designated: set[int], side: Side, held_name: bytes, outcomes: tuple[FileOutcome, ...]
) -> Plan:
    """Return what is to be done to a clone of ``side`` that it becomes the result."""
    here = names.base if side is Side.BASE else names.target
    placements = {row: _placement(row, here[row], list(settled.names), settled.aside) for row, settled in result.items()}
    gone = names.fresh - result.keys() if side is Side.TARGET else set()
    removed = [row for row, settled in result.items() if here[row] and not settled.there]
    there = [row for row, settled in result.items() if settled.there]
    of_target = (designated - names.gone) | names.fresh
    other = of_target if side is Side.BASE else set(there) - of_target
    create = sorted(row for row in there if not here[row])
    update = sorted(row for row in there if here[row] and row in other)
    keep = sorted(({*there, names.root_row} - {UNLISTED}) & of_target) if side is Side.TARGET else []
    return Plan(
        side,
        names.root,
        names.root_row if (names.root_row in designated) is (side is Side.BASE) else UNLISTED,
        held_name,
        tuple(create),
        tuple(update),
        tuple(keep),
        {row: _to_verify(names, result[row].names, row, side) for row in (*create, *update, *keep) if row in result},
        tuple(placements[row] for row in there if placements[row].leave or placements[row].take or placements[row].aside),
        (*(placements[row] for row in removed), *(_placement(row, here[row], []) for row in sorted(gone))),
        names.unlisted(side),
        outcomes,
    )


def _to_verify(names: _Names, found: tuple[Slot, ...], row: int, side: Side) -> tuple[Slot, ...]:
    """Return the names at which a row must be found: those aside not counted. In a clone of the target a name that the base has, too, is
    where both have it: nobody touches it, and looking for it would cost more than the rest."""
    return found if side is Side.BASE or not names.target[row] else tuple(slot for slot in found if slot not in names.base[row])


def _held_names() -> Iterator[bytes]:
    yield HELD
    for number in count(2):
        yield b"%s-%d" % (HELD, number)


def _placement(row: int, before: list[Slot], after: list[Slot], aside: tuple[bytes, ...] = ()) -> Placement:
    had, has = set(before), set(after)
    return Placement(
        row,
        tuple(slot for slot in before if slot not in has),
        tuple(slot for slot in before if slot in has),
        tuple(slot for slot in after if slot not in had),
        aside,
    )


class _Settled(NamedTuple):
    """Where an inode is in the result. ``path`` is where a deleted one is found, ``moved`` whether that is elsewhere than in the base."""

    names: tuple[Slot, ...]
    aside: tuple[bytes, ...] = ()
    path: bytes = b""
    moved: bool = False

    @property
    def there(self) -> bool:
        """Whether it is in the tree at all."""
        return bool(self.names or self.aside)


class _Names:
    """The names of every row on both sides, each checked against the others.

    ``fresh``: in the target only (or nameless in the base, which its clone no longer has); ``gone``: named in the base only.
    """

    def __init__(self, dmi: Dmi) -> None:
        self._dmi = dmi
        self.root = Folder(dmi.head.root_inode)
        self.from_nothing = dmi.head.base == empty_generation(dmi.head.base.volume)
        inodes, changes, kinds = dmi.inode.tolist(), dmi.change.tolist(), dmi.kind.tolist()
        self.is_folder = [kind == FileKind.DIRECTORY for kind in kinds]
        self._index: dict[Side, dict[int, int]] = {Side.BASE: {}, Side.TARGET: {}}
        for row, (inode, change) in enumerate(zip(inodes, changes, strict=True)):
            for side, elsewhere in ((Side.BASE, Change.NEW), (Side.TARGET, Change.DELETED)):
                if not change & elsewhere:
                    _refuse(inode in self._index[side], f"inode {inode} stands twice in one generation")
                    self._index[side][inode] = row
        self.root_row = self._root_row(inodes, changes)
        self.base: list[list[Slot]] = [[] for _ in inodes]
        self.target: list[list[Slot]] = [[] for _ in inodes]
        self.base_paths: list[list[bytes]] = [[] for _ in inodes]
        self.target_paths: list[list[bytes]] = [[] for _ in inodes]
        self._prefix: dict[tuple[Side, Folder], bytes] = {}
        self._read()
        rows = range(len(inodes))
        self.fresh = {row for row in rows if self.target[row] and not self.base[row]}
        self.gone = {row for row in rows if self.base[row] and not self.target[row]}
        self.surviving = {row for row in rows if self.base[row] and self.target[row]}
        for row in rows:
            _refuse(bool(changes[row] & Change.NEW and self.base[row]), f"inode {inodes[row]} is new and has a name in the base")
            _refuse(bool(changes[row] & Change.DELETED and self.target[row]), f"inode {inodes[row]} is deleted and has a target name")

    def unlisted(self, side: Side) -> dict[Folder, bytes]:
        """Return the path in one generation of the directories that the DMI does not list: they have the same name in both, and what they
        lie in may have another."""
        paths = {folder: path for (of, folder), path in self._prefix.items() if folder.row == UNLISTED and of is side}
        others = {folder: path for (of, folder), path in self._prefix.items() if folder.row == UNLISTED and folder not in paths}
        if others:
            ways = (self.target_paths, self.base_paths) if side is Side.BASE else (self.base_paths, self.target_paths)
            moved = {ways[0][row][0]: ways[1][row][0] for row in self.surviving if self.is_folder[row]}
            paths |= {folder: _followed(path, moved) for folder, path in others.items()}
        return paths

    def _root_row(self, inodes: list[int], changes: list[int]) -> int:
        rows = [row for row, inode in enumerate(inodes) if inode == self.root.inode]
        if not rows:
            return UNLISTED
        _refuse(len(rows) > 1 or not self.is_folder[rows[0]], "the root is no directory, or stands twice")
        _refuse(bool(changes[rows[0]] & Change.DELETED), "the root is deleted")
        _refuse(bool(changes[rows[0]] & Change.NEW) and not self.from_nothing, "the root is new")
        return rows[0]

    def _read(self) -> None:
        """Fill the names of each row, refusing those that two inodes claim, and paths that do not lie in their directory."""
        dmi = self._dmi
        sides, parents, starts = dmi.name_side.tolist(), dmi.name_parent.tolist(), dmi.name_start.tolist()
        path_starts, raw = dmi.name_path_start.tolist(), dmi.paths.tobytes()
        claimed: set[tuple[int, Slot]] = set()
        for row in range(dmi.file_total):
            for at in range(starts[row], starts[row + 1]):
                path, side = raw[path_starts[at] : path_starts[at + 1]], Side(sides[at])
                if row == self.root_row:
                    _refuse(path != b"", "the root has a name")
                    continue
                above, _, name = path.rpartition(b"/")
                _refuse(not name, "a file has the name of the root")
                folder = self._folder(side, parents[at])
                slot = Slot(folder, name)
                _refuse((side, slot) in claimed, f"two files have the name {path!r}")
                claimed.add((side, slot))
                if self._prefix.setdefault((side, folder), above) != above:
                    raise DmiMalformed(f"the path {path!r} does not lie in its directory")
                (self.base if side is Side.BASE else self.target)[row].append(slot)
                (self.base_paths if side is Side.BASE else self.target_paths)[row].append(path)
            for held in (self.base[row], self.target[row]):
                _refuse(self.is_folder[row] and len(held) > 1, "a directory has two names")
        for (side, folder), above in self._prefix.items():
            if folder == self.root:
                _refuse(above != b"", f"the path {above!r} is not the root's")
            elif folder.row != UNLISTED:
                own = (self.base_paths if side is Side.BASE else self.target_paths)[folder.row]
                _refuse(own != [above], f"directory {folder.inode} is not at the path {above!r}")

    def _folder(self, side: Side, inode: int) -> Folder:
        if inode == self.root.inode:
            return self.root
        row = self._index[side].get(inode)
        if row is None:
            other = self._index[Side.TARGET if side is Side.BASE else Side.BASE]
            _refuse(self.from_nothing or inode in other, f"a name lies in directory {inode}, which is not in that generation")
            return Folder(inode)
        _refuse(not self.is_folder[row], f"a name lies in inode {inode}, which is no directory")
        return Folder(inode, row)


def _placed(dmi: Dmi, names: _Names, designated: set[int]) -> set[int]:
    """Return the rows that have names in the result: survivors, designated new ones, and new directories these need."""
    placed = names.surviving | (names.fresh & designated)
    todo = list(placed)
    while todo:
        for slot in names.target[todo.pop()]:
            parent = slot.folder.row
            if parent in names.fresh and parent not in placed:
                placed.add(parent)
                todo.append(parent)
    return placed


def _followed(path: bytes, moved: dict[bytes, bytes]) -> bytes:
    """Return a directory's path in the other generation, by the nearest directory above it that ``moved`` knows in both."""
    above, below = path, b""
    while above and above not in moved:
        above, _, name = above.rpartition(b"/")
        below = b"/" + name + below
    return moved[above] + below if above else path


class _Gone:
    """Deleted inodes. A deleted directory whose name a new directory has is merged into it: what is held of the old lies in the new."""

    def __init__(self, dmi: Dmi, names: _Names, taken: dict[Slot, int], absent: set[Slot], held_name: bytes, *, hold: bool) -> None:
        self._dmi, self._names, self._taken, self._absent = dmi, names, taken, absent
        self._held_name, self._hold = held_name, hold
        self._merged: dict[Folder, Folder] = {}
        self._where: dict[Folder, bytes] = {}

    def settle(self) -> Iterator[tuple[int, _Settled]]:
        """Yield each deleted row, directories first, each after the one in which it lies: what they become decides where a file is."""
        names = self._names
        for row in sorted(names.gone, key=lambda row: (not names.is_folder[row], len(names.base_paths[row][0]), row)):
            yield row, self._settle(row)

    def _settle(self, row: int) -> _Settled:
        names = self._names
        folder = Folder(int(self._dmi.inode[row]), row)
        final: list[Slot] = []
        aside: list[bytes] = []
        where = b""
        for slot, path in zip(names.base[row], names.base_paths[row], strict=True):
            here = Slot(self._merged.get(slot.folder, slot.folder), slot.name)
            owner = self._taken.get(here)
            if names.is_folder[row] and owner is not None and owner in names.fresh and names.is_folder[owner]:
                self._merged[folder] = Folder(int(self._dmi.inode[owner]), owner)
            elif owner is not None:
                if self._hold:
                    aside.append(path)
                    where = where or self._held_name + b"/" + path
            elif self._hold or (here in self._absent and not names.is_folder[row]):
                final.append(here)
                where = where or self._path(here, path)
        if names.is_folder[row] and where:
            self._where[folder] = where
        moved = bool(where) and where not in names.base_paths[row]
        return _Settled(tuple(final), tuple(aside), where, moved)

    def _path(self, slot: Slot, otherwise: bytes) -> bytes:
        """Return where a held name is in the result."""
        folder = slot.folder
        if folder == self._names.root:
            return slot.name
        if folder.row == UNLISTED:
            return otherwise
        above = self._where.get(folder) or next(iter(self._names.target_paths[folder.row]), b"")
        return above + b"/" + slot.name if above else otherwise


def _refuse(amiss: bool, sentence: str) -> None:
    if amiss:
        raise DmiMalformed(sentence)
