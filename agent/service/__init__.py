"""What the agent does when it is asked: one module per noun of the control plane, one function per verb.

node         what the handlers work on: configuration, substrate, transfers, outbox, exports; one job per volume
term         which management node is obeyed
volumes      create, admit, list
adoption     appraise, adopt
serving      promote, serve, unserve, demote
addresses    take, drop; the lookout for others who have them
leases       lease; the watch over them
growth       more room for a volume
removal      the end of a volume
peers        probe
generations  take, take together, drop, open, close
restoring    restore, receive, send: single files
verification examine, digests, owners
sending      build, send (NAS 1)
transfers    list, fetch, discard
mending      blocks of a generation that is damaged on one node
receiving    receive (NAS 2)
salvages     update, undo
outbox       notifications kept for the management node
devices      what block devices there are
health       what a preflight must know
show         a DMI in words
metrics      a file for Prometheus
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.config import Config
from agent.contract import messages as m
from agent.service import (
    addresses,
    adoption,
    devices,
    generations,
    growth,
    health,
    leases,
    mending,
    peers,
    receiving,
    removal,
    restoring,
    salvages,
    sending,
    serving,
    transfers,
    verification,
    volumes,
)
from agent.service.metrics import TextFile
from agent.service.node import Node, ProgressCall

HANDLERS: dict[type[Any], Callable[[Node, Any, ProgressCall], Any]] = {
    m.Hello: lambda node, arguments, progress: node.facts(),
    m.AskHealth: health.health,
    m.OpenPath: health.open_path,
    m.TryPath: health.try_path,
    m.ListDevices: devices.list_devices,
    m.CreateVolume: volumes.create,
    m.AppraiseVolume: adoption.appraise,
    m.AdoptVolume: adoption.adopt,
    m.AdmitReplica: volumes.admit,
    m.ListVolumes: volumes.list_volumes,
    m.PromoteVolume: serving.promote,
    m.ServeVolume: serving.serve,
    m.StopServing: serving.unserve,
    m.DemoteVolume: serving.demote,
    m.GrowVolume: growth.grow,
    m.RemoveVolume: removal.remove,
    m.TakeGeneration: generations.take,
    m.TakeTogether: generations.take_together,
    m.DropGeneration: generations.drop,
    m.OpenGeneration: generations.open_generation,
    m.CloseGeneration: generations.close_generation,
    m.RestoreFiles: restoring.restore_files,
    m.ExamineGeneration: verification.examine,
    m.FetchDigests: verification.fetch_digests,
    m.FindOwners: verification.find_owners,
    m.BuildTransfer: sending.build_transfer,
    m.BuildMend: mending.build_mend,
    m.ReceiveTransfer: receiving.receive,
    m.SendTransfer: sending.send_transfer,
    m.ListTransfers: transfers.list_transfers,
    m.FetchDmi: transfers.fetch_dmi,
    m.FetchArrival: transfers.fetch_arrival,
    m.DiscardTransfer: transfers.discard,
    m.UpdateInstruction: salvages.update,
    m.UndoSalvage: salvages.undo_salvage,
    m.ReceiveFiles: restoring.receive_files,
    m.SendFiles: restoring.send_some,
    m.RenewLease: leases.renew,
    m.TakeAddress: addresses.take,
    m.DropAddress: addresses.drop,
    m.ProbePeer: peers.probe,
    m.ReadOutbox: lambda node, arguments, progress: m.Outbox(node.outbox.read(arguments.after, arguments.wait_s)),
    m.AcknowledgeOutbox: lambda node, arguments, progress: _acknowledge(node, arguments),
}
"""One handler per kind of arguments; the daemon proves at its start that none is missing."""


class Service:
    """The agent's verbs on one node."""

    def __init__(self, config: Config) -> None:
        if set(HANDLERS) != {arguments for arguments, _ in m.VERBS.values()}:
            raise RuntimeError("a verb has no handler")
        self._node = Node(config)
        self._lookout: addresses.Lookout | None = None
        self._metrics: TextFile | None = None

    def recover(self) -> None:
        """Finish or sweep what the last run of the agent left half done."""
        self._node.recover()
        transfers.recover(self._node)
        self._node.watch = devices.watch(self._node)
        salvages.recover(self._node)
        self._lookout = addresses.Lookout(self._node)
        self._lookout.begin()
        leases.LeaseWatch(self._node)
        if self._node.config.metrics_textfile:
            self._metrics = TextFile(self._node, Path(self._node.config.metrics_textfile))

    def admit(self, term: object, *, looking: bool) -> None:
        """Let a request of a management node's term in; StaleTerm if one of a higher term was heard and it does more than look."""
        self._node.term.admit(term, looking=looking)

    def handle(self, arguments: Any, progress: ProgressCall) -> Any:
        """Return the answer to a request: the verb's result, or bytes for a blob."""
        return HANDLERS[type(arguments)](self._node, arguments, progress)

    def close(self) -> None:
        """End what runs in the background; transfers stay resumable."""
        if self._metrics is not None:
            self._metrics.close()
        if self._lookout is not None:
            self._lookout.close()
        self._node.close()


def _acknowledge(node: Node, arguments: m.AcknowledgeOutbox) -> m.Done:
    node.outbox.acknowledge(arguments.sequence)
    return m.Done()
