"""What the kept loss statements say of files below a path, and how old what was lost is. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from agent.contract.messages import Outcome
from mgmt.report import FileAccount, LossStatement


@dataclass(frozen=True, slots=True)
class Rpo:
    """How far back a salvage put a volume, in seconds before it was made.

    Recovered files are as the target has them, the others as the base; None where the base is the empty volume, which has no time.
    """

    recovered_s: float
    others_s: float | None


@dataclass(frozen=True, slots=True)
class Loss:
    """One file's account, with what its statement says for all. ``change_age_s``: how old the change was that did not come through."""

    transfer: UUID
    at_ns: int
    operator: str
    primary: str
    secondary: str
    undone: bool
    rpo: Rpo
    change_age_s: float | None  # None for a file that is as the primary had it
    account: FileAccount


def rpo_of(statement: LossStatement) -> Rpo:
    """Return how far back a salvage put its volume."""
    at_ns, base_ns = statement.circumstances.at_ns, statement.base_taken_ns
    return Rpo(max(0.0, (at_ns - statement.target_taken_ns) / 1e9), max(0.0, (at_ns - base_ns) / 1e9) if base_ns else None)


def losses(statements: Iterable[tuple[LossStatement, bool]], under: str = "", *, with_recovered: bool = False) -> list[Loss]:
    """Return the files at or below ``under`` (a path as statements have it) that are not as the primary had them, oldest salvage first.

    Each statement comes with whether its salvage was undone. ``with_recovered``: the others too.
    """
    found = []
    for statement, undone in statements:
        around, rpo = statement.circumstances, rpo_of(statement)
        accounts = statement.accounts if with_recovered else statement.lost
        for account in accounts:
            if any(_is_below(path, under) for path in (*account.paths, *account.base_paths, account.found_at)):
                came = account.outcome in {Outcome.RECOVERED, Outcome.DELETED}
                age_s = None if came else max(0.0, (around.at_ns - account.mtime_ns) / 1e9)
                found.append(
                    Loss(statement.transfer, around.at_ns, around.operator, around.primary, around.secondary, undone, rpo, age_s, account)
                )
    return found


def _is_below(path: str, under: str) -> bool:
    wanted = under.strip("/")
    return bool(path or not wanted) and (not wanted or path == wanted or path.startswith(f"{wanted}/"))
