"""Hand-made generations, results and loss statements for the checker: small real filesystems, changed by hand."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

ROOT = Path(__file__).resolve().parents[2]
IMAGE_BYTES = {"ext4": 64 << 20, "xfs": 300 << 20}
MKFS = {"ext4": ("mkfs.ext4", "-q", "-b", "4096", "-O", "inline_data", "-I", "256"), "xfs": ("mkfs.xfs", "-q")}


def run(*argv: str | Path) -> str:
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, errors="surrogateescape", check=False)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


@contextlib.contextmanager
def writable(image: Path, point: Path, filesystem: str) -> Iterator[Path]:
    """An image mounted to be changed; its loop device goes with the mount."""
    point.mkdir(exist_ok=True)
    device = run("losetup", "--find", "--show", image).strip()
    try:
        run("mount", "-t", filesystem, "-o", "nouuid" if filesystem == "xfs" else "defaults", device, point)
    finally:
        run("losetup", "-d", device)
    try:
        yield point
    finally:
        run("umount", point)


def make(image: Path, filesystem: str) -> None:
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES[filesystem])
    run(*MKFS[filesystem], image)


def copy(old: Path, new: Path) -> Path:
    run("cp", "--sparse=always", "--reflink=auto", old, new)
    return new


def write(path: Path, content: bytes, mtime_ns: int | None = None) -> None:
    path.write_bytes(content)
    if mtime_ns is not None:
        os.utime(path, ns=(mtime_ns, mtime_ns))


def dmi_bytes(first: Iterable[int], count: Iterable[int]) -> bytes:
    """A container with the two sections that the checker reads among others, written from FORMAT.md alone."""
    sections = {
        "head": (b"{}", 1),
        "op_block": (np.array(list(first), "<u8").tobytes(), 8),
        "block_count": (np.array(list(count), "<u4").tobytes(), 4),
    }
    at = 24 + 64 * len(sections) + 16
    table, body = b"", b""
    for name, (raw, width) in sections.items():
        gap = -(at + len(body)) % 8
        body += bytes(gap)
        digest = xxhash.xxh3_128_digest(raw)
        table += struct.pack("<24sQQQ16s", name.encode(), at + len(body), len(raw) // width, width, digest)
        body += raw
    body += bytes(-(at + len(body)) % 8)
    total = at + len(body) + 16
    head = struct.pack("<8sHHIQ", b"LANDFALL", 1, 0, len(sections), total) + table
    return head + xxhash.xxh3_128_digest(head) + body + b"LANDFEND" + struct.pack("<Q", total)


def arrival_bytes(dmi: bytes, pieces: int, batches: Iterable[Iterable[tuple[int, int]]]) -> bytes:
    at = 24 + 64 * struct.unpack_from("<I", dmi, 12)[0]
    raw = struct.pack("<8sHHIQ16s16s8x", b"LANDARRV", 1, 0, 0, pieces, bytes(16), dmi[at : at + 16])
    for sequence, batch in enumerate(batches):
        rows = b"".join(struct.pack("<II", piece, bits) for piece, bits in batch)
        digest = xxhash.xxh3_128_digest(struct.pack("<IQ", len(rows) // 8, sequence) + rows)
        raw += b"BTCH" + struct.pack("<IQ", len(rows) // 8, sequence) + digest + rows
    return raw


def plainly_differing(base: Path, target: Path) -> list[int]:
    """The differing blocks, found the slow and obvious way."""
    found = []
    with base.open("rb") as left, target.open("rb") as right:
        for number in range(target.stat().st_size // 4096):
            if left.read(4096) != right.read(4096):
                found.append(number)
    return found


def blocks_by_filefrag(path: Path) -> set[int]:
    """A file's blocks by FIEMAP of the mounted filesystem: a way that the checker does not go."""
    blocks: set[int] = set()
    for line in run("filefrag", "-s", "-v", "-b4096", path).splitlines():
        words = line.replace(":", " ").replace("..", " ").split()
        if len(words) >= 6 and words[0].isdigit():
            blocks.update(range(int(words[3]), int(words[4]) + 1))
    return blocks


@dataclass(frozen=True, slots=True)
class Answer:
    """The checker's exit status and document."""

    status: int
    document: dict[str, Any]

    @property
    def figures(self) -> dict[str, int]:
        """The figures that are not 0."""
        names = ("false_recovered", "missed", "untouched_differ", "unlisted_blocks")
        return {name: self.document[name] for name in names if self.document[name]}


@dataclass(frozen=True, slots=True)
class Scene:
    """One transfer: the generations, which pieces arrived, and what a correct loss statement says."""

    directory: Path
    filesystem: str
    base: Path
    target: Path
    result: Path  # image; a test changes a copy
    differing: tuple[int, ...]
    missing: frozenset[int]  # blocks that did not arrive
    loss: tuple[dict[str, Any], ...]

    def check(
        self,
        served: Path,
        *more: str,
        loss: Iterable[dict[str, Any]] | None = None,
        missing: frozenset[int] | None = None,
        unlisted: int | None = None,
        base_differs: frozenset[int] = frozenset(),
    ) -> Answer:
        """Run the checker as its own process."""
        work = served.parent
        blocks = [block for block in self.differing if block != unlisted]
        dmi = dmi_bytes(blocks, [1] * len(blocks))
        lost = self.missing if missing is None else missing
        rows = [[(row, 1)] for row in range(min(3, len(blocks)))]
        rows += [[(row, 7 if block in base_differs else 3) for row, block in enumerate(blocks) if block not in lost]]
        record = arrival_bytes(dmi, len(blocks), rows) + b"BTCH\x01"  # a torn tail
        (work / "dmi").write_bytes(dmi)
        (work / "arrival").write_bytes(record)
        statement = {"files": list(self.loss if loss is None else loss), "deletions": "hold"}
        (work / "loss.json").write_text(json.dumps(statement))
        argv: list[str | Path] = ["--base", self.base, "--target", self.target, "--filesystem", self.filesystem, "--result", served]
        argv += ["--loss", work / "loss.json", "--dmi", work / "dmi", "--arrival", work / "arrival", "--out", work / "check.json"]
        return checker(*argv, *more, out=work / "check.json")


def checker(*argv: str | Path, out: Path | None = None) -> Answer:
    done = subprocess.run(
        [sys.executable, "-m", "mgmt.drill.checker", *map(str, argv)],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return Answer(done.returncode, json.loads(out.read_text() if out else done.stdout))


T0 = 1_700_000_000_123_456_789


def build(directory: Path, filesystem: str) -> Scene:
    """A base, a target with every kind of change, and the result of a right salvage in which ``big`` and ``new_lost`` did not arrive."""
    base, target, result = (directory / f"{name}.img" for name in ("base", "target", "result"))
    point = directory / "mnt"
    make(base, filesystem)
    with writable(base, point, filesystem) as root:
        _base_tree(root)
    copy(base, target)
    with writable(target, point, filesystem) as root:
        _change(root)
        missing = blocks_by_filefrag(root / "big") | blocks_by_filefrag(root / "new_lost")
        inodes = {path: os.lstat(root / path).st_ino for path in ("big", "new_lost", "appended")}
    copy(target, result)
    with writable(copy(base, directory / "old.img"), directory / "old", filesystem) as old, writable(result, point, filesystem) as root:
        _salvage(old, root)
    rows: list[dict[str, Any]] = [
        {"paths": [name], "outcome": "recovered"}
        for name in ("appended", "attributes", "inline", "link_c", "dir_renamed", "moved", "created", "pipe", "grown_dir", "saved", ".")
    ]
    rows[3] = {"paths": ["link_a", "link_b", "link_c"], "outcome": "recovered"}
    rows[0]["inode"] = inodes["appended"]
    rows += [
        {"paths": ["symlink"], "outcome": "recovered"},
        {"paths": [], "base_paths": ["symlink"], "outcome": "held", "now_at": ".landfall-held/symlink"},
        {"paths": ["grown_dir/in_it"], "outcome": "recovered"},
        {"paths": ["dir_renamed/\udcff\nodd"], "outcome": "recovered"},
        {"paths": ["big"], "outcome": "kept_at_base", "inode": inodes["big"], "reason": "not all its data arrived"},
        {"paths": ["new_lost"], "outcome": "absent", "reason": "not all its data arrived"},
        {"paths": [], "base_paths": ["deleted"], "outcome": "held"},
        {"paths": ["saved"], "base_paths": [], "outcome": "recovered"},
        {"base_paths": ["saved"], "outcome": "held", "now_at": ".landfall-held/saved"},
    ]
    differing = plainly_differing(base, target)
    # What no file's closure asks for (metadata, log) did not arrive either: it must not matter.
    return Scene(directory, filesystem, base, target, result, tuple(differing), frozenset(missing), tuple(rows))


def _base_tree(root: Path) -> None:
    for number in range(30):
        write(root / f"same{number}", os.urandom(100 + 999 * number), T0 + number)
    (root / "dir").mkdir()
    (root / "grown_dir").mkdir()
    write(root / "dir" / "inside", os.urandom(5000))
    (root / os.fsdecode(b"dir/\xff\nodd")).write_bytes(b"odd" * 3000)
    for name in ("appended", "attributes", "big", "deleted", "moved_from", "saved", "link_a"):
        write(root / name, os.urandom(200_000 if name == "big" else 20_000), T0)
    write(root / "inline", b"tiny", T0)
    os.link(root / "link_a", root / "link_b")
    (root / "symlink").symlink_to("old")
    os.setxattr(root / "same1", "user.colour", b"blue")
    with (root / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(700 << 20)
        file.write(b"island")


def _change(root: Path) -> None:
    with (root / "appended").open("ab") as file:
        file.write(os.urandom(9000))
    with (root / "big").open("r+b") as file:
        file.seek(50_000)
        file.write(os.urandom(60_000))
    (root / "attributes").chmod(0o4755)
    os.setxattr(root / "attributes", "trusted.level", b"7")
    write(root / "inline", b"tinier")
    os.link(root / "link_a", root / "link_c")
    (root / "dir").rename(root / "dir_renamed")
    with (root / os.fsdecode(b"dir_renamed/\xff\nodd")).open("r+b") as file:
        file.write(b"ODD")
    (root / "moved_from").rename(root / "moved")
    write(root / "created", os.urandom(30_000))
    write(root / "new_lost", os.urandom(30_000))
    write(root / ".saved.tmp", os.urandom(25_000))
    (root / ".saved.tmp").rename(root / "saved")
    (root / "deleted").unlink()
    (root / "symlink").unlink()
    (root / "symlink").symlink_to("new")
    write(root / "grown_dir" / "in_it", b"x" * 10_000)
    os.mkfifo(root / "pipe")


def _salvage(old: Path, root: Path) -> None:
    """Make the result, which is a copy of the target, what a right salvage serves."""
    _put_back(old / "big", root / "big", in_place=True)
    (root / "new_lost").unlink()
    _put_back(old / "deleted", root / "deleted")
    held = root / ".landfall-held"
    held.mkdir()
    _put_back(old / "saved", held / "saved")
    (held / "symlink").symlink_to("old")
    times = os.lstat(old / "symlink").st_mtime_ns
    os.utime(held / "symlink", ns=(times, times), follow_symlinks=False)


def _put_back(old: Path, new: Path, *, in_place: bool = False) -> None:
    if in_place:
        with old.open("rb") as source, new.open("r+b") as file:
            file.truncate()
            shutil.copyfileobj(source, file)
    else:
        shutil.copyfile(old, new)
    shutil.copystat(old, new)
    times = old.stat().st_mtime_ns
    os.utime(new, ns=(times, times))
