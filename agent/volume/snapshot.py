"""A clone of an image that is being written, made so that the image must be held still for as short a time as possible.

FICLONE costs time for every extent, and an image of an old volume has very many. So the clone begins as a clone of the newest generation,
catches up with the live image range by range, and only what was written since then is cloned while the image is held still. The result is
exact whatever happened meanwhile: a block that the clone shares is never overwritten nor its address given to another (copy on write), so
equal addresses are equal contents, and ``catch_up`` leaves no other.
"""

from __future__ import annotations

from typing import Final

from agent.contract.identity import BLOCK_BYTES
from agent.system import block
from agent.system.block import ExtentMap
from agent.volume.extents import changed_ranges

_PASSES: Final = 4
_FEW_RANGES: Final = 64
_STEP_BYTES: Final = 64 << 20  # the kernel locks the live image for as long as one range takes


def clone_ahead(image_fd: int, clone_fd: int, newest_fd: int) -> ExtentMap:
    """Bring an empty clone near to a live image, beginning with the image's newest generation; return the clone's extents."""
    block.clone(newest_fd, clone_fd)
    cloned, left = block.extent_map(clone_fd), None
    for _ in range(_PASSES):
        ranges = catch_up(image_fd, clone_fd, cloned)
        if not ranges:
            break
        cloned = block.extent_map(clone_fd)
        if ranges <= _FEW_RANGES or (left is not None and ranges > left // 2):
            break
        left = ranges
    return cloned


def catch_up(image_fd: int, clone_fd: int, cloned: ExtentMap) -> int:
    """Let the clone, whose extents are ``cloned``, share all that the image has now; return how many ranges differed.

    Exact if nobody writes the image meanwhile.
    """
    first, count = changed_ranges(block.extent_map(image_fd), cloned)
    starts, lengths = (first * BLOCK_BYTES).tolist(), (count * BLOCK_BYTES).tolist()
    for start, length in zip(starts, lengths, strict=True):
        for offset in range(start, start + length, _STEP_BYTES):
            block.clone_range(image_fd, offset, min(_STEP_BYTES, start + length - offset), clone_fd, offset)
    return len(starts)
