"""Plans and accounts as tables."""

from __future__ import annotations

from typing import Any

from agent.contract.messages import to_document
from mgmt.failover.account import Account
from mgmt.failover.failback import Followed
from mgmt.failover.plan import Plan, Step
from mgmt.failover.rehearsal import Rehearsal
from mgmt.terminal import Sheet
from mgmt.view import bytes_words, moment


def plan_document(made: Plan, first: Step) -> dict[str, Any]:
    """Return a plan as one JSON document, each step with what it does."""
    steps = [{"step": step.value, "does": made.sentence(step)} for step in made.steps]
    return {**to_document(made), "steps": steps, "next_step": first.value}


def plan_sheet(made: Plan, first: Step) -> Sheet:
    """Return a plan as a table; what was done before is marked."""
    begin = made.steps.index(first)
    rows = tuple(
        (str(number + 1), step.value, made.sentence(step), "done" if number < begin else "") for number, step in enumerate(made.steps)
    )
    return Sheet(("", "step", "what it does", ""), rows)


def account_document(done: Account) -> dict[str, Any]:
    """Return an account as one JSON document, with its total and its sentence."""
    return {**to_document(done), "rto_s": done.seconds.total, "rpo_s": done.lost.volume, "sentence": done.sentence}


def account_sheets(done: Account) -> list[Sheet]:
    """Return an account as tables: how long it took and what it took, and what of the volume's time was lost."""
    spent = done.seconds
    times = (spent.detect, spent.fence, spent.determine, spent.recover, spent.serve, spent.waited, spent.total)
    lost = done.lost
    return [
        Sheet(
            ("detect", "fence", "determine", "recover", "serve", "waited", "seconds in all (RTO)"),
            (tuple(f"{seconds:.1f}" for seconds in times),),
        ),
        Sheet(
            ("volume (RPO)", "recovered files", "other changed files", "seconds of changes lost"),
            ((f"{lost.volume:.1f}", f"{lost.recovered:.1f}", f"{lost.others:.1f}", f"before {moment(done.served_ns)}"),),
            f"{done.sentence}. Proof: {done.proof}.",
        ),
    ]


def followed_document(followed: Followed) -> dict[str, Any]:
    """Return what a node that follows again held, as one JSON document with its sentence."""
    return {**to_document(followed), "sentence": followed.sentence}


def followed_sheets(followed: Followed, rows: int) -> list[Sheet]:
    """Return the two lists as tables, ``rows`` files of each; the stored lists have all."""
    held = followed.comparison.held
    listed = tuple(
        (found.there.value, found.here.value, bytes_words(found.size_bytes), moment(found.mtime_ns), found.path) for found in held[:rows]
    )
    more = f"{len(held) - rows:,} more; " if len(held) > rows else ""
    return [
        Sheet(
            (f"on {followed.node}", f"on {followed.primary}", "size", "changed", f"file that only {followed.node} has like this"),
            listed,
            f"{followed.sentence}. {more}all are in {followed.lists}",
        )
    ]


def rehearsal_document(found: Rehearsal) -> dict[str, Any]:
    """Return a rehearsal as one JSON document with its verdict and its sentence."""
    return {**to_document(found), "sound": found.sound, "sentence": found.sentence}
