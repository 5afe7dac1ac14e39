"""Who serves a volume: promote, serve, unserve, demote.

Order to begin: role, mount, address, export; to end: clients' connections, address, export, mount, role (agent.serving.exports says why an
export outlives the address). So nothing is reachable that is not mounted, and nothing is mounted for clients on a node whose record does
not say primary. Each step is durable or undone by a reboot before the next begins; asked again after a death, a verb goes on from what is
true.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final

from agent.contract import messages as m
from agent.contract.errors import DeviceBusy, EpochStale, LeaseEnded, NoSuchGeneration, NotPrimary, RequestRefused
from agent.contract.identity import GenerationId, GenerationKind, next_generation
from agent.service.generations import settle
from agent.service.node import Node, ProgressCall
from agent.service.transfers import give_up, records_of
from agent.serving.tenure import Tenure, is_over, remaining_s
from agent.system.clock import boottime_ns, wall_ns
from agent.system.failpoint import failpoint
from agent.system.files import locked
from agent.volume.substrate import VolumeRecord

LONGEST_LEASE_S: Final = 86400.0
LOCKS_S: Final = 90.0


def promote(node: Node, arguments: m.PromoteVolume, progress: ProgressCall) -> m.VolumeFacts:
    """Make a secondary the primary at the epoch that follows its own; its newest generation becomes the operational volume.

    TransferBusy while it receives or salvages. If we die before the role is recorded it is a secondary still, and asking again clones
    again; a generation is never written to, so nothing is lost by that.
    """
    record = node.record(arguments.volume)
    if not _is_primary_at(record, arguments.epoch):
        with node.job(record.id, "volume.promote"):
            record = node.record(record.id)
            if record.role is m.Role.PRIMARY or arguments.epoch != record.epoch + 1:
                raise EpochStale(f"{_standing(node, record)}; it cannot become primary at epoch {arguments.epoch}")
            newest = m.newest(node.substrate.generations(record.id))
            if newest.kind is GenerationKind.EMPTY:
                raise NoSuchGeneration(
                    f"node {node.config.node} holds no generation of volume {record.name}: it was never replicated",
                    fix="`landfall replicate` brings one.",
                )
            node.substrate.clone_operational(record.id, newest.id)
            failpoint("promote.before_role")
            node.substrate.set_role(record.id, m.Role.PRIMARY, arguments.epoch)
            failpoint("promote.after_role")
    return facts_of(node, node.record(record.id))


def serve(node: Node, arguments: m.ServeVolume, progress: ProgressCall) -> m.VolumeFacts:
    """Mount and export a volume on its primary; asked twice, once. EpochStale, NotPrimary.

    If we die here it is confirmed, perhaps mounted, perhaps exported: asking again does what is missing.
    """
    began_ns = boottime_ns()
    record = node.record(arguments.volume)
    with nullcontext() if _is_mounted(node, record) else node.job(record.id, "volume.serve"):  # what is mounted may be sending
        record = node.record(record.id)
        require_primary(node, record, arguments.epoch)
        start_serving(node, record, lease_end_ns(node, arguments.lease_s, began_ns) if arguments.lease_s else None)
    return facts_of(node, record)


def unserve(node: Node, arguments: m.StopServing, progress: ProgressCall) -> m.VolumeFacts:
    """End exports and the address, then unmount, or with ``quiesce`` remount read-only; DeviceBusy if a local process holds a file open."""
    record = node.record(arguments.volume)
    with node.job(record.id, "volume.unserve"):
        stop_serving(node, record, quiesce=arguments.quiesce)
        if node.serving(record) and not arguments.quiesce:
            raise DeviceBusy(f"volume {record.name} is still mounted")
    return facts_of(node, record)


def demote(node: Node, arguments: m.DemoteVolume, progress: ProgressCall) -> m.Demoted:
    """Make a primary that was overtaken a secondary, and keep what it still held that its peer is not known to have.

    Order: stop serving, keep, give up what it was sending, role. If we die on the way it is primary still and serves nothing; asked again,
    what is kept already is found, not kept twice. Transfers go before the role, since only a primary gives up what it was salvaged from.
    """
    record = node.record(arguments.volume)
    with node.job(record.id, "volume.demote"):
        record = node.record(record.id)
        if arguments.epoch < record.epoch or (record.role is m.Role.PRIMARY and arguments.epoch == record.epoch):
            raise EpochStale(f"{_standing(node, record)}; epoch {arguments.epoch} does not overtake it")
        if record.role is m.Role.SECONDARY:
            node.substrate.set_role(record.id, m.Role.SECONDARY, arguments.epoch)
            last = node.substrate.generations(record.id)[-1]  # what was kept at this demotion, for as long as nothing newer came
            return m.Demoted(last if last.kind is GenerationKind.KEPT else None)
        tenure = node.tenures.of(record.id)
        stop_serving(node, record)
        failpoint("demote.before_keep")
        kept = None if tenure is not None and _is_all_sent(node, record, tenure) else _keep(node, record)
        failpoint("demote.after_keep")
        for transfer in records_of(node, record.id):
            if transfer.state is m.TransferState.SALVAGED or (transfer.sending and transfer.state is not m.TransferState.COMMITTED):
                give_up(node, transfer, with_target=False)
        failpoint("demote.before_role")
        node.substrate.set_role(record.id, m.Role.SECONDARY, arguments.epoch)
        failpoint("demote.after_role")
        node.tenures.end(record.id)
    return m.Demoted(kept)


def facts_of(node: Node, record: VolumeRecord) -> m.VolumeFacts:
    """Return what this node knows of a volume."""
    generations = node.substrate.generations(record.id)
    serving = node.serving(record)
    mount_point = node.mount_point(record)
    salvaged = bool(generations) and m.newest(generations).kind is GenerationKind.SALVAGED
    tenure = node.tenures.of(record.id) or Tenure(record.id, record.name, record.epoch, "")
    in_force = node.tenures.ended(tenure) is None
    return m.VolumeFacts(
        record.id,
        record.name,
        record.filesystem,
        record.size_bytes,
        record.role,
        m.ReplicaState.OUTDATED if salvaged and not serving else m.ReplicaState.UP_TO_DATE,
        record.epoch,
        serving,
        str(node.machine.mounts.device_of(mount_point)) if serving else "",
        str(mount_point) if serving else "",
        generations,
        lease_s=remaining_s(tenure, boottime_ns()) if in_force else None,
        address=tenure.address if in_force else "",
        confirmed=in_force and tenure.served and _is_primary_at(record, tenure.epoch),
        exports=node.exports.protocols(node.share(record)) if serving else (),
        sector_bytes=record.sector_bytes,
        rests=tenure.rests_after is not None,
    )


def require_primary(node: Node, record: VolumeRecord, epoch: int) -> None:
    """NotPrimary or EpochStale unless this node is the primary of a volume at exactly this epoch."""
    if record.role is not m.Role.PRIMARY:
        raise NotPrimary(_standing(node, record))
    if record.epoch != epoch:
        raise EpochStale(f"{_standing(node, record)}; the order names epoch {epoch}")


def start_serving(node: Node, record: VolumeRecord, lease_until_ns: int | None = None) -> None:
    """Confirm the tenure, mount, export; what is done already is left as it is.

    LeaseEnded if the lease was over before that was done, as for an agent that was stopped meanwhile: what is up by then the keeper ends.
    """
    mount_point = node.mount_point(record)
    with locked(node.keeper.folder / "gate", wait_s=LOCKS_S):
        with locked(node.keeper.folder / "hands", wait_s=LOCKS_S):
            tenure = node.tenures.confirm(record.id, record.name, record.epoch, lease_until_ns)
        if lease_until_ns is not None:
            node.keep(node.keeper)
    _refuse_over(node, tenure)
    failpoint("serve.before_mount")
    if not node.serving(record):
        mount_point.mkdir(mode=0o755, parents=True, exist_ok=True)
        with node.substrate.operational(record.id) as device:
            node.machine.mounts.mount(device, mount_point, record.filesystem, read_only=False)
    elif not node.machine.mounts.is_writable(mount_point):
        node.machine.mounts.remount(mount_point, read_only=False)
    failpoint("serve.after_mount")
    failpoint("serve.before_export")
    _refuse_over(node, tenure)
    node.exports.open(node.share(record), record.id)
    failpoint("serve.after_export")
    if node.tenures.ended(tenure) is not None:
        node.exports.dismiss(node.share(record))
        node.exports.close(node.share(record))
        _refuse_over(node, tenure)
    node.tenures.serve(tenure)


def stop_serving(node: Node, record: VolumeRecord, *, quiesce: bool = False) -> None:
    """End clients' connections, give up the address, end exports, then unmount, or remount read-only."""
    failpoint("unserve.before_export")
    node.exports.dismiss(node.share(record))
    failpoint("unserve.after_export")
    with node.address_lock:
        node.drop_address(record)
    node.exports.close(node.share(record))
    failpoint("unserve.before_mount")
    if node.serving(record):
        if quiesce:
            node.machine.mounts.remount(node.mount_point(record), read_only=True)
        else:
            node.machine.mounts.unmount(node.mount_point(record))
        node.tenures.rest(record.id, _newest_counter(node, record))
    failpoint("unserve.after_mount")


def lease_end_ns(node: Node, seconds: float, now_ns: int) -> int:
    """Return when a lease that is given now ends; RequestRefused for one that would be over as soon as it begins."""
    margin_s = node.config.lease_margin_s
    if not margin_s < seconds <= LONGEST_LEASE_S:
        raise RequestRefused(
            f"a lease of {seconds:g} s",
            cause=f"node {node.config.node} gives a volume up {margin_s:g} s before its lease ends; the longest is {LONGEST_LEASE_S:g} s",
        )
    return now_ns + round(seconds * 1e9)


def _refuse_over(node: Node, tenure: Tenure) -> None:
    if node.tenures.ended(tenure) is not None or is_over(tenure, boottime_ns(), node.config.lease_margin_s):
        raise LeaseEnded(f"the lease of volume {tenure.name} was over before node {node.config.node} served it")


def _is_primary_at(record: VolumeRecord, epoch: int) -> bool:
    return record.role is m.Role.PRIMARY and record.epoch == epoch


def _is_mounted(node: Node, record: VolumeRecord) -> bool:
    return node.serving(record) and node.machine.mounts.is_writable(node.mount_point(record))


def _standing(node: Node, record: VolumeRecord) -> str:
    return f"node {node.config.node} is {record.role} of volume {record.name} at epoch {record.epoch}"


def _sent(node: Node, record: VolumeRecord) -> set[GenerationId]:
    """Return the generations that the peer said it has committed."""
    transfers = [found for found in records_of(node, record.id) if found.sending]
    return {transfer.target for transfer in transfers if transfer.state is m.TransferState.COMMITTED}


def _is_all_sent(node: Node, record: VolumeRecord, tenure: Tenure) -> bool:
    """Whether the peer has a generation that was taken when the volume could not be written to any more."""
    rests = tenure.epoch == record.epoch and tenure.rests_after is not None
    return rests and any(sent.counter > (tenure.rests_after or 0) for sent in _sent(node, record))


def _keep(node: Node, record: VolumeRecord) -> m.GenerationFacts | None:
    """Return the generation that keeps what this node holds, made if there is none; None if a generation that the peer has is the same.

    The first look is at the volume as it is, since replaying its journal would write to it; what has to be kept is taken after that, so
    that it can be read. If we die here the first look is left as a frozen generation, which the next commit lets go.
    """
    sent, held = _sent(node, record), node.substrate.generations(record.id)
    shared = [facts for facts in held if facts.kind is GenerationKind.COMMITTED or facts.id in sent]
    kept = [facts for facts in held if facts.kind is GenerationKind.KEPT and facts.id.epoch == record.epoch]
    looked = _taken(node, record, GenerationKind.FROZEN)
    try:
        for facts in (*shared[-1:], *kept[-1:]):
            if _is_same(node, facts.id, looked.id):
                return facts if facts in kept else None
    finally:
        node.substrate.drop(looked.id)
    settle(node, record)
    return _taken(node, record, GenerationKind.KEPT)


def _taken(node: Node, record: VolumeRecord, kind: GenerationKind) -> m.GenerationFacts:
    facts = m.GenerationFacts(next_generation(record.id, record.epoch, _newest_counter(node, record)), kind, wall_ns())
    node.substrate.take(record.id, None, facts)
    return facts


def _newest_counter(node: Node, record: VolumeRecord) -> int:
    return max(facts.id.counter for facts in node.substrate.generations(record.id))


def _is_same(node: Node, one: GenerationId, other: GenerationId) -> bool:
    return not len(node.substrate.changed(one, other).first)
