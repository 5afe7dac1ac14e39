"""The DMI's reader trusts nothing: golden file, cut at every byte, every byte flipped, hostile columns (FAULTS.md, group G)."""

from __future__ import annotations

import resource
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.dmi import HOLE, SPECS, Dmi, Side
from agent.contract.errors import DmiMalformed, LandfallError, VersionUnknown
from tests.unit.dmi_samples import altered, sample_dmi

GOLDEN = Path(__file__).with_name("golden") / "sample.dmi"


def test_the_bytes_are_the_golden_files() -> None:
    assert b"".join(sample_dmi().encode()) == GOLDEN.read_bytes()


def test_what_is_read_is_what_was_written() -> None:
    written, read = sample_dmi(), Dmi.decode(GOLDEN.read_bytes())
    assert read.head == written.head
    for spec in SPECS[1:]:
        np.testing.assert_array_equal(getattr(read, spec.name), getattr(written, spec.name), err_msg=spec.name)
    assert read.names(2, Side.TARGET) == [(2, b"link\xff")]
    assert read.xattrs(1) == [(b"user.tag", b"\x00\x01\x02")]
    assert read.payload_of(2) == b"tgt"
    assert read.extents(1) == [(0, 8, 2, 0), (2, 12, 1, 0)]


def test_G14_cut_at_every_byte_is_refused() -> None:
    raw = GOLDEN.read_bytes()
    for length in range(len(raw)):
        with pytest.raises(DmiMalformed):
            Dmi.decode(raw[:length])


def test_G15_every_byte_flipped_is_refused() -> None:
    raw = bytearray(GOLDEN.read_bytes())
    for at in range(len(raw)):
        raw[at] ^= 0x41
        with pytest.raises((DmiMalformed, VersionUnknown)):
            Dmi.decode(bytes(raw))
        raw[at] ^= 0x41


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(DmiMalformed):
        Dmi.decode(GOLDEN.read_bytes() + b"\0")


@pytest.mark.parametrize("count", [2**31, 2**32, 2**63, 2**64 - 1])
def test_G8_hostile_counts_are_refused_before_anything_is_allocated(count: int) -> None:
    raw = bytearray(GOLDEN.read_bytes())
    for section in range(len(SPECS)):
        hostile = bytearray(raw)
        struct.pack_into("<Q", hostile, 24 + 64 * section + 32, count)
        _seal(hostile)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        with pytest.raises(DmiMalformed):
            Dmi.decode(bytes(hostile))
        assert time.monotonic() - began < 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize(
    "path", [b"../../etc/cron.d/x", b"/etc/shadow", b".", b"..", b"a//b", b"a/", b"a/../b", b"x" * 256, b"a\0b", b""], ids=repr
)
def test_G1_G2_G3_paths_that_leave_the_volume_are_refused(path: bytes) -> None:
    with pytest.raises(DmiMalformed):
        Dmi.decode(altered(sample_dmi(), **_with_path(path)))


@pytest.mark.parametrize("path", [b".dot", b"..a", b"a..", b"...", b"-rf", b"\xff\n\x1b[31m", b"x" * 255])
def test_G3_G17_near_misses_and_odd_names_are_accepted(path: bytes) -> None:
    dmi = Dmi.decode(altered(sample_dmi(), **_with_path(path)))
    assert dmi.names(1, Side.TARGET) == [(2, path)]


@pytest.mark.parametrize(
    "columns",
    [
        {"op_block": np.array([1, 8, 9, 40], "<u8")},  # G9 overlapping pieces
        {"op_block": np.array([8, 1, 12, 40], "<u8")},
        {"op_block": np.array([1, 8, 12, 62], "<u8")},  # G10 passes the end
        {"op_block": np.array([1, 8, 12, 2**64 - 2], "<u8")},
        {"block_count": np.array([0, 2, 1, 3], "<u4")},  # G11
        {"block_count": np.array([1, 2, 1, 257], "<u4")},
        {"diff_block": np.array([HOLE - 1, 0, 0, 0], "<u8")},
        {"owner": np.array([4, 1, 1, 1], "u1")},
        {"need": np.array([1, 4], "<u4")},
        {"need_start": np.array([0, 0, 3, 2, 2], "<u8")},
        {"need_start": np.array([0, 0, 2**63, 2, 2], "<u8")},
        {"need_start": np.array([0, 0, 2, 2], "<u8")},
        {"extent_physical": np.array([8, 63], "<u8"), "extent_blocks": np.array([2, 2], "<u8")},  # G10
        {"extent_physical": np.array([8, 2**64 - 1], "<u8")},
        {"extent_physical": np.array([8, 9], "<u8")},  # G9 one block twice
        {"extent_logical": np.array([0, 1], "<u8")},  # G9 overlapping logically
        {"extent_blocks": np.array([2, 0], "<u8")},
        {"extent_blocks": np.array([2, 2**64 - 8], "<u8")},
        {"kind": np.array([4, 8, 10, 3], "u1")},
        {"change": np.array([8, 3, 17, 2], "u1")},  # new and deleted at once
        {"mode": np.array([0o755, 0o100640, 0, 0], "<u4")},
        {"mtime_ns": np.array([1, 10**9, 0, 0], "<u4")},
        {"size": np.array([1, 2**63, 0, 0], "<u8")},
        {"inode": np.array([2, 12, 12, 14], "<u8"), "inode_generation": np.array([0, 7, 7, 9], "<u4")},
        {"name_side": np.array([1, 1, 2, 0], "u1")},
        {"xattr_name_start": np.array([0, 9], "<u8")},
        {"payload_start": np.array([0, 0, 4, 3, 3], "<u8")},
        {"uid": np.array([0, 1000, 0], "<u4")},
    ],
    ids=lambda columns: "+".join(columns) + repr(next(iter(columns.values())).tolist()),
)
def test_G9_G10_G11_columns_that_contradict_each_other_are_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(DmiMalformed):
        Dmi.decode(altered(sample_dmi(), **columns))


@pytest.mark.parametrize(
    "head",
    [
        b"{}",
        b"[" * 20000,
        b'{"base": NaN}',
        b"\xff\xfe",
        GOLDEN.read_bytes()[GOLDEN.read_bytes().index(b'{"base"') :][:700].split(b"}")[0] + b',"extra":1}',
    ],
    ids=["empty", "deep", "nan", "bytes", "extra"],
)
def test_G16_heads_that_are_not_well_formed_are_refused(head: bytes) -> None:
    with pytest.raises(DmiMalformed):
        Dmi.decode(_with_head(head))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("volume_bytes", -1),
        ("volume_bytes", 2**63),
        ("volume_bytes", True),
        ("sector_bytes", 100),
        ("filesystem", "ntfs"),
        ("base", [1, 2]),
    ],
)
def test_G8_heads_with_values_out_of_bounds_are_refused(key: str, value: Any) -> None:
    import json

    from agent.contract.dmi import _head_bytes

    document = json.loads(_head_bytes(sample_dmi().head))
    document[key] = value
    with pytest.raises(DmiMalformed):
        Dmi.decode(_with_head(json.dumps(document, sort_keys=True).encode()))


def test_a_newer_version_is_named_as_such() -> None:
    raw = bytearray(GOLDEN.read_bytes())
    struct.pack_into("<H", raw, 8, 2)
    with pytest.raises(VersionUnknown):
        Dmi.decode(bytes(raw))


def test_G21_random_damage_never_ends_in_anything_but_a_refusal() -> None:
    random = np.random.default_rng(7)
    raw = np.frombuffer(GOLDEN.read_bytes(), np.uint8)
    for _ in range(2000):
        hurt = raw.copy()
        at = random.integers(0, len(hurt), size=random.integers(1, 9))
        hurt[at] = random.integers(0, 256, size=len(at))
        hostile = bytearray(hurt.tobytes())
        _seal(hostile)  # as a hostile peer would: the digests are right
        try:
            Dmi.decode(bytes(hostile))
        except LandfallError:
            continue


@given(st.lists(st.binary(max_size=6).map(lambda some: bytes(b"/.a\0b/."[byte % 7] for byte in some)), min_size=3, max_size=3))
def test_G2_paths_are_judged_each_by_itself(paths: list[bytes]) -> None:
    """They lie behind each other in one column, and are judged all at once."""

    def plain(path: bytes) -> bool:
        return all(part not in {b"", b".", b".."} and len(part) <= 255 and b"\0" not in part for part in path.split(b"/"))

    columns = _with_path(paths[0], *paths[1:])
    if all(map(plain, paths)):
        Dmi.decode(altered(sample_dmi(), **columns))
    else:
        with pytest.raises(DmiMalformed, match="path"):
            Dmi.decode(altered(sample_dmi(), **columns))


def _with_path(path: bytes, third: bytes = b"link\xff", fourth: bytes = b"gone") -> dict[str, Any]:
    paths = [b"", path, third, fourth]
    return {
        "paths": np.frombuffer(b"".join(paths), "u1"),
        "name_path_start": np.cumsum([0, *map(len, paths)]).astype("<u8"),
        "name_parent": np.array([2, *(2 if each else 5 for each in paths[1:])], "<u8"),
    }


def _with_head(head: bytes) -> bytes:
    from agent.contract.columns import encode

    dmi = sample_dmi()
    columns: dict[str, Any] = {spec.name: getattr(dmi, spec.name) for spec in SPECS[1:]}
    columns["head"] = np.frombuffer(head, "u1")
    return b"".join(encode(columns, SPECS))


def _seal(raw: bytearray) -> None:
    """Make every digest in a container right again, where its table still lies within it."""
    count = len(SPECS)
    for section in range(count):
        at = 24 + 64 * section
        offset, rows, width = struct.unpack_from("<QQQ", raw, at + 24)
        if offset + rows * width <= len(raw):
            raw[at + 48 : at + 64] = xxhash.xxh3_128_digest(raw[offset : offset + rows * width])
    end = 24 + 64 * count
    raw[end : end + 16] = xxhash.xxh3_128_digest(raw[:end])
