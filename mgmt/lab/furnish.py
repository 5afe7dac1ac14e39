"""Makes the namespaces of a new node into a machine of its own: its mounts, its /run, its pool.

Runs as the node's first process, before anything else is started. All of it lives in the node's mount namespace, so the end
of the node is the end of its mounts; the pool's loop device is told to detach itself with its last user.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from agent.contract.errors import CommandFailed, LabMissing
from agent.system.run import run
from mgmt.lab import groups
from mgmt.lab.layout import NODE_ROOT, Lab, Marker, NodeName, PoolFilesystem
from mgmt.lab.loops import POOL_DEVICE, backed_by, wait_until_released

SYSTEM_MOUNTS = ("/", "/usr", "/etc", "/var", "/opt", "/home", "/root", "/lib", "/bin", "/sbin")
SYSTEM_TREES = ("/proc", "/sys", "/dev", "/etc")
POOL_RELEASE_S = 20.0
NFS_STATE = Path("/var/lib/nfs")


def furnish(lab: Lab, node: NodeName, marker: Marker, held: ExitStack) -> None:
    """Give the node its name, its own /run and folder, and nothing of the other nodes; mount its pool, attach its disk.

    The disk stays attached for as long as ``held`` lives, and as anything stands on it.
    """
    socket.sethostname(node)
    os.chdir("/")
    code = [Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[2]]
    _detach_foreign_mounts([lab.directory, *code])
    run(["mount", "-t", "sysfs", "sysfs", "/sys"])
    run(["mount", "-t", "tmpfs", "-o", "mode=755,size=256m", "tmpfs", "/run"])
    NODE_ROOT.mkdir(parents=True)
    run(["mount", "--bind", str(lab.node(node)), str(NODE_ROOT)])
    _empty_tmp(code)
    if NFS_STATE.is_dir():
        _cover(NFS_STATE, "mode=755,size=1m")
    if lab.directory.exists():
        _cover(lab.directory, "mode=700,size=4k,ro")
    _bind_over(NODE_ROOT / "etc" / "hosts", Path("/etc/hosts"))
    _unlock_root()
    _plain_shell_for_root()
    image = NODE_ROOT / "pool.img"
    if image.exists():
        _mount_pool(image, NODE_ROOT / "pool", marker.pool_fs)
    disk = NODE_ROOT / "disk.img"
    if disk.exists():
        held.enter_context(_own_disk(disk))


def _detach_foreign_mounts(needed: Iterable[Path]) -> None:
    """Let go of what others have mounted: a copy of their mounts in here would keep their devices busy."""
    ancestors = {str(parent) for path in needed for parent in (path, *path.parents)}
    mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    points = [line.split(" ")[4].encode("latin-1", "backslashreplace").decode("unicode_escape") for line in mountinfo.splitlines()]
    for point in reversed(points):
        kept = point in SYSTEM_MOUNTS or point in ancestors
        if not kept and not any(Path(point).is_relative_to(tree) for tree in SYSTEM_TREES):
            run(["umount", "--lazy", point], ok=(0, 1, 32))


def _empty_tmp(code: Iterable[Path]) -> None:
    """Give the node a /tmp of its own, in which only our own code stays where it lies, if it lies there."""
    tmp = Path("/tmp")  # noqa: S108 - the folder itself is meant
    kept = [path for path in dict.fromkeys(code) if path.is_relative_to(tmp)]
    asides = [Path(f"/run/landfall/kept-{number}") for number in range(len(kept))]
    for path, aside in zip(kept, asides, strict=True):
        aside.mkdir()
        run(["mount", "--bind", str(path), str(aside)])
    _cover(tmp, "mode=1777,size=1g")
    for path, aside in zip(kept, asides, strict=True):
        path.mkdir(parents=True, exist_ok=True)
        run(["mount", "--bind", str(aside), str(path)])
        run(["umount", str(aside)])
        aside.rmdir()


def _cover(path: Path, options: str) -> None:
    run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)])


def _bind_over(source: Path, target: Path) -> None:
    if target.exists():
        run(["mount", "--bind", str(source), str(target)])


def _unlock_root() -> None:
    """Let sshd take a key for root where the account is locked (`!`, as on Ubuntu); in this node's view of /etc/shadow only."""
    shadow = Path("/etc/shadow")
    lines = shadow.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
    own = Path("/run/landfall/shadow")
    own.touch(mode=0o600)
    unlocked = ("root:*:" + line.split(":", 2)[2] if line.startswith("root:!") else line for line in lines)
    own.write_text("".join(unlocked), encoding="utf-8", errors="surrogateescape")
    _bind_over(own, shadow)


def _plain_shell_for_root() -> None:
    """Let sshd run root's commands by sh, in this node's view of /etc/passwd only.

    bash would read root's own start-up files at every connection. What stands there is the machine's: it takes its time, and where a
    node is killed in the middle of it, it may leave a lock behind for which everybody else then waits.
    """
    passwd, own = Path("/etc/passwd"), Path("/run/landfall/passwd")
    lines = passwd.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
    plain = (line.rpartition(":")[0] + ":/bin/sh\n" if line.startswith("root:") else line for line in lines)
    own.write_text("".join(plain), encoding="utf-8", errors="surrogateescape")
    own.chmod(0o644)
    _bind_over(own, passwd)


@contextmanager
def _own_disk(image: Path) -> Iterator[None]:
    """Attach the node's disk, and let LVM on this node see no other."""
    _refuse_in_use(image)
    with groups.attached(image) as disk:
        Path("/run/lock").mkdir(mode=0o1777, exist_ok=True)
        _cover(groups.SETTINGS.parent, "mode=755,size=1m")
        groups.SETTINGS.write_text(groups.settings(disk), encoding="ascii")
        yield


def _refuse_in_use(image: Path) -> None:
    """Wait for the old loop device of an image: two on one image would destroy it."""
    if not wait_until_released(image, POOL_RELEASE_S):
        raise LabMissing(
            f"the disk {image.name} is still in use by {', '.join(loop.path for loop in backed_by(image))}",
            fix="`landfall lab kill NODE`, then `landfall lab start NODE`.",
        )


def _mount_pool(image: Path, target: Path, filesystem: PoolFilesystem) -> None:
    """Mount the pool through a loop device with direct I/O."""
    _refuse_in_use(image)
    loop = run(["losetup", "--find", "--show", "--direct-io=on", str(image)]).text.strip()
    options = "nodatacow" if filesystem is PoolFilesystem.BTRFS else "defaults"
    try:
        run(["mount", "-t", filesystem, "-o", options, loop, str(target)])
    finally:
        # Detaching a device that is in use makes the kernel detach it with its last user; unmounted, it goes at once.
        run(["losetup", "--detach", loop])
    device = target.stat().st_dev
    (image.parent / POOL_DEVICE).write_text(f"{os.major(device)}:{os.minor(device)}", encoding="ascii")
    if filesystem is PoolFilesystem.BTRFS:
        try:
            run(["chattr", "+C", str(target)])
        except CommandFailed as error:
            raise LabMissing("the pool takes no files without data checksums (chattr +C)", cause=str(error)) from error
