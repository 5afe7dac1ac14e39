"""What people would use instead of Landfall's cycle, run for real between the same two nodes, on the same pools.

Every peer keeps a replica of its own on nas2's pool and brings it from the volume's last state to the present one, over the same link.
SSH is a server of the benchmark's own in nas2's namespaces, with keys made for this run. All of it runs inside the nodes, and goes with
them.

rsync        -aHAX --delete over SSH, from the mounted volume to a filesystem of the same kind; the filesystem is synced at the end
btrfs        a read-only snapshot, btrfs send -p | btrfs receive over SSH; the same content, changed in the same way, on btrfs in the pool
digests      all of both devices read and compared, see whole_device
dd           the changed ranges, known beforehand, copied without a network: the lower bound (in one process: one dd for every range
             would measure how fast processes start)
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from agent.blockio.buffers import aligned
from agent.blockio.device import Device
from agent.contract.identity import BLOCK_BYTES, FilesystemKind
from agent.system import block
from agent.system.clock import wait_until
from agent.system.run import run, start
from agent.volume.extents import changed_ranges
from mgmt.lab import lifecycle
from mgmt.lab.layout import NODE_ROOT
from tests.bench.cycle_scene import NAS1, NAS2, POOL, Scene
from tests.bench.workloads import Workload

KEYS: Final = NODE_ROOT / "bench"
PORT: Final = 2022
_STEP: Final = 4 << 20
_FAR: Final = (sys.executable, str(Path(__file__).with_name("whole_device.py")), "far")


class Ssh:
    """A server on nas2 and what connects to it from nas1."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        for node in (NAS1, NAS2):
            scene.inside(node, "mkdir", "-m", "700", KEYS)
        there, here = scene.reach(NAS2, KEYS), scene.reach(NAS1, KEYS)
        for path in (there / "host", here / "key"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)])
        (there / "authorized").write_text((here / "key.pub").read_text())
        (here / "known").write_text(f"[{NAS2.address}]:{PORT} {(there / 'host.pub').read_text()}")
        (there / "sshd").write_text(
            f"Port {PORT}\nListenAddress {NAS2.address}\nHostKey {KEYS}/host\nAuthorizedKeysFile {KEYS}/authorized\nPermitRootLogin yes\n"
            "AuthenticationMethods publickey\nUsePAM no\nUseDNS no\nPidFile none\nPrintMotd no\n"
            "SetEnv SHLVL=1\n"  # else a bash reads what root has in ~/.bashrc, and the peers would pay for that
        )
        (here / "config").write_text(
            f"Host nas2\n HostName {NAS2.address}\n Port {PORT}\n User root\n IdentityFile {KEYS}/key\n UserKnownHostsFile {KEYS}/known\n"
            " StrictHostKeyChecking yes\n BatchMode yes\n Compression no\n Ciphers aes128-gcm@openssh.com\n LogLevel ERROR\n"
        )
        server = start(lifecycle.inside(scene.lab, NAS2, ["/usr/sbin/sshd", "-D", "-f", f"{KEYS}/sshd"]))
        if not wait_until(self._answers, 30.0):
            server.kill()
            raise RuntimeError("the benchmark's sshd does not answer")

    @property
    def argv(self) -> list[str]:
        """What runs the words after it on nas2."""
        return ["ssh", "-F", f"{KEYS}/config", "nas2"]

    def _answers(self) -> bool:
        argv = lifecycle.inside(self._scene.lab, NAS1, [*self.argv, "true"])
        return run(argv, ok=range(256)).status == 0


class Rsync:
    """rsync over SSH."""

    name = "rsync"

    def __init__(self, scene: Scene, ssh: Ssh, size_bytes: int) -> None:
        self._scene, self._ssh = scene, ssh
        self._target = mounted(scene, NAS2, "rsync", scene.filesystem, size_bytes)
        self._sync("--sparse")

    def change(self, workload: Workload, seed: int) -> None:
        """It reads the volume itself."""

    def prepare(self) -> None:
        """It needs nothing."""

    def run(self) -> None:
        """Bring the replica to the volume's state, durably."""
        self._sync()

    def _sync(self, *more: str) -> None:
        rsh = shlex.join(self._ssh.argv[:-1])
        argv = ["rsync", "-aHAX", "--delete", *more, "-e", rsh, f"{self._scene.served}/", f"nas2:{self._target}/"]
        self._scene.inside(NAS1, *argv)
        self._scene.inside(NAS1, *self._ssh.argv, f"sync -f {self._target}")


class Btrfs:
    """btrfs send and receive over SSH, of the same content on btrfs."""

    name = "btrfs send"

    def __init__(self, scene: Scene, ssh: Ssh, size_bytes: int, workload: Workload) -> None:
        self._scene, self._ssh = scene, ssh
        self._source, self._target = (mounted(scene, node, "btrfs", "btrfs", size_bytes) for node in (NAS1, NAS2))
        scene.inside(NAS1, "btrfs", "subvolume", "create", self._source / "data")
        self._number = 0
        workload.fill(self._content)
        self._send()

    def change(self, workload: Workload, seed: int) -> None:
        """Change the content as the volume's was changed."""
        workload.change(self._content, seed)
        self._scene.inside(NAS1, "sync", "-f", self._source)

    def prepare(self) -> None:
        """It needs nothing."""

    def run(self) -> None:
        """Take a snapshot and bring it over, durably."""
        self._send()

    @property
    def _content(self) -> Path:
        return self._scene.reach(NAS1, self._source / "data")

    def _send(self) -> None:
        self._number += 1
        snapshot, before = self._source / f"s{self._number}", self._source / f"s{self._number - 1}"
        parent = ["-p", str(before)] if self._number > 1 else []
        receive = shlex.join([*self._ssh.argv, f"btrfs receive -q {self._target} && sync -f {self._target}"])
        send = shlex.join(["btrfs", "send", "-q", *parent, str(snapshot)])
        take = shlex.join(["btrfs", "-q", "subvolume", "snapshot", "-r", str(self._source / "data"), str(snapshot)])
        self._scene.inside(NAS1, "bash", "-c", f"set -eo pipefail; {take}; {send} | {receive}")


class Digests:
    """The whole device compared by digests."""

    name = "whole-device digests"

    def __init__(self, scene: Scene, ssh: Ssh) -> None:
        self._scene, self._ssh = scene, ssh
        self._replica = replica(scene, "digests.img")

    def change(self, workload: Workload, seed: int) -> None:
        """It reads the volume's newest generation."""

    def prepare(self) -> None:
        """It needs nothing."""

    def run(self) -> None:
        """Bring the replica to the newest generation, durably."""
        near = (sys.executable, str(Path(__file__).with_name("whole_device.py")), "near")
        source = self._scene.image(NAS1, self._scene.generations()[-1])
        self._scene.inside(NAS1, *near, source, "--", *self._ssh.argv, shlex.join([*_FAR, str(self._replica)]))


class Ranges:
    """The changed ranges, and nothing else, without a network."""

    name = "dd of the changed ranges"

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._replica = replica(scene, "ranges.img")
        self._copy: Callable[[], None] = lambda: None

    def change(self, workload: Workload, seed: int) -> None:
        """It is told what changed."""

    def prepare(self) -> None:
        """Find out what changed, before the clock runs."""
        base, target = (self._scene.reach(NAS1, self._scene.image(NAS1, generation)) for generation in self._scene.generations()[-2:])
        with base.open("rb") as one, target.open("rb") as other:
            first, count = changed_ranges(block.extent_map(other.fileno()), block.extent_map(one.fileno()))
        ranges = list(zip(first.tolist(), count.tolist(), strict=True))
        onto = self._scene.reach(NAS2, self._replica)

        def copy() -> None:
            with Device.open_reading(target) as reading, Device.open_writing(onto) as writing:
                buffer = aligned(_STEP)
                for at, blocks in ranges:
                    for begin in range(0, blocks, _STEP // BLOCK_BYTES):
                        view = buffer[: min(_STEP, (blocks - begin) * BLOCK_BYTES)]
                        reading.read_into(at + begin, [view])
                        writing.write(at + begin, view)
                writing.sync()

        self._copy = copy

    def run(self) -> None:
        """Copy what ``prepare`` found."""
        self._copy()


def mounted(scene: Scene, node: str, name: str, filesystem: FilesystemKind | str, size_bytes: int) -> Path:
    """Make a filesystem in an image in a node's pool and return where the node has it mounted; it goes with the node."""
    image, point = POOL / f"{name}.img", KEYS / name
    which = NAS1 if node == NAS1 else NAS2
    scene.inside(which, "truncate", "--size", str(size_bytes), image)
    make = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"], "btrfs": ["mkfs.btrfs", "-q", "-f"]}[str(filesystem)]
    scene.inside(which, *make, image)
    scene.inside(which, "mkdir", point)
    device = scene.inside(which, "losetup", "--direct-io=on", "--find", "--show", image).strip()
    try:
        scene.inside(which, "mount", device, point)
    finally:
        scene.inside(which, "losetup", "--detach", device)  # while it is mounted: it goes with the mount
    return point


def replica(scene: Scene, name: str) -> Path:
    """Return a copy of the volume's newest generation in nas2's pool, as the node sees it."""
    newest = scene.generations()[-1]
    scene.inside(NAS2, "cp", "--reflink=never", "--sparse=always", scene.image(NAS2, newest), POOL / name)
    return POOL / name
