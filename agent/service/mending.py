"""Mending: blocks of a generation that both nodes hold, brought from the one whose copy is right to the one whose copy is not.

It goes the way of every transfer (a DMI first, pieces proved by digest, read back, acknowledged), with g0 as base and no files. What comes
replaces the blocks in a clone of the damaged generation, which takes its place in one step; the operational volume is not touched. A
mend that broke off is forgotten and begun anew: the damaged generation is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

import numpy as np

from agent.blockio.device import Device
from agent.blockio.scatter import digest_runs
from agent.contract import messages as m
from agent.contract.digest import ZERO_BLOCK, piece_digest
from agent.contract.dmi import HOLE, MAX_PIECE_BLOCKS, SPECS, Dmi, Head, Owner
from agent.contract.errors import BaseMismatch, LandfallError, RequestRefused, TransferBusy
from agent.contract.identity import empty_generation
from agent.service.node import Node, ProgressCall
from agent.service.transfers import changed_bytes, records_of
from agent.service.verification import runs_of_request
from agent.system.clock import wall_ns
from agent.transfer.receiver import Volumes
from agent.transfer.store import TransferRecord
from agent.volume.substrate import VolumeRecord, Workspace, WorkspaceKind


def build_mend(node: Node, arguments: m.BuildMend, progress: ProgressCall) -> m.Built:
    """Make the DMI of a mend on the node whose copy is right. If we die here there is no transfer, or one that the next mend forgets."""
    record, target = node.record(arguments.generation.volume), node.generation(arguments.generation)
    if not arguments.runs:
        raise RequestRefused("a mend of no blocks")
    with node.job(record.id, "transfer.mend"):
        forget_mends(node, record.id)
        dmi = _dmi(node, record, target, arguments)
        node.store.create(
            TransferRecord(
                arguments.transfer,
                empty_generation(record.id),
                target.id,
                m.Differential.VERIFY,
                sending=True,
                state=m.TransferState.BUILDING,
                since_ns=wall_ns(),
                mends=True,
            )
        )
        try:
            node.store.store_dmi(arguments.transfer, dmi.encode())
        except BaseException:
            node.store.discard(arguments.transfer)
            raise
        node.store.set_state(arguments.transfer, m.TransferState.WAITING)
    size, digest = len(node.store.dmi_bytes(arguments.transfer)), node.store.dmi_digest(arguments.transfer)
    return m.Built(dmi.piece_total, 0, changed_bytes(dmi), size, digest.hex())


def expected(node: Node, volume: VolumeRecord, arguments: m.ReceiveTransfer) -> TransferRecord:
    """Return the record, a new one, of the mend that is to come. The caller holds the volume. Everything that speaks against it is said."""
    node.generation(arguments.target)
    if arguments.base != empty_generation(volume.id) or arguments.target == arguments.base:
        raise BaseMismatch("a mend has g0 as its base")
    forget_mends(node, volume.id)
    for known in records_of(node, volume.id):
        if known.state is not m.TransferState.COMMITTED and arguments.target in (known.base, known.target):
            raise TransferBusy(f"transfer {known.id} needs {arguments.target.name}", fix="Resume, salvage or discard it first.")
    transfer = TransferRecord(
        arguments.transfer,
        arguments.base,
        arguments.target,
        arguments.differential,
        sending=False,
        state=m.TransferState.WAITING,
        since_ns=wall_ns(),
        mends=True,
    )
    node.store.create(transfer)
    return transfer


@contextmanager
def prepared(node: Node, transfer: TransferRecord) -> Iterator[Volumes]:
    """Lend a fresh clone of the damaged generation, writable, and g0."""
    node.substrate.begin(_clone(transfer), transfer.target)
    node.store.set_state(transfer.id, m.TransferState.RUNNING)
    with node.substrate.writing(_clone(transfer)) as clone, node.substrate.reading(transfer.base) as base:
        yield Volumes(clone, base)


def commit(node: Node, transfer: TransferRecord) -> None:
    """Let the mended clone take the generation's place in one step. If we die before it, it is as it was; after it, it is mended."""
    node.substrate.replace(_clone(transfer), transfer.target)
    node.store.set_state(transfer.id, m.TransferState.COMMITTED)


def forget(node: Node, transfer: TransferRecord) -> None:
    """Forget a mend and its clone, as far as that is possible now; the next one tries again."""
    with suppress(LandfallError, OSError):
        node.substrate.discard(_clone(transfer))
        node.store.discard(transfer.id)


def forget_mends(node: Node, volume: UUID) -> None:
    """Forget every mend of a volume that earlier orders left behind; the caller holds the volume."""
    for known in records_of(node, volume):
        if known.mends:
            forget(node, known)


def _clone(transfer: TransferRecord) -> Workspace:
    return Workspace(transfer.target.volume, transfer.id, WorkspaceKind.HEALED)


def _dmi(node: Node, record: VolumeRecord, target: m.GenerationFacts, arguments: m.BuildMend) -> Dmi:
    """Return a DMI of pieces without files, digested from what the device gives now."""
    runs = runs_of_request(node, target.id, arguments.runs)
    pieces = [
        (at, min(MAX_PIECE_BLOCKS, first + blocks - at))
        for first, blocks in zip(runs.first.tolist(), runs.blocks.tolist(), strict=True)
        for at in range(first, first + blocks, MAX_PIECE_BLOCKS)
    ]
    first, blocks = (np.array(column) for column in zip(*pieces, strict=True))
    with node.substrate.reading(target.id) as path, Device.open_reading(path) as device:
        digests = digest_runs(device, first.astype(np.uint64), blocks.astype(np.uint64))
    ends = np.cumsum(blocks).tolist()
    update = [piece_digest(digests[end - count : end], at) for (at, count), end in zip(pieces, ends, strict=True)]
    nothing = [piece_digest(np.full(count, ZERO_BLOCK, np.uint64), at) for at, count in pieces]
    columns = {spec.name: np.zeros(1 if spec.name.endswith("_start") else 0, spec.dtype) for spec in SPECS[1:]}
    columns |= {
        "op_block": first.astype("<u8"),
        "diff_block": np.full(len(pieces), HOLE, "<u8"),
        "block_count": blocks.astype("<u4"),
        "owner": np.full(len(pieces), Owner.METADATA, "u1"),
        "target_hole": np.zeros(len(pieces), "u1"),
        "update_digest": np.frombuffer(b"".join(update), "V16"),
        "diff_digest": np.frombuffer(b"".join(nothing), "V16"),
    }
    head = Head(
        arguments.transfer, empty_generation(record.id), target.id, 0, target.taken_ns, record.name, record.size_bytes, record.sector_bytes,
        record.filesystem, (), 0, node.substrate.differential_identity(empty_generation(record.id)),
    )  # fmt: skip
    return Dmi(head, **columns)
