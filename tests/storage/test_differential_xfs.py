"""The XFS reader against real images; the truth comes from a byte compare, xfs_db and lstat."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from agent.contract.dmi import HOLE, ExtentFlag, Owner
from agent.differential.reader import View
from agent.differential.xfs import XfsReader
from agent.system.xfs import space_map
from agent.volume.substrate import ChangedRuns

pytestmark = [pytest.mark.root, pytest.mark.slow]

BLOCK = 4096
FRAGMENTS = 6500
"""Extents of one file, enough for a tree of two levels below the root in an inode of 512 bytes."""
LAYOUTS = {
    "plain": ["-m", "rmapbt=0,reflink=0,inobtcount=0", "-i", "sparse=0"],
    "reflink": ["-m", "rmapbt=0,reflink=1"],
    "rmap-reflink": ["-m", "rmapbt=1,reflink=1", "-i", "nrext64=1"],
    "rmap-odd": ["-m", "rmapbt=1,reflink=0", "-i", "size=1024", "-n", "size=16384"],
    "odd": ["-m", "rmapbt=0,reflink=1", "-i", "size=2048,nrext64=1", "-n", "size=8192", "-s", "size=4096"],
}


@dataclass(frozen=True)
class Stat:
    """What lstat, readlink and the extended attributes tell of an inode."""

    mode: int
    facts: tuple[object, ...]


@dataclass
class Truth:
    """A generation as xfs_db and a walk see it."""

    stats: dict[int, Stat] = field(default_factory=dict)
    generation: dict[int, int] = field(default_factory=dict)
    data: dict[int, dict[int, tuple[int, bool]]] = field(default_factory=dict)  # inode -> logical -> (physical, unwritten)
    owners: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))  # block -> regular inodes
    places: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # block -> times it is mapped by a file
    metadata: dict[int, int] = field(default_factory=dict)  # block -> inode whose directory, symlink or attributes it holds
    free: set[int] = field(default_factory=set)
    free_lists: set[int] = field(default_factory=set)
    log: range = range(0)


@dataclass
class Pair:
    """Two frozen generations of one volume, attached."""

    images: tuple[Path, Path]
    views: tuple[View, View]
    changed: ChangedRuns
    truth: tuple[Truth, Truth]
    nameless: int  # an open inode, unlinked since the base
    lent: list[int]  # an open, unlinked inode that shares its blocks, new in the target; none without reflink


def run(*argv: str | Path, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, (argv, done.stdout[-500:], done.stderr[-500:])
    return done.stdout


@contextlib.contextmanager
def attached(image: Path, mount_point: Path, *, writable: bool, sector: int = 512) -> Iterator[Path]:
    """Yield the loop device of an image, mounted."""
    mount_point.mkdir(exist_ok=True)
    how = [] if writable else ["-r"]
    device = Path(run("losetup", "--show", "-f", "-b", str(sector), *how, image).strip())
    try:
        run("mount", "-t", "xfs", "-o", "rw,nouuid" if writable else "ro,norecovery,nouuid", device, mount_point)
        try:
            yield device
        finally:
            run("umount", mount_point)
    finally:
        run("losetup", "-d", device)


@contextlib.contextmanager
def frozen(image: Path, mount_point: Path) -> Iterator[View]:
    with attached(image, mount_point, writable=False) as device:
        fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield View(device, mount_point, fd)
        finally:
            os.close(fd)


def take(image: Path, mount_point: Path, copy: Path) -> None:
    run("fsfreeze", "-f", mount_point)
    try:
        run("cp", "--sparse=always", image, copy)
    finally:
        run("fsfreeze", "-u", mount_point)


def differing(base: Path, target: Path) -> ChangedRuns:
    one, two = (np.memmap(path, np.uint64, "r").reshape(-1, BLOCK // 8) for path in (base, target))
    blocks = np.flatnonzero(np.any(one != two, axis=1)).astype(np.uint64)
    first, count = runs_of(blocks)
    return ChangedRuns(first, count, first + np.uint64(1 << 30), np.zeros(len(first), np.bool_))


def all_data(image: Path) -> ChangedRuns:
    """Return what a first transfer takes: all blocks that are not zeros."""
    content = np.memmap(image, np.uint64, "r").reshape(-1, BLOCK // 8)
    first, count = runs_of(np.flatnonzero(np.any(content != 0, axis=1)).astype(np.uint64))
    return ChangedRuns(first, count, np.full(len(first), HOLE, np.uint64), np.zeros(len(first), np.bool_))


def runs_of(blocks: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
    starts = np.concatenate([[0], breaks]).astype(np.int64)
    ends = np.concatenate([breaks, [len(blocks)]]).astype(np.int64)
    return blocks[starts], (ends - starts).astype(np.uint64)


# --- a volume's life


def fill(root: Path, reflink: bool) -> None:
    quiet = root / "quiet"
    quiet.mkdir()
    for n in range(200):
        (quiet / f"q{n}").write_bytes(os.urandom(500 + 37 * n))
    docs = root / "docs"
    docs.mkdir()
    for n in range(300):
        (docs / f"d{n:03}").write_bytes(os.urandom(1000 + 61 * n))
    doomed = root / "doomed"  # whole inode chunks go with it
    doomed.mkdir()
    for n in range(400):
        (doomed / f"gone{n}").write_bytes(b"gone" * 300)
    for name in ("big", "swap-a", "swap-b", "cut", "punched", "mapped"):
        (docs / name).write_bytes(os.urandom(400_000))
    with open(docs / "fragments", "wb") as file:
        for n in range(FRAGMENTS):
            os.pwrite(file.fileno(), os.urandom(BLOCK), n * 2 * BLOCK)
    with open(docs / "sparse", "wb") as file:
        os.pwrite(file.fileno(), b"end", 900_000_000)
    many = root / "many"
    many.mkdir()
    for n in range(6000):
        os.close(os.open(many / f"a rather long name for an empty file {n}", os.O_CREAT | os.O_WRONLY))
    (root / "short-link").symlink_to("x" * 40)
    (root / "long-link").symlink_to("/".join(["y" * 100] * 9))
    os.setxattr(docs / "d001", "user.small", b"1")
    os.setxattr(docs / "d002", "user.big", os.urandom(3000))
    os.setxattr(docs / "d003", "user.remote", os.urandom(60_000))
    for n in range(300):
        os.setxattr(docs / "d004", f"user.attribute{n}", os.urandom(200))
    os.mknod(root / "device", 0o600 | stat.S_IFBLK, os.makedev(7, 99))
    os.mkfifo(root / "fifo")
    os.link(docs / "d005", root / "hard")
    if reflink:
        run("cp", "--reflink=always", docs / "big", docs / "twin")


def change(root: Path, reflink: bool) -> None:
    docs = root / "docs"
    with open(docs / "d010", "ab") as file:
        file.write(os.urandom(9000))
    with open(docs / "big", "r+b") as file:
        os.pwrite(file.fileno(), os.urandom(8192), 20_000)
    (docs / "d011.tmp").write_bytes(os.urandom(50_000))
    (docs / "d011.tmp").rename(docs / "d011")
    for n in range(50):
        (docs / f"new{n}").write_bytes(os.urandom(200 * n))
    (docs / "d012").unlink()
    (docs / "d013").rename(root / "moved")
    (docs / "swap-a").rename(docs / "swap-c")
    (docs / "swap-b").rename(docs / "swap-a")
    (docs / "swap-c").rename(docs / "swap-b")
    (docs / "d014").chmod(0o600)
    os.chown(docs / "d015", 1234, 4321)
    os.truncate(docs / "cut", 100_001)
    run("fallocate", "-p", "-o", "40960", "-l", "81920", docs / "punched")
    run("fallocate", "-l", "1000000", docs / "reserved")
    run("fallocate", "-n", "-o", "500000", "-l", "500000", docs / "d016")
    with open(docs / "fragments", "r+b") as file:
        for n in range(0, FRAGMENTS, 7):
            os.pwrite(file.fileno(), os.urandom(BLOCK), n * 2 * BLOCK)
    with open(docs / "fragments2", "wb") as file:
        for n in range(900):
            os.pwrite(file.fileno(), os.urandom(BLOCK), n * 3 * BLOCK)
    os.link(docs / "d017", root / "hard2")
    (root / "hard").unlink()
    (root / "long-link2").symlink_to("/".join(["z" * 100] * 9))
    (root / "long-link").unlink()
    os.setxattr(docs / "d001", "user.small", b"2")
    os.setxattr(docs / "d003", "user.remote", os.urandom(60_000))
    os.setxattr(docs / "d018", "user.remote", os.urandom(30_000))
    for n in range(100, 400):
        os.setxattr(docs / "d004", f"user.attribute{n}", os.urandom(300))
    run("setfacl", "-m", "u:1234:rwx", docs / "d019") if shutil.which("setfacl") else None
    os.mknod(root / "device2", 0o600 | stat.S_IFCHR, os.makedev(1, 300))
    shutil.rmtree(root / "doomed")
    many = root / "many"
    for n in range(0, 6000, 5):
        (many / f"a rather long name for an empty file {n}").unlink()
    for n in range(800):
        (many / f"another rather long name for a file {n}").write_bytes(b"content of a small file" if n % 2 else b"")
    grown = root / "grown"
    grown.mkdir()
    for n in range(900):
        os.close(os.open(grown / f"{'long' * 30}{n}", os.O_CREAT | os.O_WRONLY))
    with open(docs / "mapped", "r+b") as file:  # as if written without a time stamp: the inode tells nothing
        os.pwrite(file.fileno(), os.urandom(5000), 100_000)
    with open(docs / "passing", "wb") as file:  # its blocks change and are free in the end
        file.write(os.urandom(200_000))
        os.fsync(file.fileno())
    (docs / "passing").unlink()
    if reflink:
        run("cp", "--reflink=always", docs / "d020", docs / "d020-twin")
        run("cp", "--reflink=always", docs / "fragments", docs / "fragments-twin")
        with open(docs / "twin", "r+b") as file:
            os.pwrite(file.fileno(), os.urandom(12288), 200_000)
        (docs / "written-then-shared").write_bytes(os.urandom(300_000))
        run("cp", "--reflink=always", docs / "written-then-shared", docs / "sharer")


# --- the truth


def stats_of(root: Path) -> dict[int, Stat]:
    found: dict[int, Stat] = {}
    names: dict[int, list[str]] = defaultdict(list)
    for where, folders, files in os.walk(root):
        for name in [".", *folders, *files] if where == str(root) else [*folders, *files]:
            path = Path(where) / name
            at = path.lstat()
            names[at.st_ino].append(name)
            link = str(path.readlink()) if stat.S_ISLNK(at.st_mode) else ""
            listing = tuple(sorted(entry.name for entry in path.iterdir())) if stat.S_ISDIR(at.st_mode) else ()
            attributes = tuple(
                sorted((key, os.getxattr(path, key, follow_symlinks=False)) for key in os.listxattr(path, follow_symlinks=False))
            )
            found[at.st_ino] = Stat(
                at.st_mode,
                (
                    at.st_uid,
                    at.st_gid,
                    at.st_size,
                    at.st_mtime_ns,
                    at.st_ctime_ns,
                    at.st_nlink,
                    at.st_rdev,
                    at.st_blocks,
                    link,
                    listing,
                    attributes,
                ),
            )
    return found


def xfs_db(image: Path, commands: list[str]) -> str:
    return run("xfs_db", "-r", "-f", image, stdin="\n".join(commands) + "\n")


def truth_of(image: Path, root: Path, nameless: list[int]) -> Truth:
    truth = Truth(stats_of(root))
    sb = dict(re.findall(r"^(\w+) = (\w+)$", xfs_db(image, ["sb 0", "p"]), re.MULTILINE))
    agblocks, agcount = int(sb["agblocks"]), int(sb["agcount"])
    shift = int(sb["agblklog"])
    log = int(sb["logstart"])
    first = (log >> shift) * agblocks + (log & ((1 << shift) - 1))
    truth.log = range(first, first + int(sb["logblocks"]))
    inodes = sorted([*truth.stats, *nameless])
    asked = [f"inode {inode}\np core.gen\nbmap -d\nbmap -a" for inode in inodes]
    parts = re.split(r"^core\.gen = ", xfs_db(image, asked).replace("xfs_db> ", ""), flags=re.MULTILINE)[1:]
    assert len(parts) == len(inodes)
    for inode, part in zip(inodes, parts, strict=True):
        truth.generation[inode] = int(part.split("\n", 1)[0])
        mapped: dict[int, tuple[int, bool]] = {}
        for logical, group, block, count, flag in re.findall(
            r"data offset (\d+) startblock \d+ \((\d+)/(\d+)\) count (\d+) flag (\d+)", part
        ):
            for n in range(int(count)):
                mapped[int(logical) + n] = (int(group) * agblocks + int(block) + n, flag == "1")
        if inode in nameless or stat.S_ISREG(truth.stats[inode].mode):
            truth.data[inode] = mapped
        else:
            truth.metadata.update({physical: inode for physical, _ in mapped.values()})
        for group, block, count in re.findall(r"attr offset \d+ startblock \d+ \((\d+)/(\d+)\) count (\d+)", part):
            truth.metadata.update({int(group) * agblocks + int(block) + n: inode for n in range(int(count))})
        if inode in truth.data:
            for physical, _ in mapped.values():
                truth.owners[physical].add(inode)
                truth.places[physical] += 1
    for group, block, count in re.findall(r"^\s*(\d+)\s+(\d+)\s+(\d+)$", xfs_db(image, ["freesp -d"]), re.MULTILINE):
        truth.free.update(int(group) * agblocks + int(block) + n for n in range(int(count)))
    for group in range(agcount):
        agf = dict(re.findall(r"^(\w+) = (\d+)$", xfs_db(image, [f"agf {group}", "p flfirst fllast flcount"]), re.MULTILINE))
        slots = {int(a): int(b) for a, b in re.findall(r"(\d+):(\d+)", xfs_db(image, [f"agfl {group}", "p bno"]))}
        size = max(slots) + 1 if slots else 1
        for n in range(int(agf["flcount"])):
            truth.free_lists.add(group * agblocks + slots[(int(agf["flfirst"]) + n) % size])
    return truth


@pytest.fixture(scope="module", params=list(LAYOUTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two generations of a volume that went through everything."""
    layout = str(request.param)
    here = tmp_path_factory.mktemp(layout)
    image, base, target = (here / name for name in ("op.img", "base.img", "target.img"))
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    run("mkfs.xfs", "-q", *LAYOUTS[layout], image)
    reflink = "reflink=1" in " ".join(LAYOUTS[layout])
    sector = 4096 if "-s" in LAYOUTS[layout] else 512
    try:
        with attached(image, here / "op", writable=True, sector=sector):
            root = here / "op"
            fill(root, reflink)
            with open(root / "deleted-while-open", "wb") as open_file:
                open_file.write(os.urandom(70_000))
                take(image, root, base)
                nameless = os.fstat(open_file.fileno()).st_ino
                (root / "deleted-while-open").unlink()
                open_file.write(os.urandom(30_000))
                open_file.flush()
                change(root, reflink)
                with contextlib.ExitStack() as open_files:
                    lent = []
                    if reflink:
                        run("cp", "--reflink=always", root / "docs" / "d021", root / "lent")
                        lent.append(os.fstat(open_files.enter_context(open(root / "lent", "rb")).fileno()).st_ino)
                        (root / "lent").unlink()
                    take(image, root, target)
        with contextlib.ExitStack() as stack:
            views = (stack.enter_context(frozen(base, here / "b")), stack.enter_context(frozen(target, here / "t")))
            yield Pair(
                (base, target),
                views,
                differing(base, target),
                (truth_of(base, here / "b", []), truth_of(target, here / "t", [nameless, *lent])),
                nameless,
                lent,
            )
    finally:
        for path in (image, base, target):
            path.unlink(missing_ok=True)


# --- the reader


def test_every_inode_that_differs_is_reported_and_no_other(pair: Pair) -> None:
    reader = XfsReader(pair.views[0], pair.views[1], pair.changed)
    changes = reader.changed_inodes()
    base, target = pair.truth
    columns = (changes.inode, changes.generation, changes.kind, changes.in_base, changes.in_target, changes.target_nlink)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    want = set()
    for inode in base.stats.keys() | target.stats.keys():
        old, new = (truth.generation.get(inode) if inode in truth.stats else None for truth in pair.truth)
        if old is not None and old == new:
            if base.stats[inode] != target.stats[inode] or base.data.get(inode) != target.data.get(inode):
                want.add((inode, new, target.stats[inode].mode >> 12, True, True, target.stats[inode].facts[5]))
            continue
        if old is not None and inode != pair.nameless:
            want.add((inode, old, base.stats[inode].mode >> 12, True, False, 0))
        if new is not None:
            want.add((inode, new, target.stats[inode].mode >> 12, False, True, target.stats[inode].facts[5]))
    for inode in pair.lent:
        want.add((inode, target.generation[inode], 8, False, True, 0))
        for name in ("d020", "d021"):  # nothing but a flag says that its blocks are shared now
            lender = (pair.views[1].mount_point / "docs" / name).stat().st_ino
            want.add((lender, target.generation[lender], 8, True, True, 1))
    want.add((pair.nameless, target.generation[pair.nameless], 8, True, True, 0))
    assert set(rows) == want
    assert len(rows) == len(set(rows))
    assert rows == sorted(rows, key=lambda row: (row[0], not row[3]))
    assert reader.root_inode == (pair.views[1].mount_point).stat().st_ino


def test_H10_extents_are_what_xfs_db_says_and_give_the_content(pair: Pair) -> None:
    reader = XfsReader(pair.views[0], pair.views[1], pair.changed)
    target = pair.truth[1]
    inodes = np.array(sorted(target.data), np.uint64)
    extents = reader.extents(inodes, np.array([target.generation[int(n)] for n in inodes], np.uint32))
    assert len(extents.start) == len(inodes) + 1
    assert int(np.max(np.diff(extents.start))) >= FRAGMENTS
    content = np.memmap(pair.images[1], np.uint8, "r")
    paths = {path.lstat().st_ino: path for path in files_of(pair.views[1].mount_point)}
    for row, inode in enumerate(inodes.tolist()):
        at = slice(int(extents.start[row]), int(extents.start[row + 1]))
        mapped: dict[int, tuple[int, bool]] = {}
        shared: dict[int, bool] = {}
        size = paths[inode].stat().st_size if inode in paths else 0
        whole = bytearray(min(size, 8 << 20))
        last = -1
        for logical, physical, blocks, flags in zip(
            *(column[at].tolist() for column in (extents.logical, extents.physical, extents.blocks, extents.flags)), strict=True
        ):
            assert logical > last
            last = logical + blocks - 1
            for n in range(blocks):
                mapped[logical + n] = (physical + n, bool(flags & ExtentFlag.UNWRITTEN))
                shared[physical + n] = bool(flags & ExtentFlag.SHARED)
            if not flags & ExtentFlag.UNWRITTEN and logical * BLOCK < len(whole):
                got = content[physical * BLOCK : (physical + blocks) * BLOCK].tobytes()[: len(whole) - logical * BLOCK]
                whole[logical * BLOCK : logical * BLOCK + len(got)] = got
        assert mapped == target.data[inode]
        assert shared == {physical: target.places[physical] > 1 for physical, _ in mapped.values()}
        if inode in paths:
            with open(paths[inode], "rb") as file:
                assert file.read(len(whole)) == whole, paths[inode]


def files_of(root: Path) -> Iterator[Path]:
    for where, _, files in os.walk(root):
        for name in files:
            path = Path(where) / name
            if stat.S_ISREG(path.lstat().st_mode):
                yield path


def check_ownership(reader: XfsReader, changed: ChangedRuns, truth: Truth, blind: frozenset[int] = frozenset()) -> None:
    changes = reader.changed_inodes()
    keep = ~np.isin(changes.inode, np.array(sorted(blind), np.uint64))
    changes = type(changes)(
        changes.inode[keep],
        changes.generation[keep],
        changes.kind[keep],
        changes.in_base[keep],
        changes.in_target[keep],
        changes.target_nlink[keep],
    )
    files = (changes.kind == 8) & changes.in_target
    regular = changes.inode[files]
    owned = reader.ownership(changes, regular, reader.extents(regular, changes.generation[files]))
    claims: dict[int, set[int]] = defaultdict(set)
    for run_row, inode in zip(owned.claim_run.tolist(), owned.claim_inode.tolist(), strict=True):
        claims[run_row].add(inode)
    assert owned.claim_run.tolist() == sorted(owned.claim_run.tolist())
    got: dict[int, tuple[int, set[int]]] = {}
    end = 0
    for row, (first, blocks, owner) in enumerate(zip(owned.first.tolist(), owned.blocks.tolist(), owned.owner.tolist(), strict=True)):
        assert first >= end
        end = first + blocks
        got.update(dict.fromkeys(range(first, end), (owner, claims[row])))
    want: dict[int, tuple[int, set[int]]] = {}
    for first, blocks in zip(changed.first.tolist(), changed.blocks.tolist(), strict=True):
        for block in range(first, first + blocks):
            if truth.owners.get(block):
                want[block] = (Owner.FILE, truth.owners[block])
            elif block in truth.free - truth.free_lists:
                want[block] = (Owner.FREE, set())
            elif block in truth.log:
                want[block] = (Owner.JOURNAL, set())
            else:
                want[block] = (Owner.METADATA, {truth.metadata[block]} & blind if block in truth.metadata else set())
    assert got.keys() == want.keys()
    wrong = {block: (got[block], want[block]) for block in want if got[block] != want[block]}
    assert not wrong, dict(list(wrong.items())[:10])
    assert bool(blind) == any(owner == Owner.METADATA and inodes for owner, inodes in got.values())
    for owner in Owner:
        assert any(value[0] == owner for value in want.values()), f"nothing of {owner!r} in this differential"


def test_every_changed_block_has_its_owner(pair: Pair) -> None:
    check_ownership(XfsReader(pair.views[0], pair.views[1], pair.changed), pair.changed, pair.truth[1])


def test_inodes_that_tell_nothing_are_found_by_their_blocks(pair: Pair) -> None:
    root = pair.views[1].mount_point
    names = ("mapped", "fragments2", "d011", "d003", "d004", "d018", ".", "../many", "../grown", "../long-link2")
    blind = frozenset((root / "docs" / name).lstat().st_ino for name in names)
    check_ownership(XfsReader(pair.views[0], pair.views[1], pair.changed), pair.changed, pair.truth[1], blind)


def test_a_first_transfer_has_all_inodes_and_owners(pair: Pair) -> None:
    changed = all_data(pair.images[1])
    reader = XfsReader(None, pair.views[1], changed)
    changes = reader.changed_inodes()
    assert set(changes.inode.tolist()) == {*pair.truth[1].stats, pair.nameless, *pair.lent}
    assert bool(np.all(changes.in_target))
    assert not bool(np.any(changes.in_base))
    check_ownership(reader, changed, pair.truth[1])


def test_equal_generations_have_no_changes(pair: Pair) -> None:
    nothing = np.zeros(0, np.uint64)
    reader = XfsReader(pair.views[1], pair.views[1], ChangedRuns(nothing, nothing, nothing, np.zeros(0, np.bool_)))
    changes = reader.changed_inodes()
    assert len(changes.inode) == 0
    extents = reader.extents(nothing, np.zeros(0, np.uint32))
    assert extents.start.tolist() == [0]
    assert len(reader.ownership(changes, nothing, extents).first) == 0


def test_the_space_map_covers_what_was_asked_for(pair: Pair) -> None:
    total = pair.images[1].stat().st_size // BLOCK
    for first, end in ((0, total), (5, 6), (total // 2, total // 2 + 3), (total - 1, total)):
        told = space_map(pair.views[1].mount_fd, [(first, end)])
        covered = np.zeros(total, np.bool_)
        for at, blocks in zip(told.first.tolist(), told.blocks.tolist(), strict=True):
            covered[at : at + blocks] = True
        assert bool(np.all(covered[first:end]))
