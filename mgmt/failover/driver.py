"""A failover from the first look to the record. One that was broken off goes on at the step where it stopped.

Which step is next is what the journal says; nothing else is remembered. If we die anywhere, the same command goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from agent.contract import messages as m
from agent.contract.errors import DeviceFailed, FenceUnproved, LandfallError, NoSuchVolume
from agent.system.clock import wall_ns
from agent.system.failpoint import failpoint
from mgmt.catalog import VolumeEntry
from mgmt.failover.account import Account, account
from mgmt.failover.journal import FailoverEntry, Journal
from mgmt.failover.plan import HAND_OVER, Facts, FailoverKind, Plan, Step, Wish, plan
from mgmt.failover.steps import ACTIONS, Work
from mgmt.failover.witness import look
from mgmt.run import notices
from mgmt.run.leases import let_serve
from mgmt.run.roles import roles_of
from mgmt.run.site import Site, Teller, nobody, operator
from mgmt.run.volumes import facts_of

Decision = Callable[[Plan], bool]
"""Shown the plan before anything is changed; False stops it."""

GIVEN_UP: Final = "given-up"
DONE: Final = "done"


def failover(
    site: Site,
    name: str,
    wish: Wish,
    *,
    confirmed: str = "",
    decide: Decision = lambda _: True,
    lost_ns: int | None = None,
    tell: Teller = nobody,
) -> Account | None:
    """Return what the failover cost, once the volume is served by the node that was its secondary; None if ``decide`` said no.

    ``lost_ns``: when the primary was lost, where somebody knows better than the notifications. Raises the plan's refusals; FenceUnproved
    with nothing changed; FailoverBusy while another command is at it. Any other error leaves a failover that the next call goes on with,
    but a planned one that had not yet demoted the source is taken back: the source serves again.
    """
    entry = site.catalog.volume(name)
    with site.alone(entry.id):
        journal = Journal(site.catalog)
        current = journal.open_entry(entry.id)
        if current is not None and _gives_way(current, wish):
            journal.end(current.id, GIVEN_UP)
            current = None
        if current is None:
            made = _planned(site, entry, wish, keep=True)
            if not decide(made):
                return None
            current = journal.begin(made, operator(), _lost(site, made) if lost_ns is None else lost_ns)
        return _carried_out(Work(site, journal, current, confirmed, tell))


def preview(site: Site, name: str, wish: Wish) -> tuple[Plan, Step]:
    """Return what `failover` would carry out and the step at which it would begin; nothing is changed, nothing recorded."""
    entry = site.catalog.volume(name)
    current = Journal(site.catalog).open_entry(entry.id)
    if current is not None and not _gives_way(current, wish):
        return current.plan, current.next_step or Step.RECORD
    made = _planned(site, entry, wish, keep=False)
    return made, made.steps[0]


def _gives_way(current: FailoverEntry, wish: Wish) -> bool:
    """Whether a planned failover that was broken off before the source was demoted makes room for one that is not planned."""
    return current.plan.kind is FailoverKind.PLANNED and current.next_step in HAND_OVER and not wish.planned


def _planned(site: Site, entry: VolumeEntry, wish: Wish, *, keep: bool) -> Plan:
    """Return the plan from what is seen now. Where the agents say that the roles are others than we thought, theirs count."""
    facts = _seen(site, entry)
    held = {entry.primary: facts.source, entry.secondary: facts.target}
    actual = roles_of(entry, held)
    if actual != entry:
        if keep:
            site.catalog.set_volume(actual)
        facts = _seen(site, actual)
    return plan(facts, wish)


def _seen(site: Site, entry: VolumeEntry) -> Facts:
    sight = look(site, entry.primary, entry.secondary)
    target = site.node(entry.secondary)
    source = None
    if sight.agent:
        # One that was made anew holds nothing; one whose disk failed can say nothing, and that must not keep the other from taking over.
        with contextlib.suppress(NoSuchVolume, DeviceFailed):
            source = facts_of(site.node(entry.primary), entry.id)
    receptions = tuple(found for found in target.ask(m.ListTransfers()).transfers if found.volume == entry.id and not found.sending)
    return Facts(
        entry,
        sight,
        source,
        facts_of(target, entry.id),
        receptions,
        site.inventory.entry(entry.primary).fence,
        site.catalog.split_brain(entry.id) is not None,
    )


def _carried_out(work: Work) -> Account:
    """Do the steps that are left, each recorded before the next begins."""
    while (step := work.failover.next_step) is not None:
        failover_id = work.failover.id
        work.journal.begin_step(failover_id, step)
        failpoint(f"failover.before_{step}")
        work.tell(work.plan.target if step not in HAND_OVER else work.plan.source, m.Progress(step, 0, 0))
        try:
            facts = ACTIONS[step](work)
        except FenceUnproved as error:
            work.journal.end(failover_id, error.code)
            raise
        except LandfallError as error:
            if step in HAND_OVER and step is not Step.DEMOTE:
                _take_back(work, error)
            raise
        failpoint(f"failover.after_{step}")
        work.journal.end_step(failover_id, step, facts)
        work = replace(work, failover=work.journal.entry(failover_id))
    work.journal.end(work.failover.id, DONE)
    return account(work.journal.entry(work.failover.id))


def _take_back(work: Work, error: LandfallError) -> None:
    """Let the source serve again what it is still primary of. If we die here, or it cannot be told, the failover stays open: nobody serves
    then, and the next `failover --planned` goes on with it.
    """
    plan, source = work.plan, work.site.node(work.plan.source)
    try:
        epoch = facts_of(source, plan.volume).epoch
        if plan.address:
            source.ask(m.TakeAddress(plan.volume, plan.address))
        let_serve(work.site, work.volume, plan.source, epoch)
    except LandfallError as second:
        error.add_note(f"{plan.source} could not be made to serve again: {second}")
        return
    error.add_note(f"{plan.source} serves {plan.name} again; nothing was handed over")
    work.journal.end(work.failover.id, error.code)


def _lost(site: Site, made: Plan) -> int:
    """Return the primary's last sign as far as it is known: what was said of the transfer that broke off, else now."""
    now = wall_ns()
    if made.transfer is None:
        return now
    notices.collect(site, (made.target,))
    said = [
        seen.notification.at_ns
        for seen in site.catalog.notifications(made.volume, pending_only=True)
        if seen.notification.transfer == made.transfer
    ]
    ordered = site.catalog.transfer(made.transfer)
    ended = [ordered.ended_ns] if ordered is not None and ordered.ended_ns is not None and ordered.ending else []
    return min([now, *said, *ended])
