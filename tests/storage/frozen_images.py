"""Filesystems in plain image files: changed through a real mount, copied under a freeze, and looked at as generations."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import HOLE, Dmi
from agent.contract.identity import FilesystemKind, GenerationId, empty_generation
from agent.differential.build import BuildRequest, build
from agent.differential.reader import View
from agent.volume.substrate import ChangedRuns

VOLUME = UUID("11111111-2222-4333-8444-555555555555")


def command(*argv: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(argv, input=stdin, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, (argv, done.stderr.decode(errors="replace"))
    return done.stdout


@contextlib.contextmanager
def loop(image: Path, *, read_only: bool) -> Iterator[Path]:
    device = command("losetup", "--find", "--show", *(["--read-only"] if read_only else []), str(image)).decode().strip()
    try:
        yield Path(device)
    finally:
        command("losetup", "--detach", device)


@contextlib.contextmanager
def mounted(image: Path, where: Path, options: str = "rw") -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    with loop(image, read_only="ro" in options.split(",")) as device:
        command("mount", "-o", options, str(device), str(where))
        try:
            yield device
        finally:
            command("umount", str(where))


def make_ext4(image: Path, size: int, *arguments: str) -> None:
    with open(image, "wb") as file:
        file.truncate(size)
    command("mkfs.ext4", "-q", "-F", "-b", "4096", *arguments, str(image))


def freeze_copy(mount_point: Path, image: Path, copy: Path) -> None:
    """Copy the image below a mounted filesystem while that is frozen."""
    command("fsfreeze", "--freeze", str(mount_point))
    try:
        command("cp", "--sparse=always", str(image), str(copy))
    finally:
        command("fsfreeze", "--unfreeze", str(mount_point))


@contextlib.contextmanager
def view(image: Path, where: Path, options: str = "ro") -> Iterator[View]:
    with mounted(image, where, options) as device:
        fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield View(device, where, fd)
        finally:
            os.close(fd)


def blocks_of(image: Path) -> NDArray[np.uint8]:
    return np.fromfile(image, dtype=np.uint8).reshape(-1, 4096)


def changed_blocks(base: Path | None, target: Path) -> NDArray[np.bool_]:
    """Which blocks of the target differ from the base's, byte by byte; from zeros without a base."""
    now = blocks_of(target)
    differs: NDArray[np.bool_] = np.any(now != (blocks_of(base) if base else np.uint8(0)), axis=1)
    return differs


def changed_runs(base: Path | None, target: Path) -> ChangedRuns:
    differs = np.concatenate([[False], changed_blocks(base, target), [False]])
    edges = np.flatnonzero(np.diff(differs.astype(np.int8)))
    first, end = edges[::2].astype(np.uint64), edges[1::2].astype(np.uint64)
    # The pre-images lie in the "differential volume" at another address, so that a mix-up shows.
    diff = first + np.uint64(1 << 20) if base else np.full(len(first), HOLE, np.uint64)
    return ChangedRuns(first, end - first, diff, np.zeros(len(first), bool))


@dataclass(frozen=True, slots=True)
class Built:
    """A DMI, read back from its bytes, and the images it is of."""

    dmi: Dmi
    base: Path | None
    target: Path


def generation(counter: int) -> GenerationId:
    return GenerationId(VOLUME, 1, counter, f"{counter:032x}") if counter else empty_generation(VOLUME)


def built(
    folder: Path, base: Path | None, target: Path, *, counter: int = 2, kind: FilesystemKind = FilesystemKind.EXT4, options: str = "ro"
) -> Built:
    """Return the DMI between two images; the state folder is ``folder``/state."""
    with contextlib.ExitStack() as stack:
        base_view = stack.enter_context(view(base, folder / "base-view", options)) if base else None
        target_view = stack.enter_context(view(target, folder / "target-view", options))
        request = BuildRequest(
            transfer=UUID(int=7),
            base_id=generation(counter - 1 if base else 0),
            target_id=generation(counter),
            base_taken_ns=1,
            target_taken_ns=2,
            volume_name="vol",
            volume_bytes=target.stat().st_size,
            sector_bytes=512,
            filesystem=kind,
            mkfs_arguments=("mkfs.ext4",),
            differential_volume="pool",
            base=base_view,
            target=target_view,
            changed=changed_runs(base, target),
            state=folder / "state",
        )
        dmi = build(request)
    return Built(Dmi.decode(b"".join(dmi.encode())), base, target)


def copied_tree(source: Path, destination: Path, files: int) -> None:
    """Copy at least ``files`` files of a real tree."""
    copied = 0
    for directory, _, names in os.walk(source):
        if copied >= files:
            return
        below = destination / Path(directory).relative_to(source)
        below.mkdir(parents=True, exist_ok=True)
        for name in names:
            if (Path(directory) / name).is_file():
                shutil.copy2(Path(directory) / name, below / name, follow_symlinks=False)
                copied += 1
