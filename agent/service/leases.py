"""The verb on leases, and the watch that tells what became of them.

A volume that was given a lease is served until its end and no longer: the keeper (agent.serving.keeper) gives it up before that, unless it
is renewed. What ended is begun again by an order to serve, not by a renewal: in between somebody else may have been promoted.
"""

from __future__ import annotations

import logging
from typing import Final

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, LandfallError, LeaseEnded
from agent.service.node import Node, ProgressCall
from agent.service.serving import LOCKS_S, lease_end_ns, require_primary
from agent.serving.keeper import wants_keeping
from agent.serving.tenure import is_over
from agent.system.clock import boottime_ns
from agent.system.files import locked

HANDS_S: Final = 60.0

log = logging.getLogger("landfall.agent")


def renew(node: Node, arguments: m.RenewLease, progress: ProgressCall) -> m.Lease:
    """Let a volume be served for so many seconds from now on; LeaseEnded if it has been given up, or must be by now.

    The lease is written first and the mark of its end read afterwards: whoever gives up marks before he acts, so a renewal that was
    answered was in time, or what it renewed is given up all the same. If we die here, the old lease or the new one is in force.
    """
    now_ns = boottime_ns()
    record = node.record(arguments.volume)
    require_primary(node, record, arguments.epoch)
    until_ns = lease_end_ns(node, arguments.seconds, now_ns)
    tenure = node.tenures.of(record.id)
    if tenure is None or not tenure.confirmed or tenure.epoch != record.epoch:
        raise LeaseEnded(f"node {node.config.node} was not told to serve volume {record.name} since its last boot")
    if is_over(tenure, now_ns, node.config.lease_margin_s):
        raise LeaseEnded(f"the lease of volume {record.name} is over on node {node.config.node}")
    with locked(node.keeper.folder / "gate", wait_s=LOCKS_S):
        leased = node.tenures.lease(record.id, record.name, record.epoch, until_ns)
        node.keep(node.keeper)
    if (ended := node.tenures.ended(leased)) is not None:
        raise LeaseEnded(f"volume {record.name} was given up on node {node.config.node}", cause=ended.reason)
    return m.Lease((until_ns - boottime_ns()) / 1e9)


class LeaseWatch:
    """A thread that sees to it that leases have a keeper, and tells the management node of those that ended."""

    def __init__(self, node: Node, *, every_s: float = 1.0) -> None:
        self._node = node
        self._every_s = every_s
        node.machine.threads.start(self._run, "leases")

    def _run(self) -> None:
        while not self._node.ending.wait(self._every_s):
            try:
                self._look()
            except (LandfallError, OSError) as error:
                log.warning("leases: %s", error)

    def _look(self) -> None:
        node = self._node
        for tenure in node.tenures.all():
            mark = node.tenures.ended(tenure)
            if wants_keeping(node.keeper, node.machine, node.tenures, tenure):
                with locked(node.keeper.folder / "gate", wait_s=0.0):
                    node.keep(node.keeper)
            if mark is not None and not mark.told:
                try:
                    with locked(node.keeper.folder / "hands", wait_s=HANDS_S):
                        if (mark := node.tenures.ended(tenure)) is not None and not mark.told:
                            words = f"node {node.config.node} gave volume {tenure.name} up at epoch {tenure.epoch}: {mark.reason}"
                            node.outbox.put("lease-ended", tenure.volume, None, words)
                            node.tenures.mark_ended(tenure, mark.reason, told=True)
                except DeviceBusy:
                    continue  # it is being given up at this moment
