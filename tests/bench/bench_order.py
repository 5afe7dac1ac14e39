"""Whole files against bytes sent: Landfall's order beside the ideal, beside block order, and beside the metadata going first.

``python -m tests.bench order [--files 20000] [--fs ext4] [--short]``

The differential is that of the drill's tree with a tenth of it changed, made by two real agents. The ideal sends, at every moment, the file
of which the fewest bytes are missing, and knows which pieces files share. Bytes are those before compression. What a file needs are its own
pieces; that metadata may come last costs a roll forward nothing, and the curve with the metadata first says what it would cost the count.
"""

from __future__ import annotations

import heapq
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import Dmi, Owner
from agent.contract.identity import BLOCK_BYTES, FilesystemKind
from agent.contract.messages import Differential
from agent.transfer.order import bytes_to_send, send_order
from tests.bench import workloads
from tests.bench.cycle_scene import scene
from tests.bench.harness import Figure, keep, machine, parsed, parser

I64 = NDArray[np.int64]

CUTS: Final = (10, 25, 50, 75, 90)
"""Per cent of the bytes at which the counts are compared."""
GOAL_PERCENT: Final = 50
GOAL: Final = 0.97
_POINTS: Final = 200


@dataclass(frozen=True)
class Curve:
    """How many changed files were whole after ``bytes_sent``."""

    order: str
    bytes_sent: list[int]
    whole_files: list[int]


@dataclass(frozen=True)
class Measured:
    """The curves, and the share of the ideal's count at each cut point (per cent of the bytes)."""

    filesystem: str
    files: int
    pieces: int
    bytes: int
    bytes_of_metadata: int
    curves: list[Curve]
    of_ideal: dict[str, dict[int, float]]


def main(arguments: Sequence[str] = ()) -> int:
    """Measure, print, and write build/bench/order.json; return the exit status."""
    options = parser(__doc__)
    options.add_argument("--files", type=int, default=20_000)
    options.add_argument("--fs", type=FilesystemKind, default=FilesystemKind.EXT4)
    asked = parsed(options, arguments)
    described = machine()
    workload = workloads.drill_tree(2000 if asked.short else asked.files)
    with (
        tempfile.TemporaryDirectory(dir=asked.folder, prefix="order-") as work,
        scene(Path(work), asked.fs, 4 * workload.volume_bytes) as made,
    ):
        root = made.add_volume(workload.volume_bytes)
        workload.fill(root)
        made.cycle()
        workload.change(root, 100)
        made.cycle()
        measured = measure(made.dmi(), asked.fs)
    found = [
        Figure(
            f"whole files at {cut} % of the bytes: {order}, of the ideal", share, *((GOAL, "x", True, GOAL) if is_goal(order, cut) else ())
        )
        for order, shares in measured.of_ideal.items()
        for cut, share in shares.items()
    ]
    return keep(asked, "order", measured, found, described)


def is_goal(order: str, cut: int) -> bool:
    """Whether a share is the one that has a goal; it is arithmetic on one differential, so the goal holds at any size, too."""
    return (order, cut) == ("landfall", GOAL_PERCENT)


def measure(dmi: Dmi, filesystem: str) -> Measured:
    """Return the curves of a differential."""
    size = bytes_to_send(dmi, Differential.VERIFY).astype(np.int64) * BLOCK_BYTES
    ours = send_order(dmi, ()).astype(np.int64)
    is_metadata = dmi.owner[ours] == Owner.METADATA
    orders = {
        "ideal": ideal_order(dmi, size),
        "landfall": ours,
        "metadata first": np.concatenate([ours[is_metadata], ours[~is_metadata]]),
        "block order": np.argsort(dmi.op_block, kind="stable"),
    }
    total = int(size.sum())
    whole = {name: whole_at(dmi, size, order) for name, order in orders.items()}
    at = np.linspace(0, total, _POINTS + 1).astype(np.int64)
    curves = [Curve(name, at.tolist(), np.searchsorted(found, at, side="right").tolist()) for name, found in whole.items()]
    counts = {name: {cut: int(np.searchsorted(found, total * cut // 100, side="right")) for cut in CUTS} for name, found in whole.items()}
    of_ideal = {name: {cut: round(of[cut] / counts["ideal"][cut], 4) for cut in CUTS} for name, of in counts.items() if name != "ideal"}
    metadata = int(size[dmi.owner == Owner.METADATA].sum())
    return Measured(filesystem, dmi.file_total, dmi.piece_total, total, metadata, curves, of_ideal)


def whole_at(dmi: Dmi, size: I64, order: I64) -> I64:
    """Return, ascending, after how many bytes each file is whole when pieces are sent in ``order``; what needs no piece is at once."""
    sent = np.zeros(dmi.piece_total, dtype=np.int64)
    sent[order] = np.cumsum(size[order])
    file_of = np.repeat(np.arange(dmi.file_total), np.diff(dmi.need_start).astype(np.int64))
    whole = np.zeros(dmi.file_total, dtype=np.int64)
    np.maximum.at(whole, file_of, sent[dmi.need])
    return np.sort(whole)


def ideal_order(dmi: Dmi, size: I64) -> I64:
    """Return the pieces in the order of the file with the fewest missing bytes first, at every moment; then those no file needs."""
    start, need = dmi.need_start.astype(np.int64).tolist(), dmi.need.astype(np.int64).tolist()
    file_of = np.repeat(np.arange(dmi.file_total), np.diff(dmi.need_start).astype(np.int64))
    by_piece = np.argsort(dmi.need, kind="stable")
    first = np.searchsorted(dmi.need[by_piece], np.arange(dmi.piece_total + 1)).tolist()
    sharing = file_of[by_piece].tolist()
    length = size.tolist()
    missing = np.bincount(file_of, weights=size[dmi.need], minlength=dmi.file_total).astype(np.int64).tolist()
    heap = [(bytes_missing, file) for file, bytes_missing in enumerate(missing)]
    heapq.heapify(heap)
    is_sent, order = [False] * dmi.piece_total, []
    while heap:
        bytes_missing, file = heapq.heappop(heap)
        if bytes_missing != missing[file]:
            continue  # less is missing since: it stands in the heap again
        for piece in need[start[file] : start[file + 1]]:
            if is_sent[piece]:
                continue
            is_sent[piece] = True
            order.append(piece)
            for other in sharing[first[piece] : first[piece + 1]]:
                missing[other] -= length[piece]
                if other != file and length[piece]:
                    heapq.heappush(heap, (missing[other], other))
        missing[file] = -1
    rest = np.flatnonzero(~np.array(is_sent))
    return np.concatenate([np.array(order, dtype=np.int64), rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
