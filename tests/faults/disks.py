"""A node's disk in which faults can be placed: a file, a loop device, and a device-mapper device on it whose table the test changes.

    image file -> loop device -> NAME (the faults) -> NAME-state (ext4: the agent's state) and NAME-group (the volume group)

Only dmsetup, LVM's own programs and plain reads are used here, nothing of the agent.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agent.contract.identity import GenerationId
from agent.system.clock import wait_until
from mgmt.lab.groups import settings

UDEV = Path("/run/udev/control")
SECTOR = 512
STATE_SECTORS = (64 << 20) // SECTOR
DISK_BYTES = 512 << 20
UNUSED_SECTORS = 8
CHUNK_SECTORS = 128  # of a thin pool
GROUP_AT = STATE_SECTORS * SECTOR


def command(*argv: str | Path) -> str:
    """Run a program; its own words are the failure's message."""
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0, f"{' '.join(map(str, argv))}: {done.stderr.strip()}"
    return done.stdout


def dmsetup(*argv: str) -> str:
    """Run dmsetup, which waits for no udevd where none is."""
    return command("dmsetup", *([] if UDEV.exists() else ["--noudevsync", "--noudevrules"]), *argv)


def create(name: str, table: str) -> None:
    """Make a device /dev/mapper/NAME."""
    dmsetup("create", name, "--table", table)
    node = Path("/dev/mapper", name)
    if not node.exists():
        node.symlink_to(Path("/dev", dmsetup("info", "--columns", "--noheadings", "-o", "blkdevname", name).strip()))


def remove(name: str) -> None:
    """Remove a device."""
    dmsetup("remove", name)
    if not UDEV.exists():
        Path("/dev/mapper", name).unlink(missing_ok=True)


@dataclass
class Disk:
    """One node's disk, state and volume group; ``folder`` is where its state gets mounted and LVM's settings lie."""

    image: Path
    name: str
    group: str
    folder: Path
    loop: str = field(default="")

    @property
    def sectors(self) -> int:
        return self.image.stat().st_size // SECTOR

    @property
    def state(self) -> Path:
        """Where the node's state is mounted."""
        return self.folder / "node"

    @property
    def settings(self) -> Path:
        """The folder of LVM's settings that see this disk alone: for LVM_SYSTEM_DIR."""
        return self.folder / "lvm"

    # --- the stack ---

    def make(self) -> None:
        """Make a fresh disk, with the group and the filesystem on it."""
        with open(self.image, "wb") as file:
            file.truncate(DISK_BYTES)
        self.attach(mounted=False)
        self.lvm("vgcreate", "--addtag", "landfall-lab", self.group, f"/dev/mapper/{self.name}-group")
        command("mkfs.ext4", "-q", f"/dev/mapper/{self.name}-state")
        command("mount", f"/dev/mapper/{self.name}-state", self.state)

    def attach(self, *, mounted: bool = True) -> None:
        """Bring the disk up, as at a boot."""
        self.loop = command("losetup", "--find", "--show", "--direct-io=on", self.image).strip()
        self._create(self.name, f"0 {self.sectors} {self.linear}")
        self.stack()
        self.settings.mkdir(parents=True, exist_ok=True)
        self.state.mkdir(exist_ok=True)
        (self.settings / "lvm.conf").write_text(settings(f"/dev/mapper/{self.name}-group"))
        if mounted:
            command("mount", f"/dev/mapper/{self.name}-state", self.state)

    def stack(self) -> None:
        """Put state and group onto the device with the faults."""
        self._create(f"{self.name}-state", f"0 {STATE_SECTORS} linear /dev/mapper/{self.name} 0")
        self._create(f"{self.name}-group", f"0 {self.sectors - STATE_SECTORS} linear /dev/mapper/{self.name} {STATE_SECTORS}")

    def log_group(self, log: str) -> None:
        """Let every write to the volume group, and no other, be logged to a device from now on; nothing of the group is active."""
        length = self.sectors - STATE_SECTORS
        self._create(f"{self.name}-under", f"0 {length} linear /dev/mapper/{self.name} {STATE_SECTORS}")
        self._reload(f"{self.name}-group", f"0 {length} log-writes /dev/mapper/{self.name}-under {log}")

    def detach(self) -> None:
        """Take it all down, whatever of the agent's is still mounted or mapped on it; its processes must have gone."""
        if not self.loop:
            return
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if line.split()[1].startswith(f"{self.folder}/"):
                subprocess.run(["umount", line.split()[1]], check=False)
        device = Path(os.path.realpath(f"/dev/mapper/{self.name}")).name
        assert wait_until(lambda: not self._removed(device), 20.0), f"devices stay: {self._removed(device)}"
        command("losetup", "--detach", self.loop)
        self.loop = ""
        for link in Path("/dev", self.group).glob("*"):
            link.unlink()

    def _removed(self, device: str) -> list[str]:
        left = []
        for holder in Path("/sys/class/block", device, "holders").glob("dm-*"):
            left += self._removed(holder.name)
        number = Path("/sys/class/block", device, "dm/name")
        if number.exists():
            name = number.read_text().strip()
            try:
                dmsetup("resume", name)
                remove(name)
            except AssertionError:
                left.append(name)
        return left

    def _create(self, name: str, table: str) -> None:
        create(name, table)

    # --- faults ---

    @property
    def linear(self) -> str:
        return f"linear {self.loop} 0"

    def put(self, table: str) -> None:
        """Let the device have another table from now on; what is under way may fail by it."""
        self._reload(self.name, table)

    def _reload(self, name: str, table: str) -> None:
        dmsetup("suspend", "--noflush", "--nolockfs", name)
        dmsetup("reload", name, "--table", table)
        dmsetup("resume", name)

    def heal(self) -> None:
        """Let the disk be sound again."""
        self.put(f"0 {self.sectors} {self.linear}")

    def fail_flushes(self) -> None:
        """Let every flush of the volume group fail from now on; its writes and reads, and the state, go on."""
        length = self.sectors - STATE_SECTORS
        end = length - UNUSED_SECTORS  # LVM has given out only whole extents before it
        below = f"/dev/mapper/{self.name}"
        sound = f"0 {end} linear {below} {STATE_SECTORS}"
        self._reload(f"{self.name}-group", f"{sound}\n{end} {UNUSED_SECTORS} flakey {below} {STATE_SECTORS + end} 0 3600 1 error_writes")

    def heal_flushes(self) -> None:
        """Let the volume group's flushes be sound again."""
        self._reload(f"{self.name}-group", f"0 {self.sectors - STATE_SECTORS} linear /dev/mapper/{self.name} {STATE_SECTORS}")

    def in_pool_data(self, target: str) -> str:
        """Return a table that is sound but for the pool's data; {disk} in ``target`` is the loop device and the first sector on it."""
        return self.with_parts([self.pool_data()], target)

    def pool_data(self) -> tuple[int, int]:
        """Return first sector and length of the thin pool's data on this disk, as the kernel maps it."""
        names = dmsetup("ls").split()
        mapped = next(name for name in names if name.endswith("_tdata") and name.startswith(self._mapped("")))
        (row,) = dmsetup("table", mapped).strip().splitlines()
        begin, length, kind, _, start = row.split()
        assert (begin, kind) == ("0", "linear")
        return int(start) + STATE_SECTORS, int(length)

    def landing_room(self) -> list[tuple[int, int]]:
        """Return first sector and length, on this disk, of each run from which the landing volume gets what is written to it next."""
        names = dmsetup("ls").split()
        if any(name.startswith(self._mapped("")) and name.endswith("_tdata") for name in names):
            start, length = self.pool_data()
            at, free = 0, []
            for first, chunks in [*self._chunks_given_out(), (length // CHUNK_SECTORS, 0)]:
                if first > at:
                    free.append((start + at * CHUNK_SECTORS, (first - at) * CHUNK_SECTORS))
                at = max(at, first + chunks)
            return free
        snapshot = self._mapped(self.named("landfall/workspace/1/"))
        (row,) = dmsetup("table", f"{snapshot}-cow").strip().splitlines()
        start, length = int(row.split()[4]) + STATE_SECTORS, int(row.split()[1])
        used = int(dmsetup("status", snapshot).split()[3].partition("/")[0])
        return [(start + used, length - used)]

    def landing_stands(self) -> bool:
        """Whether the kernel has not given up the landing volume; a thin one it never does."""
        snapshot = self._mapped(self.named("landfall/workspace/1/"))
        status = [line for line in dmsetup("status").splitlines() if line.startswith(f"{snapshot}: ")]
        return not any("Invalid" in line or "Overflow" in line for line in status)

    def with_parts(self, parts: list[tuple[int, int]], target: str) -> str:
        """Return a table that is sound but for some parts; {disk} in ``target`` is the loop device and the first sector on it."""
        lines, at = [], 0
        for first, length in parts:
            if first > at:
                lines.append(f"{at} {first - at} linear {self.loop} {at}")
            lines.append(f"{first} {length} {target.format(disk=f'{self.loop} {first}')}")
            at = first + length
        return "\n".join([*lines, f"{at} {self.sectors - at} linear {self.loop} {at}"])

    def _mapped(self, volume: str) -> str:
        """Return what device-mapper calls a logical volume."""
        return f"{self.group.replace('-', '--')}-{volume.replace('-', '--')}"

    def _chunks_given_out(self) -> list[tuple[int, int]]:
        """Return first and count of each run of chunks that the pool has given out, ascending."""
        names = dmsetup("ls", "--target", "thin-pool").split()
        pool = next(name for name in names if name.startswith(self._mapped("")))
        dmsetup("message", pool, "0", "reserve_metadata_snap")
        try:
            dump = command("thin_dump", "-m", f"/dev/mapper/{pool.removesuffix('-tpool')}_tmeta")
        finally:
            dmsetup("message", pool, "0", "release_metadata_snap")
        runs = [(int(first), int(count)) for first, count in re.findall(r'data_begin="(\d+)" length="(\d+)"', dump)]
        return sorted([*runs, *((int(one), 1) for one in re.findall(r'data_block="(\d+)"', dump))])

    def places_of(self, content: bytes) -> list[int]:
        """Return at which sectors of the raw image these bytes lie."""
        found = []
        with open(self.image, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as raw:
            at = raw.find(content, STATE_SECTORS * SECTOR)
            while at >= 0:
                found.append(at // SECTOR)
                at = raw.find(content, at + SECTOR)
        return found

    # --- what is on it, by LVM's and the kernel's word ---

    def lvm(self, *argv: str | Path) -> str:
        done = subprocess.run(
            [*map(str, argv)], capture_output=True, text=True, check=False, env={**os.environ, "LVM_SYSTEM_DIR": str(self.settings)}
        )
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def tags(self) -> dict[str, str]:
        """Return the tags of every logical volume, by name."""
        rows = json.loads(self.lvm("lvs", "-a", "--reportformat", "json", "-o", "lv_name,lv_tags", self.group))["report"][0]["lv"]
        return {row["lv_name"].strip("[]"): row["lv_tags"] for row in rows}

    def workspaces(self) -> list[str]:
        """Return the tags of what is no generation, volume or pool."""
        return [tags for tags in self.tags().values() if "landfall/workspace/" in tags or "landfall/unfinished/" in tags]

    @contextmanager
    def device(self, tag: str, *, writable: bool = False) -> Iterator[Path]:
        """Yield the device of the one logical volume with a tag that begins so."""
        name = self.named(tag)
        volume = f"{self.group}/{name}"
        active = bool(self.lvm("lvs", "--noheadings", "-o", "lv_active", volume).strip())
        if writable:
            self.lvm("lvchange", "--permission", "rw", volume)
        if not active:
            self.lvm("lvchange", "--yes", "--activate", "y", "--ignoreactivationskip", volume)
        try:
            yield Path("/dev") / volume
        finally:
            if not active:
                self.lvm("lvchange", "--yes", "--activate", "n", volume)
            if writable:
                self.lvm("lvchange", "--permission", "r", volume)

    def merging(self) -> list[str]:
        """Return the names of the snapshots that LVM is merging; they are nothing any more."""
        fields = "lv_name,lv_merging,origin_uuid"
        rows = json.loads(self.lvm("lvs", "-a", "--reportformat", "json", "-o", fields, self.group))["report"][0]["lv"]
        return [row["lv_name"].strip("[]") for row in rows if row["lv_merging"] == "merging" and row["origin_uuid"]]

    def named(self, tag: str) -> str:
        """Return the name of the one logical volume with a tag that begins so; what an origin holds it holds only if no other does."""
        merging = self.merging()
        found = {name: tags for name, tags in self.tags().items() if tag in tags and name not in merging}
        (name,) = [name for name, tags in found.items() if len(found) == 1 or "landfall/origin/" not in tags]
        return name

    def digest(self, generation: GenerationId) -> str:
        """Return the SHA-256 of a whole generation."""
        with self.device(generation_tag(generation)) as device, open(device, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def content(self, tag: str) -> bytes:
        """Return all bytes of the logical volume with a tag that begins so."""
        with self.device(tag) as device:
            return device.read_bytes()


def generation_tag(generation: GenerationId) -> str:
    """Return how the tag begins that makes a logical volume this generation."""
    return f"landfall/generation/1/{generation.volume}/{generation.epoch}/{generation.counter}/{generation.nonce}/"
