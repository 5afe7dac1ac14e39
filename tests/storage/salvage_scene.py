"""A volume with two generations on a real substrate, a DMI of them made by walking both trees, and the landing volume of a broken transfer.

The DMI here comes from lstat, FIEMAP and the changed blocks: slow, simple, and a second opinion on the agent's own builder.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from agent.contract.arrival import COMPLETE, ArrivalRecord, decode, encode_batch, encode_head
from agent.contract.digest import block_digests, file_digest, payload_digest, piece_digest
from agent.contract.dmi import HOLE, Change, Dmi, ExtentFlag, FileKind, Head, Side
from agent.contract.identity import BLOCK_BYTES, FilesystemKind, GenerationKind, empty_generation, next_generation
from agent.contract.messages import Deletions, GenerationFacts, Progress, Role, Salvaged, UpdateInstruction
from agent.differential.build import BuildRequest
from agent.differential.build import build as agent_build
from agent.differential.reader import View
from agent.recovery.salvage import SalvageJob, salvage
from agent.system import attributes, block
from agent.system.handles import identity_at
from agent.volume import filesystem
from agent.volume.reflink import ReflinkSubstrate
from agent.volume.substrate import VolumeRecord, Workspace, WorkspaceKind

Identity = tuple[int, int]
Names = dict[Identity, list[bytes]]
READ_ONLY = {FilesystemKind.EXT4: "ro,noload", FilesystemKind.XFS: "ro,norecovery,nouuid"}
READ_WRITE = {FilesystemKind.EXT4: "rw,noatime", FilesystemKind.XFS: "rw,noatime,nouuid"}
SIZE = {FilesystemKind.EXT4: 64 << 20, FilesystemKind.XFS: 320 << 20}
MKFS = {
    FilesystemKind.EXT4: ("mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-N", "8192", "-E", "lazy_itable_init=0,nodiscard"),
    FilesystemKind.XFS: ("mkfs.xfs", "-q", "-f", "-K", "-b", "size=4096"),
}


@dataclass(frozen=True, slots=True)
class Node:
    """What is promised of an inode, and what a reader sees of its content."""

    kind: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    device: int
    link: bytes
    content: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    project: int
    flags: int

    def but_mtime(self) -> Node:
        return replace(self, mtime_ns=0)


@dataclass(slots=True)
class Walk:
    """A tree: its nodes by identity, and its names by path."""

    paths: dict[bytes, Identity] = field(default_factory=dict)
    nodes: dict[Identity, Node] = field(default_factory=dict)
    extents: dict[Identity, list[tuple[int, int, int, int]]] = field(default_factory=dict)
    inline: set[Identity] = field(default_factory=set)

    def names(self) -> Names:
        found: Names = defaultdict(list)
        for path, identity in sorted(self.paths.items()):
            found[identity].append(path)
        return found

    def node(self, path: bytes) -> Node:
        return self.nodes[self.paths[path]]

    def facts(self) -> dict[bytes, Node]:
        return {path: self.nodes[identity] for path, identity in self.paths.items()}


def walk(root: Path) -> Walk:
    """Reads a mounted tree, the root under the path b""."""
    found = Walk()
    root_fd = os.open(root, os.O_RDONLY)
    try:
        todo = [b""]
        while todo:
            path = todo.pop()
            identity = identity_at(root_fd, path or b".")
            found.paths[path] = identity
            if identity not in found.nodes:
                full = os.path.join(os.fsencode(root), path) if path else os.fsencode(root)
                found.nodes[identity] = _node(full, identity, found)
            if found.nodes[identity].kind == FileKind.DIRECTORY:
                names = os.listdir(os.path.join(os.fsencode(root), path))
                todo += [path + b"/" + name if path else name for name in names]
    finally:
        os.close(root_fd)
    return found


def _node(full: bytes, identity: Identity, found: Walk) -> Node:
    state = os.lstat(full)
    kind, content, link, project, flags = stat.S_IFMT(state.st_mode) >> 12, b"", b"", 0, 0
    xattrs = {os.fsencode(name): os.getxattr(full, name, follow_symlinks=False) for name in os.listxattr(full, follow_symlinks=False)}
    if kind == FileKind.SYMLINK:
        link = os.readlink(full)
    if kind in (FileKind.REGULAR, FileKind.DIRECTORY):
        fd = os.open(full, os.O_RDONLY | os.O_NOATIME)
        try:
            project, flags = attributes.project(fd), attributes.flags(fd)
            if kind == FileKind.REGULAR:
                content = _content(fd, state.st_size)
                rows = block.extent_map(fd)
                extents = []
                columns = (column.tolist() for column in (rows.logical, rows.physical, rows.length, rows.flags))
                for logical, physical, length, mark in zip(*columns, strict=True):
                    if mark & block.ExtentFlag.DATA_INLINE:
                        found.inline.add(identity)
                        continue
                    unwritten = ExtentFlag.UNWRITTEN if mark & block.ExtentFlag.UNWRITTEN else 0
                    shared = ExtentFlag.SHARED if mark & block.ExtentFlag.SHARED else 0
                    extents.append((logical // BLOCK_BYTES, physical // BLOCK_BYTES, length // BLOCK_BYTES, int(unwritten | shared)))
                found.extents[identity] = extents
        finally:
            os.close(fd)
    is_node = kind in (FileKind.BLOCK, FileKind.CHARACTER)
    return Node(
        kind,
        stat.S_IMODE(state.st_mode),
        state.st_uid,
        state.st_gid,
        state.st_size if kind != FileKind.DIRECTORY else 0,
        state.st_mtime_ns,
        (os.major(state.st_rdev) << 32 | os.minor(state.st_rdev)) if is_node else 0,
        link,
        content,
        tuple(sorted(xattrs.items())),
        project,
        flags,
    )


def _content(fd: int, size: int) -> bytes:
    """Content; of a large sparse file where its data is and what it is."""
    if size <= 8 << 20:
        return os.pread(fd, size, 0)
    parts, at = [], 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        data = os.pread(fd, at - begin, begin)
        if data.count(0) != len(data):
            parts.append(b"%d:" % begin + data)
    return b"|".join(parts)


def slots(tree: Walk, identity: Identity, names: Names) -> set[tuple[Identity, bytes]]:
    parts = [path.rpartition(b"/") for path in names.get(identity, []) if path]
    return {(tree.paths[above], name) for above, _, name in parts}


class Scene:
    """One volume on a pool. ``fill`` makes the base, ``change`` the target, ``build`` the DMI, ``land`` the landing volume."""

    def __init__(self, pool: Path, kind: FilesystemKind, tmp: Path, mkfs: tuple[str, ...] = ()) -> None:
        self.substrate, self.kind, self.tmp = self.substrate_on(pool), kind, tmp
        self.mkfs = MKFS[kind] + mkfs
        self.volume = uuid4()
        self.substrate.create(VolumeRecord(self.volume, f"v{os.urandom(4).hex()}", kind, SIZE[kind], 512, Role.PRIMARY, 1))
        self.g0 = self.substrate.generations(self.volume)[0]
        with self.substrate.operational(self.volume) as device:
            subprocess.run([*self.mkfs, str(device)], check=True, capture_output=True)
        self.base = self.target = self.g0
        self.mount_folder = tmp / "mounts"
        self.arrival_bytes = b""

    @staticmethod
    def substrate_on(pool: Path) -> ReflinkSubstrate:
        """A substrate of the scene's own; another kind of scene has another one."""
        return ReflinkSubstrate.initialise(pool / uuid4().hex)

    def remove(self) -> None:
        """Gives the pool's room back."""
        self.substrate.remove(self.volume)

    def fill(self, act: Callable[[Path], None]) -> None:
        self.base = self.target = self._next(act)

    def change(self, act: Callable[[Path], None]) -> None:
        self.target = self._next(act)

    def _next(self, act: Callable[[Path], None]) -> GenerationFacts:
        with self.substrate.operational(self.volume) as device, mount(device, self.tmp / "op", self.kind, READ_WRITE) as root:
            act(root)
        counter = self.substrate.generations(self.volume)[-1].id.counter
        facts = GenerationFacts(next_generation(self.volume, 1, counter), GenerationKind.FROZEN, 1)
        self.substrate.take(self.volume, None, facts)
        return facts

    def live(self, *acts: Callable[[Path], list[int]]) -> None:
        """Takes base and target under a freeze while the descriptors that the acts return are open."""
        taken: list[GenerationFacts] = []
        held: list[int] = []
        with self.substrate.operational(self.volume) as device, mount(device, self.tmp / "op", self.kind, READ_WRITE) as root:
            try:
                for act in acts:
                    held += act(root)
                    counter = self.substrate.generations(self.volume)[-1].id.counter
                    taken.append(GenerationFacts(next_generation(self.volume, 1, counter), GenerationKind.FROZEN, 1))
                    self.substrate.take(self.volume, root, taken[-1])
            finally:
                for fd in held:
                    os.close(fd)
        self.base, self.target = taken

    @contextmanager
    def opened(self, generation: GenerationFacts) -> Iterator[Path]:
        where = self.tmp / f"ro-{uuid4().hex[:8]}"
        with self.substrate.reading(generation.id) as device, mount(device, where, self.kind, READ_ONLY) as root:
            yield root

    def walked(self, generation: GenerationFacts) -> Walk:
        if generation.id == empty_generation(self.volume):
            return Walk()
        with self.opened(generation) as root:
            return walk(root)

    def bytes_of(self, generation: GenerationFacts) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The generation's blocks; holes of its image are not read."""
        with open(self.substrate._image(generation.id), "rb", buffering=0) as file:
            blocks = np.zeros(os.fstat(file.fileno()).st_size, np.uint8)
            at = 0
            while at < len(blocks):
                try:
                    begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:  # nothing but holes
                    break
                at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
                os.preadv(file.fileno(), [blocks[begin:at].data], begin)
        return blocks.reshape(-1, BLOCK_BYTES)

    def build(self) -> Built:
        return build(self)

    def build_as_the_agent_does(self) -> Built:
        """The DMI by the agent's own builder, with the trees walked here."""
        with ExitStack() as opened:
            views = {generation.id: opened.enter_context(self._view(generation)) for generation in {self.base, self.target} - {self.g0}}
            target = views[self.target.id]
            request = BuildRequest(
                uuid4(), self.base.id, self.target.id, 1, 2, "volume", SIZE[self.kind], 512, self.kind,
                filesystem.mkfs_arguments(target.device, self.kind), self.substrate.differential_identity(self.base.id),
                views.get(self.base.id), target, self.substrate.changed(self.base.id, self.target.id), self.tmp / "state",
            )  # fmt: skip
            dmi = Dmi.decode(b"".join(agent_build(request).encode()))
        base, walked = self.walked(self.base), self.walked(self.target)
        rows = {(inode, of): row for row, (inode, of) in enumerate(zip(dmi.inode.tolist(), dmi.inode_generation.tolist(), strict=True))}
        return Built(dmi, base, walked, self.bytes_of(self.target), rows)

    @contextmanager
    def _view(self, generation: GenerationFacts) -> Iterator[View]:
        where = self.tmp / f"view-{uuid4().hex[:8]}"
        with self.substrate.reading(generation.id) as device, mount(device, where, self.kind, READ_ONLY):
            fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield View(device, where, fd)
            finally:
                os.close(fd)

    def land(self, built: Built, missing: Iterable[int] = ()) -> ArrivalRecord:
        """Makes the landing volume with every piece but ``missing``."""
        lacking = set(missing)
        landing = Workspace(self.volume, built.dmi.head.transfer, WorkspaceKind.LANDING)
        self.substrate.begin(landing, self.base.id)
        arrived = [piece for piece in range(built.dmi.piece_total) if piece not in lacking]
        with self.substrate.writing(landing) as device, open(device, "r+b", buffering=0) as file:
            for piece in arrived:
                first, blocks = int(built.dmi.op_block[piece]), int(built.dmi.block_count[piece])
                os.pwrite(file.fileno(), built.image[first : first + blocks].tobytes(), first * BLOCK_BYTES)
            os.fsync(file.fileno())
        transfer, digest = built.dmi.head.transfer, bytes(16)
        raw = encode_head(transfer, digest, built.dmi.piece_total)
        if arrived:
            raw += encode_batch(0, np.array(arrived, np.uint32), np.full(len(arrived), COMPLETE, np.uint8))
        self.arrival_bytes = raw
        return decode(raw, transfer=transfer, dmi_digest=digest, pieces=built.dmi.piece_total)

    def job(
        self,
        built: Built,
        arrival: ArrivalRecord,
        *,
        files: Iterable[int] | None = None,
        deletions: Deletions = Deletions.HOLD,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> SalvageJob:
        """A job that designates what a determination would (or ``files``)."""
        whole = built.whole(arrival)
        chosen = tuple(whole if files is None else files)
        complete = set(chosen) == set(built.judged())
        instruction = UpdateInstruction(built.dmi.head.transfer, arrival.dmi_digest.hex(), chosen, deletions, complete)
        return SalvageJob(self.substrate, built.dmi, arrival, instruction, self.mount_folder, progress)

    def salvaged(self, job: SalvageJob) -> tuple[Salvaged, Walk]:
        """Salvages and returns what came of it, after checking that nothing is left mounted."""
        result = salvage(job)
        assert str(self.mount_folder) not in Path("/proc/self/mountinfo").read_text()
        assert not self.substrate.exists(job.workspace)
        return result, self.walked_salvaged(result)

    def walked_salvaged(self, result: Salvaged) -> Walk:
        with self.substrate.reading(result.generation.id) as device:
            check(device, self.kind)
        return self.walked(result.generation)


@contextmanager
def mount(device: Path, mount_point: Path, kind: FilesystemKind, options: dict[FilesystemKind, str]) -> Iterator[Path]:
    mount_point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", kind.value, "-o", options[kind], device, mount_point], check=True, capture_output=True)
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", mount_point], check=True)


def check(device: Path, kind: FilesystemKind) -> None:
    """Fails unless the filesystem is sound by its own checker."""
    argv = ["e2fsck", "-fn", str(device)] if kind is FilesystemKind.EXT4 else ["xfs_repair", "-n", str(device)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(slots=True)
class Built:
    """A DMI and the trees that it was made from."""

    dmi: Dmi
    base: Walk
    target: Walk
    image: np.ndarray[Any, np.dtype[np.uint8]]  # the target's blocks
    rows: dict[Identity, int]

    def row(self, path: bytes) -> int:
        identity = self.target.paths.get(path) or self.base.paths[path]
        return self.rows[identity]

    def judged(self) -> list[int]:
        skipped = np.uint8(Change.DELETED | Change.NAMELESS)
        return np.flatnonzero((self.dmi.change & skipped) == 0).tolist()

    def whole(self, arrival: ArrivalRecord) -> list[int]:
        return [row for row in self.judged() if bool(np.all(arrival.complete[self.dmi.needs(row)]))]

    def pieces(self, *paths: bytes) -> list[int]:
        return [piece for path in paths for piece in self.dmi.needs(self.row(path)).tolist()]


def build(scene: Scene) -> Built:
    """Make the DMI of a scene's base and target."""
    base, target = scene.walked(scene.base), scene.walked(scene.target)
    base_names, target_names = base.names(), target.names()
    runs = scene.substrate.changed(scene.base.id, scene.target.id)
    image = scene.bytes_of(scene.target)
    before = scene.bytes_of(scene.base)
    total = len(image)
    changed, hole = np.zeros(total, np.bool_), np.zeros(total, np.bool_)
    for first, blocks, target_hole in zip(runs.first.tolist(), runs.blocks.tolist(), runs.target_hole.tolist(), strict=True):
        changed[first : first + blocks], hole[first : first + blocks] = True, target_hole

    rows: list[tuple[Identity, int]] = []
    for identity in sorted(base.nodes.keys() | target.nodes.keys()):
        change = _change(base, target, base_names, target_names, identity, changed)
        if change:
            rows.append((identity, int(change)))
    row_of = {identity: row for row, (identity, _) in enumerate(rows)}

    owners: dict[int, frozenset[int]] = {}
    for row, (identity, _) in enumerate(rows):
        for _, physical, blocks, _ in target.extents.get(identity, []):
            for at in np.flatnonzero(changed[physical : physical + blocks]).tolist():
                owners[physical + at] = owners.get(physical + at, frozenset()) | {row}
    pieces: list[tuple[int, int, frozenset[int], bool]] = []
    for at in np.flatnonzero(changed).tolist():
        mine, empty = owners.get(at, frozenset()), bool(hole[at])
        if pieces and pieces[-1][0] + pieces[-1][1] == at and pieces[-1][2:] == (mine, empty) and pieces[-1][1] < 256:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + 1, mine, empty)
        else:
            pieces.append((at, 1, mine, empty))
    needs: list[list[int]] = [[] for _ in rows]
    for number, piece in enumerate(pieces):
        for row in piece[2]:
            needs[row].append(number)

    with scene.substrate.reading(scene.target.id) as device:
        arguments = filesystem.mkfs_arguments(device, scene.kind)
    head = Head(
        uuid4(), scene.base.id, scene.target.id, 1, 2, "volume", total * BLOCK_BYTES, 512, scene.kind, arguments,
        target.paths[b""][0], scene.substrate.differential_identity(scene.base.id),
    )  # fmt: skip
    dmi = _columns(head, pieces, needs, rows, (base, target, base_names, target_names), (before, image))
    return Built(dmi, base, target, image, row_of)


def _change(base: Walk, target: Walk, base_names: Names, target_names: Names, identity: Identity, changed: Any) -> Change:
    if identity not in base.nodes:
        return Change.NEW
    if identity not in target.nodes:
        return Change.DELETED
    old, new, change = base.nodes[identity], target.nodes[identity], Change(0)
    if old.content != new.content or old.size != new.size or base.extents.get(identity) != target.extents.get(identity):
        change |= Change.CONTENT
    for _, physical, blocks, _ in target.extents.get(identity, []):
        if changed[physical : physical + blocks].any():
            change |= Change.CONTENT
    if replace(old, content=b"") != replace(new, content=b""):
        change |= Change.ATTRIBUTES
    if slots(base, identity, base_names) != slots(target, identity, target_names):
        change |= Change.NAMES | Change.ATTRIBUTES
    return change


def _columns(head: Head, pieces: Any, needs: Any, rows: Any, trees: Any, images: Any) -> Dmi:
    base, target, base_names, target_names = trees
    before, image = images

    def starts(lengths: Iterable[int]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        return np.concatenate([[0], np.cumsum(list(lengths), dtype=np.uint64)]).astype(np.uint64)

    def joined(parts: list[bytes]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.frombuffer(b"".join(parts), np.uint8)

    nodes = [target.nodes.get(identity) or base.nodes[identity] for identity, _ in rows]
    alive = [identity in target.nodes for identity, _ in rows]
    extents = [target.extents.get(identity, []) if lives else [] for (identity, _), lives in zip(rows, alive, strict=True)]
    payloads = [
        node.link or (node.content if lives and identity in target.inline else b"")
        for (identity, _), node, lives in zip(rows, nodes, alive, strict=True)
    ]
    digests = []
    for node, mapped, payload in zip(nodes, extents, payloads, strict=True):
        written = [(logical, physical, blocks) for logical, physical, blocks, flags in mapped if not flags & ExtentFlag.UNWRITTEN]
        if written:
            digests.append(file_digest(node.size, [(logical, block_digests(image[p : p + n].tobytes())) for logical, p, n in written]))
        else:
            digests.append(payload_digest(node.size, payload))
    names: list[list[tuple[int, int, bytes]]] = []
    for identity, _ in rows:
        listed = []
        for side, tree, known in ((Side.BASE, base, base_names), (Side.TARGET, target, target_names)):
            listed += [(int(side), tree.paths[path.rpartition(b"/")[0]][0], path) for path in known.get(identity, [])]
        names.append(listed)
    flat_names = [name for listed in names for name in listed]
    flat_extents = [extent for mapped in extents for extent in mapped]
    xattrs = [node.xattrs for node in nodes]
    flat_xattrs = [pair for held in xattrs for pair in held]
    links = [len(target_names.get(identity, [])) or len(base_names.get(identity, [])) for identity, _ in rows]

    def u64(values: Iterable[int]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        return np.array(list(values), dtype=np.uint64)

    def u32(values: Iterable[int]) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return np.array(list(values), dtype=np.uint32)

    def u8(values: Iterable[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.array(list(values), dtype=np.uint8)

    dmi = Dmi(
        head,
        op_block=u64(piece[0] for piece in pieces),
        diff_block=np.full(len(pieces), HOLE, np.uint64),
        block_count=u32(piece[1] for piece in pieces),
        owner=u8(1 if piece[2] else 0 for piece in pieces),
        target_hole=u8(piece[3] for piece in pieces),
        update_digest=_digests(piece_digest(block_digests(image[p[0] : p[0] + p[1]].tobytes()), p[0]) for p in pieces),
        diff_digest=_digests(piece_digest(block_digests(before[p[0] : p[0] + p[1]].tobytes()), p[0]) for p in pieces),
        inode=u64(identity[0] for identity, _ in rows),
        inode_generation=u32(identity[1] for identity, _ in rows),
        kind=u8(node.kind for node in nodes),
        change=u8(change for _, change in rows),
        mode=u32(node.mode if node.kind != FileKind.SYMLINK else 0o777 for node in nodes),
        uid=u32(node.uid for node in nodes),
        gid=u32(node.gid for node in nodes),
        nlink=u32(links),
        size=u64(node.size for node in nodes),
        mtime_s=np.array([node.mtime_ns // 10**9 for node in nodes], np.int64),
        mtime_ns=u32(node.mtime_ns % 10**9 for node in nodes),
        device=u64(node.device for node in nodes),
        project=u32(node.project for node in nodes),
        attr_flags=u32(node.flags for node in nodes),
        file_digest=_digests(digests),
        payload_start=starts(map(len, payloads)),
        payload=joined(payloads),
        need_start=starts(map(len, needs)),
        need=u32(piece for needed in needs for piece in needed),
        extent_start=starts(map(len, extents)),
        extent_logical=u64(e[0] for e in flat_extents),
        extent_physical=u64(e[1] for e in flat_extents),
        extent_blocks=u64(e[2] for e in flat_extents),
        extent_flags=u32(e[3] for e in flat_extents),
        name_start=starts(map(len, names)),
        name_side=u8(n[0] for n in flat_names),
        name_parent=u64(n[1] for n in flat_names),
        name_path_start=starts(len(n[2]) for n in flat_names),
        paths=joined([n[2] for n in flat_names]),
        xattr_start=starts(map(len, xattrs)),
        xattr_name_start=starts(len(x[0]) for x in flat_xattrs),
        xattr_names=joined([x[0] for x in flat_xattrs]),
        xattr_value_start=starts(len(x[1]) for x in flat_xattrs),
        xattr_values=joined([x[1] for x in flat_xattrs]),
    )
    return Dmi.decode(b"".join(dmi.encode()))


def _digests(values: Iterable[bytes]) -> Any:
    return np.frombuffer(b"".join(values), dtype="V16")
