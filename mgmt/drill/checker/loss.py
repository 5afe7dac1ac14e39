"""The loss statement, as far as the checker needs it.

``{"files": [{"paths": [...], "base_paths": [...], "outcome": "...", "inode": n, "reason": "...", "now_at": "..."}], "deletions": "hold"}``

paths        the file's names in the target, relative to the root ("" or "." is the root); of a deleted or held file those in the base
base_paths   its names in the base (may be left out)
outcome      recovered, kept_at_base, absent, damaged, deleted, held
inode        its inode number (may be left out; where it stands it must be right)
reason       why it was not recovered; "atomic set" and "no room" excuse a whole file
now_at       where it is in the result, if not at its name
deletions    hold or apply; held are only deletions of a statement in which something was not recovered

Names are text as ``os.fsdecode`` gives it: bytes that are not UTF-8 are lone surrogates, written as JSON escapes. Other keys are ignored.
A changed directory is a file as well. Paths that changed only because a directory above was renamed need not be named.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTCOMES = frozenset({"recovered", "kept_at_base", "absent", "damaged", "deleted", "held"})


@dataclass(frozen=True, slots=True)
class Entry:
    """What the statement says of one file."""

    paths: tuple[bytes, ...]
    base_paths: tuple[bytes, ...]
    outcome: str
    inode: int | None
    reason: str
    now_at: bytes


@dataclass(frozen=True, slots=True)
class LossStatement:
    """The whole statement."""

    files: tuple[Entry, ...]
    hold: bool

    @property
    def partial(self) -> bool:
        """Whether something was not recovered, so that the deletion policy has a meaning."""
        return any(entry.outcome in {"kept_at_base", "absent", "damaged"} for entry in self.files)


def read_loss(path: Path) -> LossStatement:
    """Return the statement; ValueError if it does not say what it must."""
    document = json.loads(path.read_text("utf-8"))
    try:
        entries = tuple(_entry(row) for row in document["files"])
        hold = {"hold": True, "apply": False}[document["deletions"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the loss statement lacks {error}") from error
    if unknown := {entry.outcome for entry in entries} - OUTCOMES:
        raise ValueError(f"the loss statement has unknown outcomes: {sorted(unknown)}")
    return LossStatement(entries, hold)


def _entry(row: dict[str, Any]) -> Entry:
    paths, base_paths = (tuple(_name(name) for name in row.get(key) or ()) for key in ("paths", "base_paths"))
    if row["outcome"] in {"deleted", "held"} and not base_paths:
        paths, base_paths = (), paths
    return Entry(paths, base_paths, row["outcome"], row.get("inode"), row.get("reason") or "", _name(row.get("now_at") or ""))


def _name(text: str) -> bytes:
    return b"" if text in {"", ".", "/"} else os.fsencode(text.strip("/") if text.startswith("/") else text)
