"""Plans and accounts as tables."""

from __future__ import annotations

from typing import Any

from agent.contract.messages import to_document
from mgmt.failover.account import Account
from mgmt.failover.failback import Followed
from mgmt.failover.plan import Plan, Step
from mgmt.failover.rehearsal import Rehearsal
from mgmt.failover.rescue import Rescued, RescuePlan
from mgmt.failover.returned import HeldFile, Returned
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
    more = f"{len(held) - rows:,} more; " if len(held) > rows else ""
    fetch = f"; `landfall rescue {followed.volume}` brings what is wanted of it" if held else ""
    return [_held(followed.node, followed.primary, held[:rows], f"{followed.sentence}. {more}all are in {followed.lists}{fetch}")]


def held_sheet(lists: Returned, rows: int) -> Sheet:
    """Return what a node that returned still holds as a table of ``rows`` files."""
    held = lists.comparison.held
    more = f", {len(held) - rows:,} of them not shown (--rows, --json)" if len(held) > rows else ""
    return _held(lists.node, lists.primary, held[:rows], f"{len(held):,} files are kept in {lists.node}'s {lists.kept.name}{more}.")


def conflicts_sheet(plan: RescuePlan, rows: int) -> Sheet:
    """Return the files that a rescue would replace although they were changed meanwhile."""
    count = len(plan.conflicts)
    note = (
        f"{count:,} files were changed on {plan.lists.primary} meanwhile, and would be replaced."
        if count
        else "Nothing in the way is known."
    )
    return _held(plan.lists.node, plan.lists.primary, plan.conflicts[:rows], note)


def placed_sheet(done: Rescued, rows: int) -> Sheet:
    """Return where rescued files are."""
    refused = {found.path for found in done.refused}
    placed = tuple((found.path, found.at) for found in done.placed if found.path not in refused)
    return Sheet((f"file of {done.node}", "is now at"), placed[:rows], f"{len(placed) - rows:,} more." if len(placed) > rows else "")


def _held(node: str, primary: str, files: tuple[HeldFile, ...], note: str) -> Sheet:
    listed = tuple(
        (found.there.value, found.here.value, bytes_words(found.size_bytes), moment(found.mtime_ns), found.path) for found in files
    )
    return Sheet((f"on {node}", f"on {primary}", "size", "changed", f"file that only {node} has like this"), listed, note)


def rehearsal_document(found: Rehearsal) -> dict[str, Any]:
    """Return a rehearsal as one JSON document with its verdict and its sentence."""
    return {**to_document(found), "sound": found.sound, "sentence": found.sentence}
