"""What the independent checker is given, and what it said."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.contract.identity import FilesystemKind
from agent.contract.messages import Outcome
from agent.system.run import run
from mgmt.report import LossStatement

CHECK_LIMIT_S = 900.0


@dataclass(frozen=True, slots=True)
class Findings:
    """The checker's figures; all of them must be 0 for a drill to have succeeded."""

    false_recovered: int
    missed: int
    untouched_differ: int
    unlisted_blocks: int
    compared_files: int
    compared_bytes: int
    first: tuple[str, ...]  # the first findings in words

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.false_recovered or self.missed or self.untouched_differ or self.unlisted_blocks)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where the checker finds what it compares."""

    base: Path
    target: Path
    filesystem: FilesystemKind
    result: Path  # a mounted tree, or an image
    dmi: Path
    arrival: Path
    smb: str  # //host/share
    smb_client: str  # the client's command line


def checker_statement(statement: LossStatement) -> dict[str, Any]:
    """Return a loss statement in the checker's own words."""
    deleted = {Outcome.DELETED, Outcome.HELD}
    return {
        "deletions": str(statement.deletions),
        "files": [
            {
                "paths": [] if account.outcome in deleted else list(account.paths),
                "base_paths": list(account.paths if account.outcome in deleted else account.base_paths or account.paths),
                "outcome": str(account.outcome),
                "reason": account.reason,
                "now_at": account.found_at,
            }
            for account in statement.accounts
        ],
    }


def check(evidence: Evidence, statement: LossStatement, folder: Path) -> Findings:
    """Return what the checker finds; it runs as a program of its own. What it was told and what it said stay in ``folder``."""
    loss, out = folder / "loss-for-checker.json", folder / "check.json"
    loss.write_text(json.dumps(checker_statement(statement)))
    words = ["--loss", str(loss), "--smb", evidence.smb, "--smb-client", evidence.smb_client]
    for name in ("base", "target", "filesystem", "result", "dmi", "arrival"):
        words += [f"--{name}", str(getattr(evidence, name))]
    run([sys.executable, "-m", "mgmt.drill.checker", *words, "--out", str(out)], timeout_s=CHECK_LIMIT_S, ok=(0, 1))
    document = json.loads(out.read_text())
    figures = {name: document[name] for name in Findings.__dataclass_fields__ if name != "first"}
    return Findings(**figures, first=tuple(f"{found['figure']}: {found['path']}: {found['what']}" for found in document["findings"][:20]))


def generations_equal(one: Path, other: Path) -> bool:
    """Whether two whole images are the same, by the checker."""
    argv = [sys.executable, "-m", "mgmt.drill.checker", "--generation-equal", str(one), str(other)]
    return run(argv, timeout_s=CHECK_LIMIT_S, ok=(0, 1)).status == 0


def digests(image: Path, filesystem: FilesystemKind, out: Path) -> None:
    """Have the checker write every file of a frozen image, with its attributes and digest, to ``out``."""
    argv = [sys.executable, "-m", "mgmt.drill.checker", "--digests", str(image), "--filesystem", str(filesystem), "--out", str(out)]
    run(argv, timeout_s=CHECK_LIMIT_S)
