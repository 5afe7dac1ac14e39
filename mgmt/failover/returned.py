"""What a node that returned still holds, and what changed here meanwhile: two DMIs from the generation both have. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from agent.contract.dmi import Change, Dmi
from agent.contract.errors import RequestRefused
from agent.contract.identity import GenerationId
from agent.contract.messages import Outcome, from_document, to_document
from mgmt.report import FileAccount, accounts_of

DIRECTORY = "directory"


class There(StrEnum):
    """What the node that returned did with a file after the generation both have."""

    NEW = "new"
    CHANGED = "changed"
    DELETED = "deleted"


class Here(StrEnum):
    """What became of the same path on the node that took over."""

    UNTOUCHED = "untouched"  # as in the generation both have; a file that is new there is missing here
    CHANGED = "changed"  # otherwise: both changed it
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A file of the node that returned which the other lacks in this form."""

    path: str  # relative to the volume, bytes that are not UTF-8 as surrogates
    kind: str
    size_bytes: int
    mtime_ns: int
    digest: str
    there: There
    here: Here


@dataclass(frozen=True, slots=True)
class ChangedFile:
    """A file that the node that took over changed since the generation both have."""

    path: str
    kind: str
    size_bytes: int
    deleted: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both lists, by path. A file that both have in the same form is in the second alone."""

    held: tuple[HeldFile, ...]
    changed: tuple[ChangedFile, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """What was found out when a node returned: the lists, and what they are of."""

    node: str
    primary: str  # that took over
    kept: GenerationId  # what the node held of its own; g0 if that was nothing
    base: GenerationId  # the newest generation that both had
    comparison: Comparison

    def to_json(self) -> str:
        """Return it as JSON: ASCII, names with bytes that are not UTF-8 as lone surrogates."""
        return json.dumps(to_document(self), ensure_ascii=True)

    @staticmethod
    def from_json(text: str) -> Returned:
        """Return what ``to_json`` wrote; RequestRefused if it is none."""
        try:
            return from_document(json.loads(text), Returned)
        except ValueError as error:
            raise RequestRefused("not JSON", cause=str(error)) from error


def compare(kept: Dmi | None, served: Dmi) -> Comparison:
    """Return what ``kept`` (None: nothing was kept) has that ``served`` lacks, and what ``served`` changed; both from the same base.

    Directories that both have are left out: only their times differ, and their entries are listed themselves.
    """
    if kept is not None and kept.head.base != served.head.base:
        raise ValueError("the two are not of the same base")
    ours = _of_note(served)
    here = {path: account for account, _ in ours for path in (*account.paths, *account.base_paths)}
    held = []
    for account, there in _of_note(kept) if kept is not None else ():
        for path in account.paths:
            other = here.get(path)
            if other is not None and _same(account, other):
                continue
            held.append(HeldFile(path, account.kind, account.size_bytes, account.mtime_ns, account.digest, there, _became(path, other)))
    changed = [
        ChangedFile(path, account.kind, account.size_bytes, account.outcome is Outcome.DELETED)
        for account, _ in ours
        for path in account.paths
    ]
    return Comparison(tuple(sorted(held, key=lambda found: found.path)), tuple(sorted(changed, key=lambda found: found.path)))


def _of_note(dmi: Dmi) -> list[tuple[FileAccount, There]]:
    is_new = (np.asarray(dmi.change) & int(Change.NEW)) != 0
    found = []
    for account in accounts_of(dmi):
        there = There.DELETED if account.outcome is Outcome.DELETED else There.NEW if is_new[account.row] else There.CHANGED
        if account.kind != DIRECTORY or there is not There.CHANGED:
            found.append((account, there))
    return found


def _same(one: FileAccount, other: FileAccount) -> bool:
    """Whether both nodes have the same file: what was recovered has its size and its mtime to the nanosecond.

    The digests say nothing about that: they follow the extents, and a file that was recovered lies elsewhere.
    """
    deleted = [account.outcome is Outcome.DELETED for account in (one, other)]
    return deleted == [True, True] or (
        deleted == [False, False] and (one.kind, one.size_bytes, one.mtime_ns) == (other.kind, other.size_bytes, other.mtime_ns)
    )


def _became(path: str, other: FileAccount | None) -> Here:
    if other is None:
        return Here.UNTOUCHED
    gone = other.outcome is Outcome.DELETED or path not in other.paths
    return Here.DELETED if gone else Here.CHANGED
