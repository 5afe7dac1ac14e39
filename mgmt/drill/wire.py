"""How many bytes a transfer will take on the wire, so that a death can be placed at a share of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import zstandard

from agent.contract import messages as m
from agent.contract.dmi import HOLE, Dmi
from agent.contract.identity import BLOCK_BYTES, GenerationId

SAMPLES: Final = 384


def expected_bytes(dmi: Dmi, image_of: Callable[[GenerationId], Path], differential: m.Differential) -> int:
    """Return about how many bytes the pieces take on the wire: their bytes, times what a sample of them compresses to."""
    sides = [(dmi.head.target, dmi.target_hole == 0)]
    if differential is m.Differential.SEND:
        sides.append((dmi.head.base, dmi.diff_block != HOLE))
    compressor = zstandard.ZstdCompressor(level=1)
    total = 0
    for generation, there in sides:
        rows = np.flatnonzero(there)
        raw = int(dmi.block_count[rows].sum(dtype=np.uint64)) * BLOCK_BYTES
        chosen = rows[np.linspace(0, len(rows) - 1, min(SAMPLES, len(rows)), dtype=np.int64)] if len(rows) else rows
        sample = b"".join(_pieces(image_of(generation), dmi, chosen.tolist()))
        total += int(raw * len(compressor.compress(sample)) / max(len(sample), 1))
    return total


def _pieces(image: Path, dmi: Dmi, rows: list[int]) -> Iterator[bytes]:
    with image.open("rb") as file:
        for row in rows:
            file.seek(int(dmi.op_block[row]) * BLOCK_BYTES)
            yield file.read(int(dmi.block_count[row]) * BLOCK_BYTES)
