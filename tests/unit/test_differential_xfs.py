"""The XFS reader's steps on made-up structures: no mount, no device."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from agent.blockio.device import Device
from agent.contract.dmi import Owner
from agent.contract.errors import DeviceFailed, LayoutUnsupported
from agent.differential.xfs import _grouped
from agent.differential.xfs_disk import Layout, fork_extents, read_blocks, read_layout
from agent.differential.xfs_owners import (
    _OWNER_OF_RANK,
    Claims,
    Ranges,
    _clipped,
    _describes_itself,
    _near_together,
    _split,
    _unclaimed,
)
from agent.system.xfs import InodeChunks

UUID = bytes(range(16))
LAYOUT = Layout(
    blocks=4000, group_blocks=1000, group_shift=10, groups=4, inode_bytes=512, inode_shift=3, sector_bytes=512,
    log_first=2000, log_blocks=100, root_inode=128, internal_inodes=(129, 130), uuid=UUID,
)  # fmt: skip


def u64(*values: int) -> NDArray[np.uint64]:
    return np.array(values, np.uint64)


# --- superblock


def superblock(**changes: tuple[int, str, int]) -> bytes:
    """Return a sound superblock with (offset, format, value) put over it."""
    raw = bytearray(4096)
    sound = {
        "magic": (0, ">I", 0x58465342),
        "blocksize": (4, ">I", 4096),
        "dblocks": (8, ">Q", 4000),
        "logstart": (48, ">Q", 2 << 10),
        "rootino": (56, ">Q", 128),
        "rbmino": (64, ">Q", 129),
        "rsumino": (72, ">Q", 130),
        "agblocks": (84, ">I", 1000),
        "agcount": (88, ">I", 4),
        "logblocks": (96, ">I", 100),
        "versionnum": (100, ">H", 0xB4B5),
        "sectsize": (102, ">H", 512),
        "inodesize": (104, ">H", 512),
        "inopblog": (123, ">B", 3),
        "agblklog": (124, ">B", 10),
        "uquotino": (160, ">Q", 2**64 - 1),
        "incompat": (216, ">I", 0x2B),
    }
    for at, form, value in {**sound, **changes}.values():
        struct.pack_into(form, raw, at, value)
    raw[32:48] = UUID
    return bytes(raw)


def test_the_geometry_comes_from_the_superblock(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(superblock())
    assert read_layout(image) == LAYOUT


@pytest.mark.parametrize(
    "change",
    [
        {"magic": (0, ">I", 0x45585434)},
        {"versionnum": (100, ">H", 0xB4B4)},
        {"blocksize": (4, ">I", 1024)},
        {"logstart": (48, ">Q", 0)},
        {"rblocks": (16, ">Q", 5)},
        {"incompat": (216, ">I", 0x10)},  # needs repair
        {"incompat": (216, ">I", 1 << 20)},
    ],
)
def test_layouts_that_are_not_replicated_are_refused(tmp_path: Path, change: dict[str, tuple[int, str, int]]) -> None:
    image = tmp_path / "image"
    image.write_bytes(superblock(**change))
    with pytest.raises(LayoutUnsupported):
        read_layout(image)


# --- forks


def inode_bytes(
    *,
    form: int = 2,
    records: bytes = b"",
    count: int = 0,
    nrext64: bool = False,
    forkoff: int = 0,
    attributes: bytes = b"",
    attribute_count: int = 0,
) -> bytes:
    raw = bytearray(512)
    struct.pack_into(">HHBB", raw, 0, 0x494E, 0o100644, 3, form)
    raw[82], raw[83] = forkoff, 2
    if nrext64:
        struct.pack_into(">Q", raw, 24, count)
        struct.pack_into(">I", raw, 76, attribute_count)
        struct.pack_into(">Q", raw, 120, 0x10)
    else:
        struct.pack_into(">IH", raw, 76, count, attribute_count)
    raw[176 : 176 + len(records)] = records
    at = 176 + forkoff * 8
    raw[at : at + len(attributes)] = attributes
    return bytes(raw)


def record(logical: int, fsblock: int, blocks: int, unwritten: bool = False) -> bytes:
    packed = int(unwritten) << 127 | logical << 73 | fsblock << 21 | blocks
    return packed.to_bytes(16, "big")


def raw_inodes(*inodes: bytes) -> NDArray[np.void]:
    return np.frombuffer(b"".join(inodes), LAYOUT.inode_dtype)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[tuple[Path, Device]]:
    path = tmp_path / "image"
    path.write_bytes(b"")
    os.truncate(path, LAYOUT.blocks * 4096)
    with Device.open_reading(path) as device:
        yield path, device


@pytest.mark.parametrize("nrext64", [False, True])
def test_extents_in_the_inode_are_unpacked(image: tuple[Path, Device], nrext64: bool) -> None:
    records = record(0, 5, 3) + record(2**53, (3 << 10) + 7, 2, unwritten=True)
    raw = raw_inodes(
        inode_bytes(form=1, records=b"short link"),
        inode_bytes(records=records, count=2, nrext64=nrext64, forkoff=20, attributes=record(0, 1 << 10, 1), attribute_count=1),
    )
    data = fork_extents(image[1], LAYOUT, raw, attribute=False)
    assert data.fork.tolist() == [1, 1]
    assert data.logical.tolist() == [0, 2**53]
    assert data.physical.tolist() == [5, 3007]
    assert data.blocks.tolist() == [3, 2]
    assert data.unwritten.tolist() == [False, True]
    attributes = fork_extents(image[1], LAYOUT, raw, attribute=True)
    assert (attributes.fork.tolist(), attributes.physical.tolist(), attributes.blocks.tolist()) == ([1], [1000], [1])


def node(block: int, level: int, content: bytes, count: int) -> bytes:
    head = struct.pack(">IHHQQQQ16sQII", 0x424D4133, level, count, 0, 0, block * 8, 0, UUID, 0, 0, 0)
    return (head + content).ljust(4096, b"\0")


def tree_root(level: int, pointers: list[int]) -> bytes:
    room = (336 - 4) // 16
    return struct.pack(">HH", level, len(pointers)) + bytes(8 * room) + struct.pack(f">{len(pointers)}Q", *pointers)


def put(path: Path, block: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(block * 4096)
        file.write(content)


def inner(pointers: list[int]) -> bytes:
    return bytes(8 * 251) + struct.pack(f">{len(pointers)}Q", *pointers)


def test_extent_trees_are_walked_to_their_leaves(image: tuple[Path, Device]) -> None:
    path, device = image
    put(path, 1001, node(1001, 1, inner([20, 21]), 2))
    put(path, 20, node(20, 0, record(0, 50, 1) + record(9, 60, 2), 2))
    put(path, 21, node(21, 0, record(100, 70, 3), 1))
    raw = raw_inodes(inode_bytes(records=record(1, 2, 1), count=1), inode_bytes(form=3, records=tree_root(2, [(1 << 10) + 1])))
    data = fork_extents(device, LAYOUT, raw, attribute=False)
    assert data.fork.tolist() == [0, 1, 1, 1]
    assert data.logical.tolist() == [1, 0, 9, 100]
    assert data.physical.tolist() == [2, 50, 60, 70]
    assert sorted(data.tree_block.tolist()) == [20, 21, 1001]
    assert set(data.tree_fork.tolist()) == {1}


@pytest.mark.parametrize(
    "inode",
    [
        inode_bytes(records=record(0, 5, 1), count=22),
        inode_bytes(records=record(0, 5, 1), count=2**40, nrext64=True),
        inode_bytes(records=record(0, 5, 1), count=2**63 + 1, nrext64=True),
        inode_bytes(records=record(0, (3 << 10) + 999, 2), count=1),
        inode_bytes(records=record(0, 2**52 - 1, 1), count=1),
        inode_bytes(records=record(0, 5, 0), count=1),
        inode_bytes(form=3, records=tree_root(1, [2**63])),
        inode_bytes(form=3, records=tree_root(1, [30])),
        inode_bytes(form=3, records=tree_root(0, [30])),
        inode_bytes(form=3, records=tree_root(3, [31])),  # a node that leads to itself
        inode_bytes(form=3, records=struct.pack(">HH", 1, 9999)),
        inode_bytes(forkoff=255, attributes=b"", attribute_count=1),
    ],
)
def test_G20_forks_that_contradict_themselves_are_refused(image: tuple[Path, Device], inode: bytes) -> None:
    path, device = image
    put(path, 31, node(31, 2, inner([31]), 1))
    attribute = inode[82] != 0
    with pytest.raises(DeviceFailed):
        fork_extents(device, LAYOUT, raw_inodes(inode), attribute)


def test_blocks_are_read_in_runs_and_a_short_device_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "image"
    content = os.urandom(10 * 4096)
    path.write_bytes(content)
    with Device.open_reading(path) as device:
        assert read_blocks(device, u64(0, 1, 2, 5, 9)).tobytes() == content[: 3 * 4096] + content[5 * 4096 : 6 * 4096] + content[9 * 4096 :]
        with pytest.raises(DeviceFailed):
            read_blocks(device, u64(9, 10))


# --- inode chunks


@given(st.sets(st.integers(0, 40)), st.data())
def test_chunks_at_any_number_become_groups_of_64(places: set[int], data: st.DataObject) -> None:
    first = [place * 64 + data.draw(st.sampled_from([0, 32])) for place in sorted(places)]
    first = [number for n, number in enumerate(first) if not n or number >= first[n - 1] + 64]
    masks = [data.draw(st.integers(0, 2**64 - 1)) for _ in first]
    groups = _grouped(InodeChunks(u64(*first), u64(*masks)))
    got = {int(g) * 64 + bit for g, bits in zip(groups.group, groups.bits, strict=True) for bit in range(64) if int(bits) >> bit & 1}
    assert got == {number + bit for number, mask in zip(first, masks, strict=True) for bit in range(64) if mask >> bit & 1}
    assert groups.group.tolist() == sorted(set(groups.group.tolist()))


# --- owners


@st.composite
def ranges(draw: st.DrawFn) -> Ranges:
    cuts = sorted(draw(st.sets(st.integers(0, 60), max_size=12)))
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    return Ranges(u64(*(pair[0] for pair in pairs)), u64(*(pair[1] for pair in pairs)))


claim = st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(1, 4), st.integers(1, 3))


def claims_of(rows: list[tuple[int, int, int, int]]) -> Claims:
    return Claims(
        u64(*(first for first, _, _, _ in rows)),
        u64(*(first + blocks for first, blocks, _, _ in rows)),
        np.array([rank for _, _, rank, _ in rows], np.uint8),
        u64(*(inode if rank == 4 else 0 for _, _, rank, inode in rows)),
    )


@given(ranges(), st.lists(claim, max_size=12))
def test_runs_are_split_exactly_by_owner(runs: Ranges, rows: list[tuple[int, int, int, int]]) -> None:
    claims = claims_of(rows)
    owned = _split(runs, _clipped(runs, claims))
    blocks = [block for first, end in zip(runs.first.tolist(), runs.end.tolist(), strict=True) for block in range(first, end)]
    want = {}
    for block in blocks:
        here = [(rank, inode) for first, count, rank, inode in rows if first <= block < first + count]
        rank = max((rank for rank, _ in here), default=0)
        want[block] = (int(_OWNER_OF_RANK[rank]), {inode for rank, inode in here if rank == 4})
    got = {}
    for row, (first, count, owner) in enumerate(zip(owned.first.tolist(), owned.blocks.tolist(), owned.owner.tolist(), strict=True)):
        assert any(first >= a and first + count <= b for a, b in zip(runs.first.tolist(), runs.end.tolist(), strict=True))
        of_run = set(owned.claim_inode[owned.claim_run == row].tolist())
        got.update(dict.fromkeys(range(first, first + count), (owner, of_run)))
    assert got == want
    assert owned.first.tolist() == sorted(owned.first.tolist())
    assert int(owned.blocks.sum()) == len(blocks)
    pairs = list(zip(owned.claim_run.tolist(), owned.claim_inode.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    left = _unclaimed(runs, [claims])
    assert [b for a, e in zip(left.first.tolist(), left.end.tolist(), strict=True) for b in range(a, e)] == [
        block for block in blocks if not any(first <= block < first + count for first, count, _, _ in rows)
    ]


def test_neighbours_of_one_file_are_one_piece_and_runs_are_never_joined() -> None:
    owned = _split(Ranges(u64(0, 10), u64(10, 20)), claims_of([(0, 4, 4, 1), (4, 16, 4, 1)]))
    assert (owned.first.tolist(), owned.blocks.tolist(), owned.owner.tolist()) == ([0, 10], [10, 10], [Owner.FILE] * 2)


def test_near_runs_are_asked_for_together() -> None:
    assert _near_together(Ranges(u64(0, 20, 5000), u64(10, 30, 5001))) == [(0, 30), (5000, 5001)]
    assert _near_together(Ranges(u64(), u64())) == []


def metadata_block(block: int, *, magic: int, at: int, width: int, address: int, uuid: int) -> NDArray[np.uint8]:
    raw = bytearray(4096)
    raw[at : at + width] = magic.to_bytes(width, "big")
    raw[address : address + 8] = (block * 8).to_bytes(8, "big")
    raw[uuid : uuid + 16] = UUID
    return np.frombuffer(bytes(raw), np.uint8)


@pytest.mark.parametrize(
    ("magic", "at", "width", "address", "uuid"),
    [
        (0x41423342, 0, 4, 16, 32),
        (0x424D4133, 0, 4, 24, 40),
        (0x58444433, 0, 4, 8, 24),
        (0x3DFF, 8, 2, 16, 32),
        (0x58534C4D, 0, 4, 40, 16),
    ],
)
def test_a_copy_of_metadata_in_a_file_is_not_taken_for_metadata(magic: int, at: int, width: int, address: int, uuid: int) -> None:
    block = metadata_block(77, magic=magic, at=at, width=width, address=address, uuid=uuid)
    foreign = block.copy()
    foreign[uuid] ^= 1
    sound, _ = _describes_itself(LAYOUT, u64(77, 78, 77), np.stack([block, block, foreign]))
    assert sound.tolist() == [True, False, False]


def test_an_inode_block_knows_its_place() -> None:
    raw = bytearray(4096)
    raw[0:2] = b"IN"
    struct.pack_into(">Q", raw, 152, (2 << 13) + (5 << 3))
    raw[160:176] = UUID
    content = np.frombuffer(bytes(raw), np.uint8)
    sound, _ = _describes_itself(LAYOUT, u64(2005, 2006), np.stack([content, content]))
    assert sound.tolist() == [True, False]
