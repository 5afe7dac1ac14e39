"""Filesystems of volumes: made, judged, mounted, unmounted, and made again like another.

A generation is mounted only from a device that is read-only for the kernel, with options under which neither log nor orphans are touched
(ext4 `ro,noload`; XFS `ro,norecovery`), and `nouuid` because the same XFS is mounted beside it (xfs(5)).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.contract.errors import CommandFailed, DeviceBusy, DeviceFailed, KernelLacks, LayoutUnsupported
from agent.contract.identity import BLOCK_BYTES, FilesystemKind
from agent.system import block
from agent.system.clock import wait_until
from agent.system.run import run
from agent.volume.freeze import thaw_if_frozen
from agent.volume.mounts import mount_on, mounts
from agent.volume.superblock import (
    Compat,
    Ext4State,
    Ext4Superblock,
    Incompat,
    RoCompat,
    XfsIncompat,
    XfsRoCompat,
    XfsSuperblock,
    kind_of,
    read_ext4,
    read_xfs,
)

_MAKE_LIMIT_S: Final = 600.0
_MOUNT_LIMIT_S: Final = 300.0
_GRACE_S: Final = 2.0
_PROTECTED: Final = "nosuid,nodev,noexec"
_OPTIONS: Final = {
    (FilesystemKind.EXT4, True): f"ro,noload,{_PROTECTED}",
    (FilesystemKind.XFS, True): f"ro,norecovery,nouuid,{_PROTECTED}",
    (FilesystemKind.EXT4, False): "rw,nosuid,nodev",
    (FilesystemKind.XFS, False): "rw,nouuid,nosuid,nodev",
}
_EXT4_RUNTIME: Final = frozenset({"needs_recovery", "orphan_present", "dir_prealloc"})  # states, not layout
_VALUE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_=,.^-]*")
_ELSEWHERE: Final = re.compile(r"(dev|device|name|file)=")  # would make the filesystem, its log or its journal somewhere else
_LABEL: Final = re.compile(r"[ -~]{1,16}")
_ALLOWED: Final = {
    FilesystemKind.EXT4: frozenset({"-q", "-F", "-b", "-I", "-N", "-G", "-O", "-U", "-J"}),
    FilesystemKind.XFS: frozenset({"-q", "-f", "-K", "-b", "-s", "-m", "-d", "-i", "-n", "-l"}),
}
_FLAGS: Final = frozenset({"-q", "-F", "-f", "-K"})
_TAKEN: Final = {
    FilesystemKind.EXT4: _ALLOWED[FilesystemKind.EXT4] | {"-E", "-L", "-T", "-i", "-m"},
    FilesystemKind.XFS: _ALLOWED[FilesystemKind.XFS] | {"-L"},
}

thaw = thaw_if_frozen


def make(device: Path, kind: FilesystemKind, options: tuple[str, ...] = ()) -> None:
    """Make an empty filesystem with blocks of 4096 bytes; ``options`` are mkfs's own. ``refuse_unsupported`` judges the result.

    LayoutUnsupported, before anything runs, for words that reach beyond the volume: another device, another file, another program's work.
    """
    for word in _beyond(kind, options):
        raise LayoutUnsupported(
            f"mkfs option {word!r} is not for a volume, whose data, log and journal all lie on its own device",
            fix=f"Leave it out; taken are {' '.join(sorted(_TAKEN[kind]))} with a value that names no device and no file.",
        )
    blocks = () if "-b" in options else _BLOCKS[kind]
    run([*_program(kind), *blocks, *options, str(device)], timeout_s=_MAKE_LIMIT_S)


def make_like(device: Path, kind: FilesystemKind, arguments: tuple[str, ...]) -> None:
    """Make an empty filesystem from another's ``mkfs_arguments``, which may have come over the wire.

    LayoutUnsupported for any word that ``mkfs_arguments`` would not say: what runs is that program with options of layout alone.
    """
    _refuse_words(kind, arguments)
    run([*arguments, str(device)], timeout_s=_MAKE_LIMIT_S)


def mkfs_arguments(device: Path, kind: FilesystemKind) -> tuple[str, ...]:
    """Return the command that makes an empty filesystem of the same kind, UUID, label and features; the device is to be appended."""
    words = _ext4_arguments(read_ext4(device)) if kind is FilesystemKind.EXT4 else _xfs_arguments(read_xfs(device))
    return (*_program(kind), *words)


def refuse_unsupported(device: Path, kind: FilesystemKind) -> None:
    """Raise LayoutUnsupported, with every reason, unless ``device`` holds a filesystem of ``kind`` that Landfall replicates."""
    found = kind_of(device)
    if found is not kind:
        raise LayoutUnsupported(f"{device} holds {found or 'no ext4 or XFS'}, not {kind}")
    reasons = list(_ext4_refusals(read_ext4(device)) if kind is FilesystemKind.EXT4 else _xfs_refusals(read_xfs(device)))
    if reasons:
        raise LayoutUnsupported(f"the {kind} on {device} cannot be replicated", cause="; ".join(reasons))


def mount(device: Path, mount_point: Path, kind: FilesystemKind, *, read_only: bool) -> None:
    """Mount a volume: read-only for a generation, whose device must be read-only too; DeviceBusy if something is mounted there.

    Made within the context that attached the device, the mount keeps the device alive after the context has ended.
    """
    if is_mounted(mount_point):
        raise DeviceBusy(f"something is mounted on {mount_point} already")
    found = kind_of(device)
    if found is not kind:
        raise LayoutUnsupported(f"{device} holds {found or 'no ext4 or XFS'}, not {kind}")
    if read_only and not _is_read_only(device):
        raise DeviceFailed(f"{device} is writable", cause="even a read-only mount writes to it", fix="Attach it read-only.")
    run(["mount", "-n", "-t", str(kind), "-o", _OPTIONS[kind, read_only], str(device), str(mount_point)], timeout_s=_MOUNT_LIMIT_S)


def grow(device: Path, mount_point: Path, kind: FilesystemKind) -> None:
    """Let a mounted filesystem use all of its device; nothing happens where it does (resize2fs(8), xfs_growfs(8)).

    KernelLacks where this process may not grow a mounted ext4 (it needs CAP_SYS_RESOURCE, which containers often lack).
    """
    if kind is FilesystemKind.XFS:
        run(["xfs_growfs", "-d", str(mount_point)], timeout_s=_MOUNT_LIMIT_S)
        return
    output = run(["resize2fs", str(device)], ok=(0, 1), timeout_s=_MOUNT_LIMIT_S)
    if output.status:
        words = output.stderr.decode("utf-8", "replace").strip()
        if "Permission denied" in words:
            raise KernelLacks(
                "a mounted ext4 may not be grown here",
                cause=words,
                fix="`landfall unserve`, `landfall volume grow` again, `landfall serve`.",
            )
        raise CommandFailed(f"resize2fs {device} ended with status {output.status}", cause=words)


def grow_ext4(device: Path) -> None:
    """Let an ext4 that is not mounted, and was unmounted cleanly, use all of its device; it is checked first, as resize2fs(8) wants."""
    run(["e2fsck", "-f", "-p", str(device)], ok=(0, 1), timeout_s=_MOUNT_LIMIT_S)
    run(["resize2fs", str(device)], timeout_s=_MOUNT_LIMIT_S)


def refuse_unclean(device: Path, kind: FilesystemKind) -> None:
    """Raise LayoutUnsupported unless a filesystem was unmounted cleanly, has no errors, and lies whole on its device."""
    reasons = list(_ext4_unclean(read_ext4(device)) if kind is FilesystemKind.EXT4 else _xfs_unclean(device))
    blocks = (read_ext4(device) if kind is FilesystemKind.EXT4 else read_xfs(device)).blocks
    device_fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size_bytes = os.lseek(device_fd, 0, os.SEEK_END)
    finally:
        os.close(device_fd)
    if blocks * BLOCK_BYTES > size_bytes:
        reasons.append(f"it has {blocks} blocks, and there is room for {size_bytes // BLOCK_BYTES}")
    if reasons:
        check = "`e2fsck -f`" if kind is FilesystemKind.EXT4 else "`xfs_repair`"
        raise LayoutUnsupported(
            f"the {kind} on {device} was not left in order",
            cause="; ".join(reasons),
            fix=f"Mount it once and unmount it, which replays its journal; if that does not help, {check}.",
        )


def remount(mount_point: Path, *, read_only: bool) -> None:
    """Make a mounted volume writable, or read-only and written back; DeviceBusy if a process has a file open for writing there."""
    option = f"remount,{'ro' if read_only else 'rw'}"
    output = run(["mount", "-n", "-o", option, str(mount_point)], ok=(0, 32), timeout_s=_MOUNT_LIMIT_S)
    if output.status:
        words = output.stderr.decode("utf-8", "replace").strip()
        raise DeviceBusy(f"{mount_point} is in use", cause=words, fix="Find who has files open there (lsof, fuser -m).")


def unmount(mount_point: Path) -> None:
    """Unmount; on return everything is written back. DeviceBusy if a process uses it, after waiting for one that is just leaving."""
    words = ""

    def done() -> bool:
        nonlocal words
        output = run(["umount", "-n", str(mount_point)], ok=(0, 32), timeout_s=_MOUNT_LIMIT_S)
        words = output.stderr.decode("utf-8", "replace").strip() if output.status else ""
        return "busy" not in words

    if not wait_until(done, _GRACE_S, every_s=0.1):
        raise DeviceBusy(f"{mount_point} is in use", cause=words, fix="Find who has files open there (lsof, fuser -m).")
    if words:
        raise CommandFailed(f"cannot unmount {mount_point}", cause=words)


def unmount_below(folder: Path) -> None:
    """Unmount everything that is mounted below ``folder``, the last mounted first."""
    real = folder.resolve()
    for mounted in reversed(mounts()):
        if real in mounted.mount_point.parents:
            unmount(mounted.mount_point)


def is_mounted(mount_point: Path) -> bool:
    """Whether something is mounted on exactly this folder."""
    return mount_on(mount_point) is not None


def is_writable(mount_point: Path) -> bool:
    """Whether something is mounted on exactly this folder and takes writes."""
    there = mount_on(mount_point)
    return there is not None and "rw" in there.options & there.super_options


def device_of(mount_point: Path) -> Path | None:
    """Return the device mounted on exactly this folder, None if there is none."""
    there = mount_on(mount_point)
    return Path(there.source) if there else None


# --- what is refused ---


def _ext4_refusals(found: Ext4Superblock) -> Iterator[str]:
    if found.block_bytes != BLOCK_BYTES:
        yield f"blocks of {found.block_bytes} bytes"
    if Incompat.EXTENT not in found.incompat:
        yield "no extents"
    if found.external_journal:
        yield "an external journal"
    refused = (
        (found.incompat, (Incompat.ENCRYPT, Incompat.CASEFOLD, Incompat.META_BG)),
        (found.ro_compat, (RoCompat.BIGALLOC, RoCompat.VERITY, RoCompat.SHARED_BLOCKS, RoCompat.READ_ONLY)),
    )
    for features, names in refused:
        yield from (f"the feature {name.name.lower()}" for name in names if name in features and name.name)
    if found.unknown:
        yield f"features this release does not know ({found.unknown:#x})"


def _xfs_refusals(found: XfsSuperblock) -> Iterator[str]:
    if found.version != 5:
        yield f"on-disk version {found.version} (no checksums)"
    if found.block_bytes != BLOCK_BYTES:
        yield f"blocks of {found.block_bytes} bytes"
    if found.sector_bytes not in {512, BLOCK_BYTES}:
        yield f"sectors of {found.sector_bytes} bytes"
    if found.log_start == 0:
        yield "an external log"
    if found.realtime_blocks:
        yield "a realtime section"
    if found.ascii_case_folding:
        yield "names without case"
    if XfsIncompat.NEEDS_REPAIR in found.incompat:
        yield "it needs xfs_repair"
    if found.unknown:
        yield f"features this release does not know ({found.unknown:#x})"


def _ext4_unclean(found: Ext4Superblock) -> Iterator[str]:
    if Incompat.NEEDS_RECOVERY in found.incompat:
        yield "its journal is to be replayed"
    if Ext4State.CLEAN not in found.state:
        yield "it was not unmounted"
    if found.state & (Ext4State.ERRORS | Ext4State.ORPHANS) or RoCompat.ORPHAN_PRESENT in found.ro_compat:
        yield "it has errors or orphans"


def _xfs_unclean(device: Path) -> Iterator[str]:
    """xfs_logprint(8), -t: the log's head and tail, and what that makes of its state."""
    if "<CLEAN>" not in run(["xfs_logprint", "-t", str(device)], ok=range(256), timeout_s=_MOUNT_LIMIT_S).text:
        yield "its log is to be replayed"


# --- how it was made ---


def _program(kind: FilesystemKind) -> tuple[str, ...]:
    return ("mkfs.ext4", "-q", "-F") if kind is FilesystemKind.EXT4 else ("mkfs.xfs", "-q", "-f")


_BLOCKS: Final = {FilesystemKind.EXT4: ("-b", str(BLOCK_BYTES)), FilesystemKind.XFS: ("-b", f"size={BLOCK_BYTES}")}


def _ext4_arguments(found: Ext4Superblock) -> list[str]:
    """mke2fs(8). `-O none` first, so that mke2fs.conf of the machine that runs it adds nothing."""
    names = [
        "64bit" if flag is Incompat.BITS64 else (flag.name or "").lower()
        for flags in (found.compat, found.incompat, found.ro_compat)
        for flag in type(flags)
        if flag in flags
    ]
    features = [name for name in names if name not in _EXT4_RUNTIME]
    words = ["-b", str(found.block_bytes), "-I", str(found.inode_bytes), "-N", str(found.inodes), "-U", str(found.uuid)]
    words += ["-O", ",".join(["none", *features])]
    if Incompat.FLEX_BG in found.incompat:
        words += ["-G", str(found.flex_groups)]
    if Compat.HAS_JOURNAL in found.compat and found.journal_bytes:
        words += ["-J", f"size={found.journal_bytes >> 20}"]
    return words + _label(found.label)


def _xfs_arguments(found: XfsSuperblock) -> list[str]:
    """mkfs.xfs(8); sunit and swidth of data in units of 512 bytes."""

    def on(flag: XfsIncompat | XfsRoCompat) -> int:
        return int(flag in (found.incompat if isinstance(flag, XfsIncompat) else found.ro_compat))

    meta = f"crc=1,finobt={on(XfsRoCompat.FINOBT)},rmapbt={on(XfsRoCompat.RMAPBT)},reflink={on(XfsRoCompat.REFLINK)}"
    meta += f",bigtime={on(XfsIncompat.BIGTIME)},inobtcount={on(XfsRoCompat.INOBTCOUNT)},uuid={found.uuid}"
    inode = f"size={found.inode_bytes},maxpct={found.inode_percent},sparse={on(XfsIncompat.SPARSE_INODES)}"
    if XfsIncompat.NREXT64 in found.incompat:
        inode += ",nrext64=1"  # an older mkfs does not know the word
    naming = f"size={found.directory_block_bytes},version=2,ftype=1"
    if XfsIncompat.PARENT in found.incompat:
        naming += ",parent=1"
    data = f"agcount={found.allocation_groups}"
    if found.stripe_unit:
        data += f",sunit={found.stripe_unit * 8},swidth={found.stripe_width * 8}"
    else:
        data += ",noalign"
    log = f"internal=1,size={found.log_blocks}b,version=2,lazy-count=1"
    if found.log_stripe_bytes > 1:
        log += f",sunit={found.log_stripe_bytes // 512}"
    words = ["-b", f"size={found.block_bytes}", "-s", f"size={found.sector_bytes}", "-m", meta, "-d", data]
    return [*words, "-i", inode, "-n", naming, "-l", log, *_label(found.label)]


def _label(label: str) -> list[str]:
    """A label that is not plain ASCII is left out: it is no property of the files."""
    return ["-L", label] if _LABEL.fullmatch(label) and not label.startswith("-") else []


def _refuse_words(kind: FilesystemKind, arguments: tuple[str, ...]) -> None:
    program, words = arguments[:1], list(arguments[1:])
    refused = program != _program(kind)[:1]
    while words and not refused:
        option = words.pop(0)
        if option in _FLAGS & _ALLOWED[kind]:
            continue
        value = words.pop(0) if words else ""
        if option == "-L":
            refused = not _LABEL.fullmatch(value) or value.startswith("-")
        else:
            refused = option not in _ALLOWED[kind] or not _VALUE.fullmatch(value) or _ELSEWHERE.search(value) is not None
    if refused:
        raise LayoutUnsupported(f"these words do not make a {kind}", cause=" ".join(arguments)[:400])


def _beyond(kind: FilesystemKind, options: tuple[str, ...]) -> Iterator[str]:
    """Yield what an operator may not hand on to mkfs, in the order of the words."""
    words = list(options)
    while words:
        option = words.pop(0)
        if option not in _TAKEN[kind]:
            yield option
        elif option not in _FLAGS:
            value = words.pop(0) if words else ""
            if not value or value.startswith("-") or "/" in value or _ELSEWHERE.search(value) or "offset=" in value:
                yield f"{option} {value}".rstrip()


def _is_read_only(device: Path) -> bool:
    device_fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return block.is_read_only(device_fd)
    finally:
        os.close(device_fd)
