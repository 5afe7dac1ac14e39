"""Verbs that compare: the digests of a generation's blocks as the device gives them now, and whose blocks are whose.

Nothing here takes the volume's job: what is read cannot be dropped or replaced under the reader, and clients, transfers and salvages go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from agent.blockio.device import Device
from agent.blockio.scatter import digest_runs
from agent.contract import messages as m
from agent.contract.dmi import HOLE, FileKind, Owner
from agent.contract.errors import BaseMismatch, RequestRefused
from agent.contract.identity import BLOCK_BYTES, GenerationId
from agent.differential import digests, names
from agent.differential.build import index_path, reader_for, table_path
from agent.differential.reader import Ownership, View
from agent.service.generations import view
from agent.service.node import Node, ProgressCall
from agent.volume.substrate import ChangedRuns, VolumeRecord

MAX_BLOCKS = 1 << 20
"""Blocks of one answer: 8 MiB of digests for 4 GiB of volume."""

_PORTION_BLOCKS = 1 << 14


def examine(node: Node, arguments: m.ExamineGeneration, progress: ProgressCall) -> m.Examined:
    """Return how many blocks there are to compare, whether a digest table tells what they were, and whether somebody wrote to them."""
    blocks = blocks_of(node, arguments.generation)
    written = ""
    try:
        node.substrate.refuse_written(arguments.generation)
    except BaseMismatch as error:
        written = error.cause or error.message
    table = digests.load(table_path(node.differential_state(arguments.generation.volume), arguments.generation), blocks)
    return m.Examined(blocks, table is not None, written)


def fetch_digests(node: Node, arguments: m.FetchDigests, progress: ProgressCall) -> bytes:
    """Return the digests of some blocks; DeviceFailed if one cannot be read."""
    total = blocks_of(node, arguments.generation)
    first, count = arguments.first, arguments.blocks
    if not 0 < count <= MAX_BLOCKS or first < 0 or first + count > total:
        raise RequestRefused(f"blocks {first} to {first + count} of a volume that has {total}")
    if arguments.recorded:
        path = table_path(node.differential_state(arguments.generation.volume), arguments.generation)
        try:
            return digests.entries(path, first, count).tobytes()
        except FileNotFoundError:
            return b""
    with node.substrate.reading(arguments.generation) as path, Device.open_reading(path) as device:
        parts = []
        for at in range(first, first + count, _PORTION_BLOCKS):
            length = min(_PORTION_BLOCKS, first + count - at)
            parts.append(digest_runs(device, np.array([at], np.uint64), np.array([length], np.uint64)))
            progress("compare", (at + length) * BLOCK_BYTES, total * BLOCK_BYTES)
        return np.concatenate(parts).astype("<u8").tobytes()


def find_owners(node: Node, arguments: m.FindOwners, progress: ProgressCall) -> m.Owners:
    """Return the files whose blocks the runs are, by this node's copy of the generation."""
    record = node.record(arguments.generation.volume)
    node.generation(arguments.generation)
    runs = runs_of_request(node, arguments.generation, arguments.runs)
    with view(node, record, arguments.generation, "owners") as found:
        return _owners(node, record, arguments.generation, found, runs)


def blocks_of(node: Node, generation: GenerationId) -> int:
    """Return the blocks of a generation that this node holds; NoSuchGeneration."""
    node.generation(generation)
    return -(-node.record(generation.volume).size_bytes // BLOCK_BYTES)


def runs_of_request(node: Node, generation: GenerationId, runs: tuple[tuple[int, int], ...]) -> ChangedRuns:
    """Return runs that were asked for, proved to be ascending, disjoint and inside the volume; RequestRefused."""
    total = blocks_of(node, generation)
    if any(not 0 <= first < first + blocks <= total for first, blocks in runs):
        raise RequestRefused("a run of blocks is empty or passes the end of the volume")
    if any(first + blocks > after for (first, blocks), (after, _) in pairwise(runs)):
        raise RequestRefused("runs of blocks overlap or are out of order")
    first, blocks = (np.array(column, dtype=np.uint64) for column in (zip(*runs, strict=True) if runs else ((), ())))
    return ChangedRuns(first, blocks, np.full(len(runs), HOLE, dtype=np.uint64), np.zeros(len(runs), dtype=np.bool_))


def _owners(node: Node, record: VolumeRecord, generation: GenerationId, found: View, runs: ChangedRuns) -> m.Owners:
    reader = reader_for(record.filesystem, None, found, runs)
    changes = reader.changed_inodes()  # without a base: all inodes there are
    regular = (changes.kind == FileKind.REGULAR) & changes.in_target
    extents = reader.extents(changes.inode[regular], changes.generation[regular])
    ownership = reader.ownership(changes, changes.inode[regular], extents)
    index = names.load(index_path(node.differential_state(record.id), generation)) or names.walked(found.mount_fd)
    files, nameless = [], 0
    for inode, blocks in _blocks_by_file(ownership):
        paths = tuple(path.decode("utf-8", "surrogateescape") for _, path in index.paths_of(inode, reader.root_inode))
        if paths:
            files.append(m.OwnedBlocks(paths, blocks))
        else:
            nameless += blocks
    of = {owner: int(ownership.blocks[ownership.owner == owner].sum(dtype=np.uint64)) for owner in Owner}
    return m.Owners(tuple(sorted(files, key=lambda file: file.paths)), of[Owner.METADATA], of[Owner.JOURNAL], of[Owner.FREE], nameless)


def _blocks_by_file(ownership: Ownership) -> Iterator[tuple[int, int]]:
    """Yield each regular file's inode with the number of its blocks in the runs."""
    of_files = ownership.owner[ownership.claim_run] == Owner.FILE
    inodes, blocks = ownership.claim_inode[of_files], ownership.blocks[ownership.claim_run[of_files]]
    distinct, which = np.unique(inodes, return_inverse=True)
    yield from zip(distinct.tolist(), np.bincount(which, weights=blocks, minlength=len(distinct)).astype(np.int64).tolist(), strict=True)
