"""The figures: what the loss statement says, held against base, target and what is served.

false_recovered   a file said to be recovered that differs from the target in bytes or a promised attribute at any of its paths; a changed
                  file that is not named; a kept file without its base content; an absent file that is there
missed            a file that arrived whole and was not recovered, unless its atomic set or room forbade it
untouched_differ  what did not change and differs; what is in neither generation; what was to be held and is not there
unlisted_blocks   differing blocks that the DMI does not list

A directory's mtime is promised unless its names in the result are not the target's, or one of its members is not recovered:
then putting the members there was a change of the directory. A directory's size and link count are never promised.
A kept file has the base's content, size and mtime at its target names; each other attribute is the base's or the target's.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mgmt.drill.checker.blocks import Arrival, Blocks
from mgmt.drill.checker.loss import Entry, LossStatement
from mgmt.drill.checker.trees import Node, Tree

_HELD = re.compile(rb"\.landfall-held(-\d+)?(/|$)")  # the number where the volume has that name already
FIGURES = ("false_recovered", "missed", "untouched_differ", "unlisted_blocks")
_EXCUSED = re.compile(r"atomic.?set|no.?room", re.IGNORECASE)
_CONTENT = ("kind", "size", "content", "device")
_ATTRIBUTES = ("mode", "uid", "gid", "xattrs", "project", "flags")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was read. ``arrival`` is None where the transfer is said to be complete: then every file is whole."""

    base: Tree
    target: Tree
    result: Tree
    differing: Blocks
    extents: dict[int, Blocks]
    arrival: Arrival | None


@dataclass(slots=True)
class Verdict:
    """Figures and findings; a path counts once in each figure."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIGURES, 0))
    findings: list[tuple[str, bytes, str]] = field(default_factory=list)
    compared_files: int = 0
    compared_bytes: int = 0
    smb_files: int = 0
    whole_but_for_identical_blocks: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    _seen: set[tuple[str, bytes]] = field(default_factory=set)

    def add(self, figure: str, path: bytes, what: str) -> None:
        """Count a finding, once per path and figure."""
        if (figure, path) not in self._seen:
            self._seen.add((figure, path))
            self.counts[figure] += 1
            self.findings.append((figure, path, what))


def changed_files(base: Tree, target: Tree) -> set[bytes]:
    """Return the identities in the target that differ from the base: new, other content or attributes, or other names."""
    found = set()
    for identity, paths in target.by_identity.items():
        before = base.by_identity.get(identity)
        if before is None or differences(base.nodes[before[0]], target.nodes[paths[0]]) or _names(base, before) != _names(target, paths):
            found.add(identity)
    return found


def _names(tree: Tree, paths: tuple[bytes, ...]) -> set[tuple[bytes, bytes]]:
    """Names by the identity of their directory, so that a renamed directory does not change what is in it."""
    return {(tree.nodes[os.path.split(path)[0]].identity if path else b"", os.path.split(path)[1]) for path in paths}


def differences(wanted: Node, got: Node | None, *, mtime: bool = True) -> list[str]:
    """Return the names of the promised attributes in which two inodes differ."""
    if got is None:
        return ["it is not there"]
    names = [*_CONTENT, *_ATTRIBUTES, *(["mtime_ns"] if mtime else [])]
    return [name for name in names if getattr(wanted, name) != getattr(got, name)]


def judge(evidence: Evidence, loss: LossStatement | None) -> Verdict:
    """Return the figures. Without a loss statement everything must be the target's."""
    return _Judge(evidence, loss).run()


class _Judge:
    def __init__(self, evidence: Evidence, loss: LossStatement | None) -> None:
        self.base, self.target, self.result = evidence.base, evidence.target, evidence.result
        self.evidence, self.loss, self.verdict = evidence, loss, Verdict()
        self.changed = changed_files(self.base, self.target)
        self.target_names, self.result_names = self.target.children(), self.result.children()
        self.entries: dict[bytes, Entry] = {}  # by identity in the target
        self.gone: dict[bytes, Entry] = {}  # by identity in the base, of what is not in the target
        self.allowed: set[bytes] = set(self.target.nodes) | {b""}
        self.held_places = [path for path in self.result.nodes if loss and path not in self.target.nodes and _HELD.match(path)]
        self.allowed.update(self.held_places)
        self.now_at = {entry.now_at for entry in loss.files if entry.now_at} if loss else set()

    def run(self) -> Verdict:
        self._match()
        for identity, paths in self.target.by_identity.items():
            self._judge_target(identity, paths)
        for identity, paths in self.base.by_identity.items():
            if identity not in self.target.by_identity:
                self._judge_gone(identity, paths)
        self._judge_extra()
        self._judge_missed()
        self._judge_listed()
        self.verdict.outcomes = (
            {
                outcome: sum(entry.outcome == outcome for entry in self.loss.files)
                for outcome in sorted({entry.outcome for entry in self.loss.files})
            }
            if self.loss
            else {}
        )
        return self.verdict

    def _match(self) -> None:
        for entry in self.loss.files if self.loss else ():
            root = self.target.nodes[b""]
            paths = entry.paths or ((b"",) if not entry.base_paths and entry.inode == root.inode else ())
            if not paths:
                self._match_gone(entry)
                continue
            nodes = [self.target.nodes.get(path) for path in paths]
            identities = {node.identity for node in nodes if node}
            if None in nodes or len(identities) != 1:
                self.verdict.add("false_recovered", paths[0], "the loss statement names paths that are not one file of the target")
                continue
            node = nodes[0]
            if node is not None and entry.inode not in (None, node.inode):
                self.verdict.add("false_recovered", paths[0], f"the loss statement gives inode {entry.inode}, it is {node.inode}")
            identity = identities.pop()
            if identity in self.entries and self.entries[identity].outcome != entry.outcome:
                self.verdict.add("false_recovered", paths[0], "named twice with different outcomes")
            self.entries[identity] = entry

    def _match_gone(self, entry: Entry) -> None:
        for path in entry.base_paths:
            node = self.base.nodes.get(path)
            if node is None or node.identity in self.target.by_identity:
                self.verdict.add("false_recovered", path, "named as deleted, but it was not")
            else:
                self.gone[node.identity] = entry

    # What the target has.

    def _judge_target(self, identity: bytes, paths: tuple[bytes, ...]) -> None:
        entry, node = self.entries.get(identity), self.target.nodes[paths[0]]
        self.verdict.compared_files += 1
        self.verdict.compared_bytes += node.size
        outcome = entry.outcome if entry else "recovered"
        if self.loss and not entry and identity in self.changed and paths != (b"",):
            self.verdict.add("false_recovered", paths[0], "changed, and not named in the loss statement")
        elif entry and outcome == "kept_at_base":
            self._judge_kept(identity, entry, paths)
        elif outcome == "absent":
            self._judge_absent(paths)
        elif outcome == "recovered":
            figure = "false_recovered" if identity in self.changed or entry else "untouched_differ"
            for path in paths:
                for what in self._unlike_target(path, paths):
                    self.verdict.add(figure, path if figure == "untouched_differ" else paths[0], what)
        elif outcome in {"deleted", "held"}:
            self.verdict.add("false_recovered", paths[0], f"called {outcome}, but the target has it")

    def _unlike_target(self, path: bytes, paths: tuple[bytes, ...]) -> Iterator[str]:
        wanted, got = self.target.nodes[path], self.result.nodes.get(path)
        mtime = not (wanted.is_directory and self._disturbed(path))
        if unlike := differences(wanted, got, mtime=mtime):
            yield f"{os.fsdecode(path)!r} differs from the target: {', '.join(unlike)}"
        elif got and not got.is_directory and (group := self.result.links[got.inode]) != paths:
            yield f"hard-link group: {len(group)} names, {len(paths)} in the target, or others"

    def _disturbed(self, directory: bytes) -> bool:
        names = self.target_names.get(directory, set())
        if self.result_names.get(directory, set()) != names:
            return True
        prefix = directory + b"/" if directory else b""
        members = (self.entries.get(self.target.nodes[prefix + name].identity) for name in names)
        return any(member is not None and member.outcome != "recovered" for member in members)

    def _judge_kept(self, identity: bytes, entry: Entry, paths: tuple[bytes, ...]) -> None:
        before = self._base_node(identity, entry)
        if before is None:
            self.verdict.add("false_recovered", paths[0], "called kept at base, but the base does not have it")
            return
        after = self.target.nodes[paths[0]]
        for path in (entry.now_at,) if entry.now_at else paths:
            got = self.result.nodes.get(path)
            unlike = [name for name in differences(before, got, mtime=not before.is_directory) if name not in _ATTRIBUTES]
            if got:
                unlike += [name for name in _ATTRIBUTES if getattr(got, name) not in (getattr(before, name), getattr(after, name))]
            if unlike:
                self.verdict.add("false_recovered", paths[0], f"kept at base, but differs from it: {', '.join(unlike)}")

    def _base_node(self, identity: bytes, entry: Entry) -> Node | None:
        known = self.base.by_identity.get(identity, entry.base_paths)
        return self.base.nodes.get(known[0]) if known else None

    def _judge_absent(self, paths: tuple[bytes, ...]) -> None:
        for path in paths:
            got, before = self.result.nodes.get(path), self.base.nodes.get(path)
            replaced = before is not None and before.identity not in self.target.by_identity
            if got is None:
                if before is not None and replaced and not before.is_directory and not self._find_held(before, path, None):
                    self.verdict.add("untouched_differ", path, "the file it would have replaced is gone as well")
            elif path in self.now_at:
                continue
            elif before is None or differences(before, got, mtime=not before.is_directory):
                self.verdict.add("false_recovered", path, "called absent, but something that is not the base's is there")
            elif not replaced:
                self.verdict.add("untouched_differ", path, "an old name of a file that is elsewhere in the target")

    # What only the base has.

    def _judge_gone(self, identity: bytes, paths: tuple[bytes, ...]) -> None:
        before, entry = self.base.nodes[paths[0]], self.gone.get(identity)
        if self.loss and entry is None:
            self.verdict.add("false_recovered", paths[0], "deleted, and not named in the loss statement")
        outcome = entry.outcome if entry else "deleted"
        if outcome == "damaged":
            self.allowed.update(paths)
        elif outcome == "deleted":
            for path in paths:
                if path in self.result.nodes and path not in self.target.nodes:
                    self.verdict.add("untouched_differ", path, "deleted, but still there")
            if self.loss and self.loss.hold and self.loss.partial and not before.is_directory:
                self.verdict.add("untouched_differ", paths[0], "deleted, but deletions are held")
        elif not self._find_held(before, paths[0], entry, paths):
            self.verdict.add("untouched_differ", paths[0], f"called {outcome}, but its base version is nowhere")

    def _find_held(self, before: Node, path: bytes, entry: Entry | None, paths: tuple[bytes, ...] = ()) -> bool:
        if entry and entry.now_at:
            places = [entry.now_at]
        else:
            names = paths or (path,)
            places = [place for name in names for place in (name, self._place_of(name))] + self.held_places
        found = [place for place in places if self._holds(before, place)]
        for place in found:
            while place and place not in self.allowed:
                self.allowed.add(place)
                place = os.path.split(place)[0]
        return bool(found)

    def _holds(self, before: Node, place: bytes) -> bool:
        """Whether the result has the base's version there; a directory may be merged into the target's one of that name."""
        got = self.result.nodes.get(place)
        if got and before.is_directory and got.is_directory and place in self.target.nodes:
            return True
        return not differences(before, got, mtime=not before.is_directory)

    def _place_of(self, path: bytes) -> bytes:
        """Where a base path is now, if a directory above it was renamed."""
        parent, name = os.path.split(path)
        if not parent:
            return path
        renamed = self.target.by_identity.get(self.base.nodes[parent].identity)
        return (renamed[0] if renamed else self._place_of(parent)) + b"/" + name

    def _judge_extra(self) -> None:
        self.allowed |= self.now_at
        for path in self.result.nodes:
            if path not in self.allowed:
                where = "an old name of the base" if path in self.base.nodes else "in neither generation"
                self.verdict.add("untouched_differ", path, f"it is {where}")

    # What the arrival record allows.

    def _judge_missed(self) -> None:
        for identity in self.changed:
            paths, entry = self.target.by_identity[identity], self.entries.get(identity)
            if entry is None or entry.outcome == "recovered" or _EXCUSED.search(entry.reason):
                continue
            if self._whole(self.target.nodes[paths[0]]):
                self.verdict.add("missed", paths[0], f"it arrived whole, but is called {entry.outcome}: {entry.reason}")

    def _whole(self, node: Node) -> bool:
        arrival = self.evidence.arrival
        if arrival is None or node.kind != stat.S_IFREG:
            return True
        blocks = self.evidence.extents[node.inode]
        rows = arrival.piece_of(np.intersect1d(blocks, self.evidence.differing))
        if np.any(rows < 0) or not bool(np.all(arrival.arrived[rows])):
            return False
        touched = np.unique(arrival.piece_of(blocks))
        if bool(np.all(arrival.arrived[touched[touched >= 0]])):
            return True
        # A piece that was rewritten with what was there before: nothing differs in it, yet it did not arrive.
        self.verdict.whole_but_for_identical_blocks += 1
        return False

    def _judge_listed(self) -> None:
        if self.evidence.arrival is not None:
            blocks = self.evidence.differing
            unlisted = blocks[self.evidence.arrival.piece_of(blocks) < 0]
            for block in unlisted[:100].tolist():
                self.verdict.findings.append(("unlisted_blocks", b"", f"block {block} differs and is in no piece"))
            self.verdict.counts["unlisted_blocks"] = len(unlisted)
