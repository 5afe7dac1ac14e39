"""Runs of chunks refined to the blocks that differ: against the plain comparison of both images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract.dmi import HOLE
from agent.contract.identity import BLOCK_BYTES
from agent.volume.chunks import ChunkRuns, refined

CHUNKS = 24


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.sampled_from(["same", "changed", "base only", "target only", "neither"]), st.integers(0, 3)),
        min_size=1,
        max_size=CHUNKS,
    ),
    st.integers(0, 2**32),
)
def test_exactly_the_blocks_that_differ_with_the_place_of_each_pre_image(
    tmp_path: Path, chunk_blocks: int, chunks: list[tuple[str, int]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    base, target = (np.zeros((len(chunks) * chunk_blocks, BLOCK_BYTES), np.uint8) for _ in range(2))
    rows = []
    for number, (kind, zeros) in enumerate(chunks):
        here = slice(number * chunk_blocks, (number + 1) * chunk_blocks)
        old, new = (random.integers(0, 256, (chunk_blocks, BLOCK_BYTES), np.uint8) for _ in range(2))
        if kind in {"same", "changed", "base only"}:
            base[here] = old
        if kind in {"changed", "target only"}:
            target[here] = new
        if kind == "same":
            target[here] = old
        for image, bit in ((base, 1), (target, 2)):
            if zeros & bit:
                image[number * chunk_blocks] = 0  # a block of zeros in a mapped chunk
        if kind != "neither":
            rows.append((number, HOLE if kind == "target only" else 1000 + 7 * number, kind != "base only"))
    paths = [tmp_path / name for name in ("base", "target")]
    for path, image in zip(paths, (base, target), strict=True):
        path.write_bytes(image.tobytes())
    numbers, addresses = (np.array([row[column] for row in rows], np.uint64) for column in (0, 1))
    runs = ChunkRuns(numbers, np.ones(len(rows), np.uint64), addresses, np.array([row[2] for row in rows], np.bool_))
    found = refined(runs, chunk_blocks, *paths)
    got = {
        start + n: (place if place == HOLE else place + n, hole)
        for start, count, place, hole in zip(
            found.first.tolist(), found.blocks.tolist(), found.diff_block.tolist(), found.target_hole.tolist(), strict=True
        )
        for n in range(count)
    }
    places = {number * chunk_blocks + n: at if at == HOLE else at * chunk_blocks + n for number, at, _ in rows for n in range(chunk_blocks)}
    want = {
        int(block): (places[int(block)] if base[block].any() else HOLE, not target[block].any())
        for block in np.flatnonzero((base != target).any(axis=1))
    }
    assert got == want
