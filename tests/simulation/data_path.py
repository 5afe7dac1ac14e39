"""What stands for the data path: a transfer is a few seconds in which both nodes have to reach each other, and then it is committed.

What the product keeps of transfers, and what it refuses to receive, is its own. A transfer that breaks off leaves no DMI on the receiving
side: nothing of it can be salvaged, and a failover gives it up.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from agent.contract import messages as m
from agent.contract.errors import LinkLost
from agent.contract.identity import GenerationKind
from agent.service import receiving
from agent.service.node import Node, ProgressCall
from agent.service.transfers import interrupted, is_held, known_transfer
from agent.transfer.store import TransferRecord
from tests.simulation.world import Mailbox, current, pause
from tests.unit.mgmt_dmis import HEAD, File, make

if TYPE_CHECKING:
    from tests.simulation.agent import Agent

FILES = [File((b"a file",), needs=(0,), size=10)]


def probe(agent: Agent, node: Node, arguments: m.ProbePeer, progress: ProgressCall) -> m.Probed:
    """Return whether this node gets a connection to its peer."""
    if agent.connects(agent.host, agent.peer.host):
        pause(0.001)
        return m.Probed(True, "")
    pause(arguments.limit_s)
    return m.Probed(False, f"no answer within {arguments.limit_s:g} s")


def build(agent: Agent, node: Node, arguments: m.BuildTransfer, progress: ProgressCall) -> m.Built:
    """Make a transfer with a DMI of one file."""
    volume = node.record(arguments.target.volume)
    node.generation(arguments.base)
    node.generation(arguments.target)
    with node.job(volume.id, "transfer.build"):
        differential = m.Differential.VERIFY
        record = TransferRecord(arguments.transfer, arguments.base, arguments.target, differential, True, m.TransferState.BUILDING, 0)
        node.store.create(record)
        pause(agent.world.rng.uniform(0.1, 1.0))
        head = dataclasses.replace(HEAD, transfer=record.id, base=record.base, target=record.target)
        node.store.store_dmi(record.id, dataclasses.replace(make(FILES, 1), head=head).encode())
        node.store.set_state(record.id, m.TransferState.WAITING)
    return m.Built(1, 1, 4096, len(node.store.dmi_bytes(record.id)), node.store.dmi_digest(record.id).hex())


def receive(agent: Agent, node: Node, arguments: m.ReceiveTransfer, progress: ProgressCall) -> m.Listening:
    """Be ready for a transfer, if the product would."""
    volume = node.record(arguments.target.volume)
    with node.job(volume.id, "transfer.receive"):
        record = receiving._expected(node, volume, arguments)
        held = is_held(node, record.target)
        node.store.set_state(record.id, m.TransferState.COMMITTED if held else m.TransferState.INTERRUPTED)
    return m.Listening(agent.host.address, 7000)


def send(agent: Agent, node: Node, arguments: m.SendTransfer, progress: ProgressCall) -> m.Sent:
    """Send for some seconds, then have it committed over there; LinkLost if they lose each other."""
    record = known_transfer(node, arguments.transfer, sending=True)
    with node.job(record.target.volume, "transfer.send"):
        node.store.set_state(record.id, m.TransferState.RUNNING)
        try:
            for _ in range(agent.world.rng.randint(1, 5)):
                pause(1.0)
                _refuse_lost(agent)
            _committed_there(agent, record, agent.host.disk.content[record.target])
        except LinkLost:
            interrupted(node, record, None)
            raise
        node.store.set_state(record.id, m.TransferState.COMMITTED)
    return m.Sent(4096, 1, 0, 0)


def _committed_there(agent: Agent, record: TransferRecord, content: int) -> None:
    """Return once the peer has committed. What it commits is as it was when it was sent."""
    peer, box, process = agent.peer, Mailbox(), agent.peer.process
    there = peer.node
    if process is None or not process.alive or there is None:
        raise LinkLost("nobody listens there")

    def commit() -> None:
        volume = there.record(record.target.volume)
        with there.job(volume.id, "transfer.commit"):
            own = there.store.load(record.id)
            if not is_held(there, own.target):
                receiving._refuse_unfit_base(there, volume, own.base, own.target)
                peer.host.disk.receive(m.GenerationFacts(own.target, GenerationKind.COMMITTED, 1), content)
            there.store.set_state(own.id, m.TransferState.COMMITTED)
            receiving._follow(there, own)
        peer.world.say(current().process.name, f"commits {own.target.name} of epoch {own.target.epoch}")
        peer.world.after(0.001, lambda: box.bring(True))

    process.start(commit, "commit")
    if not box.wait(20.0):
        raise LinkLost("it was not committed")
    _refuse_lost(agent)


def _refuse_lost(agent: Agent) -> None:
    if not (agent.connects(agent.host, agent.peer.host) and agent.peer.runs):
        raise LinkLost("the other side is gone")


HANDLERS: dict[type[Any], Any] = {m.ProbePeer: probe, m.BuildTransfer: build, m.ReceiveTransfer: receive, m.SendTransfer: send}
"""One for each verb whose place is taken here; the agent is the first argument."""
