"""A NAS node's volume group on a disk of its own, and what device-mapper has made of that disk.

Device-mapper and LVM are the machine's, not a namespace's: every node sees every device. So each node's LVM is told to look at its own
disk alone (`settings`), its group has a name that no other lab's has, carries the marker, and is never activated by the machine itself.
When a node dies its devices stay: they are found from the disk upwards, by what the kernel says holds what, and need no LVM to go.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.contract.errors import KernelLacks, LabMissing, NotOurs, ProgramMissing
from agent.system.clock import wait_until
from agent.system.run import run
from mgmt.lab import loops, processes
from mgmt.lab.layout import MARKER, Lab, LabSubstrate, NodeName

SETTINGS = Path("/etc/lvm/lvm.conf")
_DEVICE_MAPPER = Path("/sys/class/misc/device-mapper")
_PROGRAMS = {"lvm": "lvm2", "dmsetup": "lvm2", "thin_delta": "thin-provisioning-tools"}
_MODULES = {LabSubstrate.LVM_THIN: ("dm-thin-pool",), LabSubstrate.LVM_SNAPSHOT: ("dm-snapshot", "dm-zero")}
_UDEV = Path("/run/udev/control")


@dataclass(frozen=True, slots=True)
class Mapping:
    """A device-mapper device: its name, and its node's path."""

    name: str
    path: str


def settings(disk: str) -> str:
    """Return LVM's configuration on a node whose only disk is ``disk``; no udev runs in a node, so LVM makes the device nodes."""
    return f"""\
devices {{
 use_devicesfile=0
 obtain_device_list_from_udev=0
 external_device_info_source="none"
 global_filter=[ "a|^{disk}$|", "r|.*|" ]
}}
activation {{
 udev_sync=0
 udev_rules=0
 monitoring=0
}}
backup {{
 backup=0
 archive=0
}}
"""


def require(substrate: LabSubstrate) -> None:
    """KernelLacks where the kernel has not what the substrate is made of, ProgramMissing without its programs."""
    if substrate is LabSubstrate.REFLINK:
        return
    if missing := sorted({package for program, package in _PROGRAMS.items() if not shutil.which(program)}):
        raise ProgramMissing(f"the substrate {substrate} needs {' and '.join(missing)}", fix=f"apt-get install {' '.join(missing)}")
    if shutil.which("modprobe"):
        run(["modprobe", "--quiet", "--all", *_MODULES[substrate]], ok=range(256))
    if not _DEVICE_MAPPER.exists():
        modules = " and ".join(_MODULES[substrate])
        raise KernelLacks(
            f"this kernel has no device-mapper, of which the substrate {substrate} is made",
            fix=f"Load {modules}, use --substrate reflink, or run it in a guest: python -m tests.guest run -- landfall ...",
        )


def refuse_taken(lab: Lab, node: NodeName) -> None:
    """NotOurs if the machine has a volume group of the name that the node's is to have: nothing of it is touched."""
    name = lab.volume_group(node)
    report = json.loads(run(["vgs", "--reportformat", "json", "-o", "vg_name", "--select", f"vg_name={name}"]).text)
    if report["report"][0]["vg"] or any(mapping.name.startswith(name.replace("-", "--") + "-") for mapping in _all()):
        raise NotOurs(f"this machine has a volume group {name} already", fix="Rename it, or take another --dir.")


def make(lab: Lab, node: NodeName, size_bytes: int) -> None:
    """Make a node's disk, a sparse file, and the volume group on it. If we die here, `down` lets go of the file and removes it."""
    image = lab.disk_image(node)
    run(["truncate", "--size", str(size_bytes), str(image)])
    with attached(image) as disk:
        tag = ["--addtag", MARKER, "--setautoactivation", "n"]
        run(["vgcreate", "--config", settings(disk), "--yes", *tag, lab.volume_group(node), disk])


@contextmanager
def attached(image: Path) -> Iterator[str]:
    """Yield a loop device on a disk, with direct I/O; it goes with its last user."""
    disk = run(["losetup", "--find", "--show", "--direct-io=on", str(image)]).text.strip()
    try:
        holder = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        # Detaching a device that is in use makes the kernel detach it with its last user.
        run(["losetup", "--detach", disk])
    try:
        yield disk
    finally:
        os.close(holder)


@contextmanager
def activating(lab: Lab, node: NodeName) -> Iterator[Callable[[str], Path]]:
    """Yield what gives the read-only device of the logical volume of a node that carries a tag beginning so; LabMissing unless it is one.

    A living node's LVM does it, since its lock is in there; a dead one's disk is attached for as long as the context lasts.
    """
    group = lab.volume_group(node)
    with ExitStack() as stack:
        if (pid := processes.first_process(lab, node)) is not None:
            inside = ["nsenter", "--target", str(pid), "--root", "--mount", "--pid", "--ipc", "--"]
            config: list[str] = []
        else:
            stack.callback(release, lab, [node])
            inside, config = [], ["--config", settings(stack.enter_context(attached(lab.disk_image(node))))]

        def activate(tag: str) -> Path:
            listed = run([*inside, "lvs", *config, "-a", "--reportformat", "json", "-o", "lv_name,lv_tags,lv_active", group]).text
            found = [row for row in json.loads(listed)["report"][0]["lv"] if tag in f",{row['lv_tags']}"]
            if len(found) != 1:
                raise LabMissing(f"{len(found)} logical volumes of {node} carry a tag {tag}...")
            name = f"{group}/{found[0]['lv_name'].strip('[]')}"
            if found[0]["lv_active"] != "active":  # a classic snapshot comes and goes with its origin: that is what LVM wants a yes to
                run([*inside, "lvchange", *config, "--yes", "--activate", "y", "--ignoreactivationskip", name])
                stack.callback(run, [*inside, "lvchange", *config, "--yes", "--activate", "n", name])
            return Path("/dev") / name

        yield activate


def mappings(image: Path) -> list[Mapping]:
    """Return the device-mapper devices above a disk, each before those it stands on."""
    found: list[Mapping] = []

    def climb(device: str) -> None:
        for holder in Path("/sys/class/block", device, "holders").glob("dm-*"):
            climb(holder.name)
            with contextlib.suppress(OSError):  # it has gone meanwhile
                found.append(_mapping(holder.name))

    for loop in loops.backed_by(image):
        climb(Path(loop.path).name)
    return list(dict.fromkeys(found))


def release(lab: Lab, nodes: Iterable[NodeName], limit_s: float = 20.0) -> None:
    """Guarantee that no device-mapper device stands on these nodes' disks; their processes must have gone."""
    pending = list(nodes)

    def left() -> list[Mapping]:
        return [mapping for node in pending for mapping in mappings(lab.disk_image(node))]

    def pushed() -> bool:
        for mapping in (stuck := left()):
            thaw(mapping)
            done = run(["dmsetup", *_without_udev(), "remove", mapping.name], ok=(0, 1))
            if done.status == 0 and not _UDEV.exists():
                Path("/dev/mapper", mapping.name).unlink(missing_ok=True)
        return not stuck

    if not wait_until(pushed, limit_s):
        raise LabMissing(f"devices stay in use: {', '.join(mapping.name for mapping in left())}")
    for node in pending:
        _forget_nodes(Path("/dev", lab.volume_group(node)))


def thaw(mapping: Mapping) -> None:
    """Let a device go on that whoever died has left suspended, and the filesystem on it that is frozen."""
    with contextlib.suppress(OSError):
        if Path("/sys/class/block", Path(mapping.path).name, "dm/suspended").read_text().strip() == "1":
            run(["dmsetup", *_without_udev(), "resume", mapping.name], ok=(0, 1))
    loops.thaw(mapping.path)


def _forget_nodes(folder: Path) -> None:
    """Remove the links that LVM made where no udevd does; they would outlive what they lead to."""
    if folder.is_dir():
        for entry in folder.iterdir():
            entry.unlink()
        folder.rmdir()


def _all() -> list[Mapping]:
    return [_mapping(folder.name) for folder in Path("/sys/class/block").glob("dm-*")]


def _mapping(device: str) -> Mapping:
    return Mapping(Path("/sys/class/block", device, "dm/name").read_text().strip(), f"/dev/{device}")


def _without_udev() -> list[str]:
    return [] if _UDEV.exists() else ["--noudevsync", "--noudevrules"]
