"""What each step of a failover does. Every step may be done twice: if we die in it, or before it is recorded, the next run does it again.

replicate, finish  go on with the transfer that there is; agents know it
quiesce            what is read-only stays read-only; an address that is given up stays so
verify             only looks
demote             a node that is demoted already says so
fence              a node that is fenced is fenced once more. If we die after it is recorded, no second fence is needed
salvage            what the target has salvaged and we have not recorded is undone and salvaged again: nobody has served it yet
promote            a node that is primary at this epoch already says so
address, serve     what is there already is left as it is; both name the epoch, so that nobody overtaken can do them
record             the catalog says again what it says; the agents' roles are the truth
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from agent.contract import messages as m
from agent.contract.errors import DmiMalformed, FenceUnproved, NoSuchTransfer, VerifyFailed
from agent.system.clock import wall_ns
from mgmt.catalog import VolumeEntry
from mgmt.failover.account import account
from mgmt.failover.journal import FailoverEntry, Journal
from mgmt.failover.plan import Plan, Step
from mgmt.fencing.kinds import FenceKind
from mgmt.fencing.proof import Evidence, fence, program_of
from mgmt.fencing.protocol import AgentOptions, FenceRequest
from mgmt.report import LossStatement
from mgmt.run import replication
from mgmt.run import salvage as salvages
from mgmt.run.leases import let_serve
from mgmt.run.site import Site, Teller
from mgmt.run.volumes import facts_of

PERSON_LIMIT_S: Final = 3600.0
"""How long a person may take to go and look."""

HISTORY_KIND: Final = "failover"

StepFacts = dict[str, Any]
"""What the journal keeps of a step, as JSON."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step works on. ``confirmed`` is the node that the operator said beforehand to be off."""

    site: Site
    journal: Journal
    failover: FailoverEntry
    confirmed: str
    tell: Teller

    @property
    def plan(self) -> Plan:
        """The plan that is carried out."""
        return self.failover.plan

    @property
    def volume(self) -> VolumeEntry:
        """The volume as the catalog has it now."""
        return self.site.catalog.volume(str(self.plan.volume))


def replicate(work: Work) -> StepFacts:
    """Bring the target up to the source while clients work, so that they are cut off for the rest only."""
    done = replication.replicate(work.site, work.plan.name, tell=work.tell, within_failover=True)
    return {"generation": done.target.name}


def quiesce(work: Work) -> StepFacts:
    """Let nobody write any more: exports end, then the address goes; the volume stays mounted, read-only."""
    source = work.site.node(work.plan.source)
    source.ask(m.StopServing(work.plan.volume, quiesce=True))
    if work.plan.address:
        source.ask(m.DropAddress(work.plan.volume, work.plan.address))
    return {}


def verify(work: Work) -> StepFacts:
    """Prove that both hold the same newest generation; VerifyFailed. That its blocks are the same was proved when it was committed."""
    plan = work.plan
    held = [m.newest(facts_of(work.site.node(node), plan.volume).generations).id for node in (plan.source, plan.target)]
    if held[0] != held[1]:
        raise VerifyFailed(f"{plan.source} holds {held[0].name} and {plan.target} {held[1].name} as the newest generation")
    return {"generation": held[0].name}


def demote(work: Work) -> StepFacts:
    """Let the source give the volume up; its word is the proof. What it held that is on no other node is named."""
    plan = work.plan
    kept = work.site.node(plan.source).ask(m.DemoteVolume(plan.volume, plan.epoch)).kept
    words = f"{plan.source} is secondary at epoch {plan.epoch}"
    work.journal.note_evidence(Evidence("demotion", plan.source, plan.volume, plan.epoch - 1, 0, True, words, wall_ns(), 0.0))
    return {"proved": True, "words": words, "kept": kept.id.name if kept else ""}


def fence_off(work: Work) -> StepFacts:
    """Have the proof that the source cannot write; FenceUnproved. Forced, what has no proof is recorded as a split brain."""
    plan = work.plan
    words = "no fence is configured"
    if plan.fence:
        evidence = fence_node(work.site, work.volume, plan.source, plan.epoch - 1, work.confirmed)
        work.journal.note_evidence(evidence)
        if evidence.proved:
            return {"proved": True, "words": evidence.words}
        words = evidence.words
        if not plan.forced:
            raise FenceUnproved(f"the fence {plan.fence} gave no proof that {plan.source} cannot write", cause=f"{evidence.code}: {words}")
    work.site.catalog.note_split_brain(plan.volume, plan.source, plan.epoch, wall_ns())
    return {"proved": False, "words": words}


def fence_node(site: Site, volume: VolumeEntry, node: str, epoch: int, confirmed: str) -> Evidence:
    """Run a node's fence and return what it said."""
    entry = site.inventory.entry(node)
    kind, options = FenceKind(entry.fence), entry.fence_options
    lease_s = site.catalog.lease(volume.id, node)
    asked = AgentOptions(
        options.domain,
        options.uri,
        str(options.directory or ""),
        lease_s,
        entry.pausable,
        confirmed,
        entry.address,
        entry.ssh_port,
        entry.ssh_user,
        str(entry.ssh_key),
        entry.host_key,
        site.catalog.term,
    )
    extra_s = {FenceKind.MANUAL: PERSON_LIMIT_S, FenceKind.LEASE: 2 * lease_s}.get(kind, 0.0)
    return fence(
        kind, program_of(kind, options.program), FenceRequest(node, volume.id, epoch, asked), options.limit_s + extra_s, site.program
    )


def salvage(work: Work) -> StepFacts:
    """Recover the whole files of the unfinished transfer. One of which not even the DMI arrived is given up: the base is what there is."""
    site, plan = work.site, work.plan
    target = site.node(plan.target)
    found = next((facts for facts in target.ask(m.ListTransfers()).transfers if facts.id == plan.transfer), None)
    if found is None or found.state is m.TransferState.COMMITTED:
        return {}
    if found.state is m.TransferState.SALVAGED:
        recorded = [
            entry.statement for entry in site.catalog.salvages(plan.volume) if entry.transfer == found.id and entry.undone_ns is None
        ]
        if recorded:
            return _facts_of(recorded[-1])
        target.ask(m.UndoSalvage(plan.volume))
    detect_s = max(0.0, (work.failover.begun_ns - work.failover.lost_ns) / 1e9)
    try:
        statement = salvages.salvage(site, plan.name, transfer=found.id, declare_dead=True, detect_s=detect_s, tell=work.tell)
    except (NoSuchTransfer, DmiMalformed) as error:
        with contextlib.suppress(NoSuchTransfer):
            target.ask(m.DiscardTransfer(found.id))
        site.catalog.end_transfer(found.id, "discarded", wall_ns())
        site.catalog.mark_handled(found.id)
        return {"given_up": str(error)}
    return _facts_of(statement) if statement else {}


def promote(work: Work) -> StepFacts:
    """Make the target primary at the new epoch."""
    facts = work.site.node(work.plan.target).ask(m.PromoteVolume(work.plan.volume, work.plan.epoch))
    newest = m.newest(facts.generations)
    return {"generation": newest.id.name, "taken_ns": newest.taken_ns}


def address(work: Work) -> StepFacts:
    """Let the target take the volume's address; AddressTaken if somebody else answers for it."""
    if work.plan.address:
        work.site.node(work.plan.target).ask(m.TakeAddress(work.plan.volume, work.plan.address))
    return {}


def serve(work: Work) -> StepFacts:
    """Let the target mount and export the volume."""
    facts = let_serve(work.site, work.volume, work.plan.target, work.plan.epoch)
    return {"mount_point": facts.mount_point}


def record(work: Work) -> StepFacts:
    """Let the catalog say who is who, and its history what happened."""
    plan = work.plan
    done = account(work.journal.entry(work.failover.id))
    work.site.catalog.set_volume(replace(work.volume, primary=plan.target, secondary=plan.source, epoch=plan.epoch))
    said = work.site.catalog.history(plan.volume, kind=HISTORY_KIND, newest=1)
    if not said or said[-1].facts.get("id") != str(done.id):
        work.site.catalog.note(plan.volume, HISTORY_KIND, done.sentence, done.served_ns, m.to_document(done))
    return {}


ACTIONS: Final[dict[Step, Callable[[Work], StepFacts]]] = {
    Step.REPLICATE: replicate,
    Step.QUIESCE: quiesce,
    Step.FINISH: replicate,
    Step.VERIFY: verify,
    Step.DEMOTE: demote,
    Step.FENCE: fence_off,
    Step.SALVAGE: salvage,
    Step.PROMOTE: promote,
    Step.ADDRESS: address,
    Step.SERVE: serve,
    Step.RECORD: record,
}
"""What is done for each step; each returns what the journal keeps of it."""


def _facts_of(statement: LossStatement) -> StepFacts:
    return {
        "generation": statement.generation.name if statement.generation else "",
        "complete": statement.complete,
        "changed": statement.files.changed,
        "recovered": statement.files.recovered,
        "base_taken_ns": statement.base_taken_ns,
        "target_taken_ns": statement.target_taken_ns,
        "determine_s": statement.seconds.determine,
        "recover_s": statement.seconds.recover,
    }
