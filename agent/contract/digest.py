"""Digests of blocks, pieces and files. One mechanism: xxh3-64 per block, xxh3-128 folded over block digests.

A piece or file digest folds the digests of its blocks, so a digest table (8 bytes a block) is enough to know the digest
of data that nobody reads again: the source folds unchanged blocks of a changed file, and the differential data of a
piece, from its table. xxh3 guards against bit rot, torn and misdirected writes; against forgery there is TLS.
The piece's first block is the seed, so a block that lands at the wrong address has the wrong digest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from agent.contract.identity import BLOCK_BYTES

BlockDigests = NDArray[np.uint64]
Buffer = bytes | bytearray | memoryview

ZERO_BLOCK: Final = xxhash.xxh3_64_intdigest(bytes(BLOCK_BYTES))
"""Digest of a block of zeros; what a hole counts as."""


def block_digests(data: Buffer) -> BlockDigests:
    """Return the digest of each 4096-byte block of ``data`` as uint64; the length must be a multiple of 4096."""
    view = memoryview(data).cast("B")
    if len(view) % BLOCK_BYTES:
        raise ValueError(f"{len(view)} bytes are not whole blocks")
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter(
        (digest(view[at : at + BLOCK_BYTES]) for at in range(0, len(view), BLOCK_BYTES)),
        dtype=np.uint64,
        count=len(view) // BLOCK_BYTES,
    )


def piece_digest(blocks: BlockDigests, first_block: int) -> bytes:
    """Return the 16-byte digest of a piece that begins at operational block ``first_block``."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(blocks, dtype="<u8").tobytes(), seed=first_block)


def file_digest(size_bytes: int, runs: Iterable[tuple[int, BlockDigests]]) -> bytes:
    """Return the 16-byte digest of a file's content.

    ``runs`` are its written extents in logical order, each as (first logical block, digests of its blocks); holes and
    unwritten extents are left out. Both sides take the runs from the DMI's extents, so equal content folds equally.
    """
    fold = xxhash.xxh3_128()
    for logical, blocks in runs:
        fold.update(np.array([logical, len(blocks)], dtype="<u8").tobytes())
        fold.update(np.ascontiguousarray(blocks, dtype="<u8").tobytes())
    fold.update(np.array([size_bytes], dtype="<u8").tobytes())
    return fold.digest()


def payload_digest(size_bytes: int, payload: bytes) -> bytes:
    """Return the 16-byte digest of content that travels inside the DMI (inline data, symlink targets, nothing at all)."""
    fold = xxhash.xxh3_128(payload)
    fold.update(np.array([size_bytes], dtype="<u8").tobytes())
    return fold.digest()
