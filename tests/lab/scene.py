"""A volume of a lab with files, its clients, and what happens to it: what tests of failover share."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from agent.contract import messages as m
from agent.contract.errors import LandfallError, NodeUnreachable
from agent.contract.identity import FilesystemKind
from agent.system.run import run as start_program
from mgmt import run
from mgmt.failover import driver
from mgmt.failover.account import Account
from mgmt.failover.plan import Wish
from mgmt.inventory import Inventory, read_inventory
from mgmt.lab import lifecycle, processes
from mgmt.lab.layout import Lab, NodeName
from mgmt.lab.namespace import within

MGMT, NAS1, NAS2 = NodeName
VOLUME_BYTES = 96 << 20
LIMIT_S = 90.0
FILES = 24
BALLAST_BYTES = 12 << 20
"""What nobody changes: whoever sends it again sends more than a differential."""

T = TypeVar("T")

WRITE = """
import json, os, pathlib, random, sys
root = pathlib.Path(sys.argv[1])
for name, seed, size in json.load(sys.stdin):
    (root / name).write_bytes(random.Random(seed).randbytes(size))
os.sync()
"""


@dataclasses.dataclass
class Scene:
    """One volume of the lab, at an address of its own."""

    lab: Lab
    name: str
    address: str
    contents: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def inventory(self) -> Inventory:
        return read_inventory(self.lab.node(MGMT) / "etc" / "landfall.toml")

    def at_site(self, work: Callable[[run.Site], T], inventory: Inventory | None = None) -> T:
        """Do something on the management node."""

        def inside() -> T:
            with run.Site(inventory or self.inventory) as site:
                return work(site)

        return within(self.lab.namespace(MGMT), inside)

    def add(self) -> None:
        self.at_site(
            lambda site: run.add_volume(
                site,
                self.name,
                filesystem=FilesystemKind.EXT4,
                size_bytes=VOLUME_BYTES,
                primary=NAS1,
                secondary=NAS2,
                address=f"{self.address}/24",
            )
        )

    def write(self, node: NodeName, files: dict[str, tuple[int, int]]) -> None:
        """Give each file the content that follows from its seed and size."""
        listed = json.dumps([(name, *about) for name, about in files.items()]).encode()
        argv = [sys.executable, "-c", WRITE, f"/run/landfall/node/srv/{self.name}"]
        start_program(lifecycle.inside(self.lab, node, argv), stdin=listed)
        self.contents |= files

    def replicate(self) -> run.Replicated:
        return self.at_site(lambda site: run.replicate(site, self.name))

    def fail_over(self, wish: Wish | None = None) -> Account:
        done = self.at_site(lambda site: driver.failover(site, self.name, wish or Wish()))
        assert done
        return done

    def facts(self, node: NodeName) -> m.VolumeFacts:
        def ask(site: run.Site) -> m.VolumeFacts:
            return next(found for found in site.node(node).ask(m.ListVolumes()).volumes if found.name == self.name)

        return self.at_site(ask)

    def lease_until_ns(self, node: NodeName) -> int:
        """Return the end of a node's newest lease, by its clock since the boot; it stands where it was written when it is over, too."""
        volume = self.at_site(lambda site: site.catalog.volume(self.name).id)
        return int(json.loads((self._tenures(node) / f"{volume}.json").read_text())["lease_until_ns"])

    def said_by_keeper(self, node: NodeName) -> str:
        return (self._tenures(node) / "keeper.log").read_text()

    def _tenures(self, node: NodeName) -> Path:
        return Path(f"/proc/{processes.first_process(self.lab, node)}/root/run/landfall/tenure")

    def smbclient(self, command: str) -> bytes:
        """Return what a client says who runs a command at the volume's address."""
        argv = ["smbclient", f"//{self.address}/{self.name}", "-N", "-c", command]
        output = within(self.lab.namespace(MGMT), lambda: start_program(argv, timeout_s=LIMIT_S, ok=range(256)))
        return output.stdout + output.stderr

    def smb(self, name: str) -> bytes:
        """Return a file as a client reads it at the volume's address."""
        with tempfile.TemporaryDirectory() as folder:
            said = self.smbclient(f'get "{name}" "{folder}/got"')
            got = Path(folder) / "got"
            assert got.exists(), said
            return got.read_bytes()

    def assert_served(self, *names: str) -> None:
        for name in names:
            seed, size = self.contents[name]
            assert self.smb(name) == random.Random(seed).randbytes(size), name

    def break_off(self, source: NodeName, files: dict[str, tuple[int, int]]) -> None:
        """Change files on the source, and pull its plug when a quarter of it has been sent."""
        with self._sending(source, files) as failed:
            lifecycle.kill(self.lab, source)
        assert failed == [NodeUnreachable.code]

    def pause_agent(self, source: NodeName, pid: str, files: dict[str, tuple[int, int]]) -> None:
        """Change files on the source, and let its agent stand still when a quarter of it has been sent, until nas2 says that it noticed."""
        with self._sending(source, files, wait=False):
            start_program(lifecycle.inside(self.lab, source, ["kill", "-STOP", pid]))
        other = NAS2 if source is NAS1 else NAS1

        self.at_site(lambda site: run.wait_for_failure(site, other, self._newest(site, other), LIMIT_S))

    def _newest(self, site: run.Site, node: NodeName) -> UUID:
        volume = site.catalog.volume(self.name).id
        return max(
            (found for found in site.node(node).ask(m.ListTransfers()).transfers if found.volume == volume),
            key=lambda found: found.target.counter,
        ).id

    @contextmanager
    def _sending(self, source: NodeName, files: dict[str, tuple[int, int]], *, wait: bool = True) -> Iterator[list[str]]:
        """Lend the moment at which a quarter of the changes has been sent; the list has the code of what the sending failed of."""
        self.write(source, files)
        reached = threading.Event()
        failed: list[str] = []

        def tell(node: str, progress: m.Progress) -> None:
            if progress.step == "pieces" and 0 < progress.total <= progress.done * 4:
                reached.set()

        def work(site: run.Site) -> None:
            try:
                run.replicate(site, self.name, rate_limit_bytes_s=200_000, tell=tell)
            except LandfallError as error:
                failed.append(error.code)
            finally:
                reached.set()

        going = threading.Thread(target=self.at_site, args=(work,), daemon=True)
        going.start()
        assert reached.wait(LIMIT_S)
        yield failed
        if wait:
            going.join(LIMIT_S)


def scene_of(lab: Lab, name: str, number: int) -> Scene:
    for node in (NAS1, NAS2):
        lifecycle.start_node(lab, node)  # a test before may have pulled its plug
    made = Scene(lab, name, f"10.77.0.{number}")
    made.add()
    made.write(NAS1, {"ballast": (99, BALLAST_BYTES)} | {f"old{index}": (index, 40_000) for index in range(FILES)})
    made.replicate()
    return made


def changed(seed: int, size: int = 300_000) -> dict[str, tuple[int, int]]:
    return {f"old{index}": (seed + index, size + 2000 * index) for index in range(0, FILES, 2)}


def landfall(lab: Lab, *words: str, at: tuple[str, ...] = ()) -> subprocess.CompletedProcess[bytes]:
    """Run the command as an operator does; ``at``: with another configuration than the lab's own."""
    argv = [sys.executable, "-m", "mgmt.cli", *(at or ("--lab", str(lab.directory))), *words]
    return subprocess.run(argv, capture_output=True, check=False, timeout=LIMIT_S)


def document(done: subprocess.CompletedProcess[bytes]) -> Any:
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@contextmanager
def watching(lab: Lab, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The service, as long as the context lasts; ``words`` go before `watch`."""
    argv = [sys.executable, "-m", "mgmt.cli", *(words or ("--lab", str(lab.directory))), "watch"]
    with log.open("ab") as output:
        service = subprocess.Popen(argv, stdout=output, stderr=output)
        try:
            yield service
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(60)
