"""The exception table of a classic snapshot, as the kernel writes it and as it never should: read from files, without device-mapper."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.contract.errors import DeviceFailed, GenerationInvalid, LandfallError, LayoutUnsupported, VersionUnknown
from agent.volume.cow_table import cow_bytes, read_table, runs_of

MAGIC = 0x70416E53
ORIGIN_BYTES = 64 << 20


def device(
    folder: Path,
    pairs: list[tuple[int, int]],
    *,
    chunk_bytes: int = 4096,
    header: tuple[int, int, int] = (MAGIC, 1, 1),
    chunks: int = 2048,
) -> Path:
    """A COW device with a table written as drivers/md/dm-snap-persistent.c does."""
    path = folder / "cow"
    per_area = chunk_bytes // 16
    with open(path, "wb") as file:
        file.truncate(chunks * chunk_bytes)
        file.write(struct.pack("<4I", *header, chunk_bytes // 512))
        for number, pair in enumerate(pairs):
            area, row = divmod(number, per_area)
            file.seek((1 + area * (per_area + 1)) * chunk_bytes + row * 16)
            file.write(struct.pack("<QQ", *pair))
    return path


def kernels(olds: list[int], per_area: int = 256) -> list[tuple[int, int]]:
    """Pairs with the chunks that the kernel would hand out: one after another, jumping over the areas."""
    pairs, new = [], 2
    for old in olds:
        if (new - 1) % (per_area + 1) == 0:
            new += 1
        pairs.append((old, new))
        new += 1
    return pairs


@pytest.mark.parametrize("chunk_bytes", [4096, 16384])
def test_pairs_of_several_areas_come_sorted_and_in_runs(tmp_path: Path, chunk_bytes: int) -> None:
    per_area = chunk_bytes // 16
    olds = [*range(1000, 1000 + per_area + 10), 7, 3]
    pairs = kernels(olds, per_area)
    table = read_table(device(tmp_path, pairs, chunk_bytes=chunk_bytes, chunks=3000), ORIGIN_BYTES)
    assert table.chunk_blocks == chunk_bytes // 4096
    assert list(zip(table.old.tolist(), table.new.tolist(), strict=True)) == sorted(pairs)
    runs = runs_of(table)
    assert runs.first.tolist() == [3, 7, 1000, 1000 + per_area]  # the second area lies between the chunks of the last two
    assert runs.chunks.tolist() == [1, 1, per_area, 10]
    assert runs.address.tolist() == [dict(pairs)[first] for first in runs.first.tolist()]


def test_an_empty_table_and_one_that_fills_its_area(tmp_path: Path) -> None:
    assert len(read_table(device(tmp_path, []), ORIGIN_BYTES).old) == 0
    assert len(runs_of(read_table(device(tmp_path, []), ORIGIN_BYTES)).first) == 0
    assert len(read_table(device(tmp_path, kernels(list(range(256)))), ORIGIN_BYTES).old) == 256


@pytest.mark.parametrize(
    ("header", "refusal", "why"),
    [
        ((0x12345678, 1, 1), DeviceFailed, "begins with"),
        ((0, 0, 0), DeviceFailed, "begins with"),
        ((MAGIC, 1, 2), VersionUnknown, "version 2"),
        ((MAGIC, 0, 1), GenerationInvalid, "given up"),
        ((MAGIC, 7, 1), GenerationInvalid, "given up"),
    ],
)
def test_E8_a_header_that_is_not_that_of_a_valid_table_is_refused(
    tmp_path: Path, header: tuple[int, int, int], refusal: type[LandfallError], why: str
) -> None:
    with pytest.raises(refusal, match=why):
        read_table(device(tmp_path, kernels([1]), header=header), ORIGIN_BYTES)


@pytest.mark.parametrize("chunk_bytes", [0, 512, 2048, 12288, 4 << 20])
def test_chunks_of_other_sizes_are_refused(tmp_path: Path, chunk_bytes: int) -> None:
    path = device(tmp_path, [])
    with open(path, "r+b") as file:
        file.seek(12)
        file.write(struct.pack("<I", chunk_bytes // 512))
    with pytest.raises(LayoutUnsupported):
        read_table(path, ORIGIN_BYTES)


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        ([(1, 1)], "out of range"),  # the first area itself
        ([(1, 258)], "out of range"),  # the second area
        ([(1, 2048)], "out of range"),  # past the COW device
        ([(1, 2**64 - 1)], "out of range"),
        ([(ORIGIN_BYTES // 4096, 2)], "out of range"),  # past the origin
        ([(2**63, 2)], "out of range"),
        ([(1, 2), (1, 3)], "named twice"),
        ([(1, 2), (2, 2)], "named twice"),
    ],
)
def test_a_table_that_cannot_be_the_kernels_is_refused(tmp_path: Path, pairs: list[tuple[int, int]], why: str) -> None:
    with pytest.raises(DeviceFailed, match="cannot be believed") as refused:
        read_table(device(tmp_path, pairs), ORIGIN_BYTES)
    assert why in refused.value.cause


@pytest.mark.parametrize("chunks", [1, 2, 200, 257])
def test_a_device_that_ends_inside_its_table_is_refused(tmp_path: Path, chunks: int) -> None:
    path = device(tmp_path, kernels(list(range(300))))
    with open(path, "r+b") as file:
        file.truncate(chunks * 4096)
    with pytest.raises(DeviceFailed):
        read_table(path, ORIGIN_BYTES)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, ORIGIN_BYTES // 4096 - 1), unique=True, max_size=700), st.integers(0, 40), st.binary(min_size=1, max_size=16)
)
def test_whatever_is_in_an_area_is_read_right_or_refused(tmp_path: Path, olds: list[int], row: int, noise: bytes) -> None:
    pairs = kernels(olds)
    path = device(tmp_path, pairs)
    table = read_table(path, ORIGIN_BYTES)
    assert sorted(zip(table.old.tolist(), table.new.tolist(), strict=True)) == sorted(pairs)
    with open(path, "r+b") as file:
        file.seek(4096 + row * 16)
        file.write(noise)
    try:
        noisy = read_table(path, ORIGIN_BYTES)
    except LandfallError:
        return
    assert bool((noisy.new < 2048).all())
    assert bool((noisy.old < ORIGIN_BYTES // 4096).all())


@settings(max_examples=200)
@given(st.integers(0, 1 << 45), st.sampled_from([4096, 16384, 65536]))
def test_a_device_of_that_size_has_room_for_every_chunk(changed: int, chunk_bytes: int) -> None:
    pairs, per_area = -(-changed // chunk_bytes), chunk_bytes // 16
    last_area = pairs // per_area  # also the one that the kernel zeroes when the area before is full
    assert cow_bytes(changed, chunk_bytes) >= max(1 + last_area * (per_area + 1) + 1, 1 + pairs + last_area + 1) * chunk_bytes
