"""Two agents on one machine without a lab: real daemons, pools, volumes and TLS, on loopback, cheap enough to kill hundreds of times.

Each node is a folder in a pool of its own (an XFS filesystem with reflink in a sparse file): ``state`` and ``pool``. A node's whole
durable state can be copied in a moment (``cp --reflink``), so each crash can be followed in more than one way. The agents' processes
come from a fork server that has everything imported; they are killed by SIGKILL like any process.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.process
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from agent.contract import messages as m
from agent.contract.errors import LandfallError
from agent.contract.identity import FilesystemKind, GenerationId, empty_generation
from agent.system.clock import wait_until
from agent.system.priority import IoPriority
from mgmt.authority import Authority
from mgmt.lab.proxy import Endpoint, Proxy, Trigger

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["agent.daemon", "tests.faults.rig"])
ANSWER_S = 60.0
MIB = 1 << 20


def _die_with_the_test_run() -> None:
    """Leave no agent behind, however the test run ends: the fork server would go on for as long as one lives."""
    run = multiprocessing.parent_process()
    assert run is not None
    multiprocessing.connection.wait([run.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Keeping:
    """What a node keeps its volumes on."""

    substrate: str = "reflink"
    volume_group: str = ""  # of the LVM substrates; reflink's images are in the node's folder
    io_priority: IoPriority = IoPriority.NORMAL


def _serve(folder: str, name: str, keeping: Keeping, environment: dict[str, str], sabotage: Callable[[], None] | None) -> None:
    from agent.config import Config
    from agent.daemon import serve

    os.environ.update(environment)
    if sabotage is not None:
        sabotage()
    log = os.open(Path(folder) / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    os.setsid()
    threading.Thread(target=_die_with_the_test_run, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    root = Path(folder)
    serve(
        Config(
            node=name,
            replication_address="127.0.0.1",
            state_dir=root / "state",
            pool_dir=root / "pool",
            run_dir=root / "run",
            socket=root / "run" / "agent.sock",
            mount_dir=root / "srv",
            smb_port=0,
            lab=True,
            substrate=keeping.substrate,
            volume_group=keeping.volume_group,
            io_priority=keeping.io_priority,
        )
    )


@dataclass
class NodeProcess:
    """One agent on one folder."""

    folder: Path
    name: str
    process: multiprocessing.context.ForkServerProcess | None = field(default=None)
    keeping: Keeping = Keeping()
    environment: dict[str, str] = field(default_factory=dict)  # of every agent on this folder
    sabotage: Callable[[], None] | None = field(default=None)  # run in the agent's process first: takes away what a test must miss
    term: int = 1

    def start(self, **environment: str) -> None:
        """Start the agent; on return it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        process = self._begun(environment)
        until = time.monotonic() + ANSWER_S
        while True:
            try:
                self.ask(m.Hello())
            except OSError:
                if not process.is_alive() or time.monotonic() > until:
                    raise AssertionError(f"{self.name} did not start:\n{self.log()}") from None
                time.sleep(0.005)  # no event tells that a socket is being listened on
            else:
                return

    def ask(self, arguments: Any, on_progress: Callable[[m.Progress], None] | None = None) -> Any:
        """Return the answer of the agent; its error is raised; OSError if it is gone."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(_short(self.folder / "run" / "agent.sock"))
            request = {"v": m.PROTOCOL, "id": 1, "verb": m.VERB_OF[type(arguments)], "args": m.to_document(arguments), "term": self.term}
            connection.sendall(m.encode_line(request))
            with connection.makefile("rb") as answers:
                while True:
                    line = answers.readline()
                    if not line:
                        raise ConnectionResetError(f"{self.name} ended the conversation")
                    document = m.decode_line(line)
                    if "progress" in document:
                        if on_progress:
                            on_progress(m.from_document(document["progress"], m.Progress))
                    elif "error" in document:
                        raise LandfallError.from_wire(document["error"])
                    else:
                        result = m.from_document(document["result"], m.VERBS[m.VERB_OF[type(arguments)]][1])
                        return answers.read(result.blob_bytes) if isinstance(result, m.Blob) else result

    def kill(self) -> None:
        """SIGKILL; on return the process is gone."""
        if self.process is not None and self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
            self.process.join()
            self.process = None

    def wait_dead(self, limit_s: float = ANSWER_S) -> None:
        """Wait for a process that a failpoint kills."""
        assert self.process is not None
        self.process.join(limit_s)
        assert not self.process.is_alive(), f"{self.name} lives on:\n{self.log()}"
        self.process = None

    def start_armed(self, *points: str) -> None:
        """Start the agent with failpoints armed, each ``name=action:nth``."""
        self._trace.unlink(missing_ok=True)
        self.start(**self._armed(points))

    def die_at_start(self, *points: str) -> None:
        """Start the agent, which dies by a failpoint before it answers."""
        self._trace.unlink(missing_ok=True)
        self._begun(self._armed(points))
        self.died_by(points[-1])

    def _begun(self, environment: dict[str, str]) -> multiprocessing.context.ForkServerProcess:
        arguments = (str(self.folder), self.name, self.keeping, {**self.environment, **environment}, self.sabotage)
        self.process = FORKS.Process(target=_serve, args=arguments)
        self.process.start()
        return self.process

    def died_by(self, point: str) -> None:
        """Assert that the agent died, or dies soon, by SIGKILL at ``point``, and that this is the last point that it passed."""
        assert self.process is not None
        self.process.join(ANSWER_S)
        assert self.process.exitcode == -signal.SIGKILL, f"{self.name} did not die at {point}: {self.process.exitcode}\n{self.log()}"
        self.process = None
        assert point.partition("=")[0] in self.passed(), f"{self.name} died before {point}"

    def stopped(self) -> bool:
        """Whether the agent is stopped (SIGSTOP), as by a failpoint."""
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def go_on(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def passed(self) -> list[str]:
        """Return the failpoints that the agent passed since ``start_armed``, in order."""
        return self._trace.read_text().split() if self._trace.exists() else []

    @property
    def _trace(self) -> Path:
        return self.folder / "trace"

    def _armed(self, points: tuple[str, ...]) -> dict[str, str]:
        return {
            "LANDFALL_ALLOW_FAILPOINTS": "1",
            "LANDFALL_FAILPOINTS": ";".join(points),
            "LANDFALL_FAILPOINT_TRACE": str(self._trace),
        }

    def log(self) -> str:
        """Return what the agent said."""
        path = self.folder / "agent.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def image(self, generation: GenerationId) -> Path:
        """Return the image file of a generation of the reflink substrate."""
        return self.folder / "pool" / "volumes" / str(generation.volume) / "generations" / f"{generation.name}.img"


def _short(path: Path) -> str:
    """Return a spelling of ``path`` that fits a socket address (107 bytes)."""
    if len(bytes(path)) < 100:
        return str(path)
    return os.path.relpath(path)


def copy_tree(source: Path, target: Path) -> None:
    """Make ``target`` a copy of a node's folder that shares its blocks."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", "--reflink=always", source, target], check=True)
    shutil.rmtree(target / "run", ignore_errors=True)


@dataclass(frozen=True)
class Pool:
    """An XFS filesystem with reflink in a sparse file, mounted."""

    image: Path
    mount_point: Path

    def mount(self) -> None:
        """Mount it (again)."""
        subprocess.run(["mount", "-o", "loop,nouuid", self.image, self.mount_point], check=True)

    def unmount(self) -> None:
        """Unmount it, whoever is in it; on return its filesystem lives nowhere, so that a mount reads it anew."""
        for line in sorted(Path("/proc/mounts").read_text().splitlines(), key=len, reverse=True):
            where = line.split()[1]
            if where.startswith(f"{self.mount_point}/"):
                subprocess.run(["umount", where], check=False)
        # Whoever lists the machine's block devices holds a loop device, and with it an image on the pool, for a moment longer.
        unmounted = wait_until(lambda: subprocess.run(["umount", self.mount_point], capture_output=True, check=False).returncode == 0, 30.0)
        assert unmounted, f"{self.mount_point} stays in use"
        # A program that begins in a mount namespace of its own has a copy of this mount until it lets go of it.
        assert wait_until(lambda: not self._attached(), 60.0), f"{self.image} stays attached"

    def _attached(self) -> bool:
        files = Path("/sys/block").glob("loop*/loop/backing_file")
        return any(file.read_text().strip() == str(self.image) for file in files if file.exists())

    def lose_power(self) -> None:
        """Shut the filesystem down without flushing its log, as power loss does, and mount it again."""
        from agent.system.block import go_down

        fd = os.open(self.mount_point, os.O_RDONLY)
        try:
            go_down(fd)
        finally:
            os.close(fd)
        self.unmount()
        self.mount()


@contextmanager
def pool(folder: Path, size_bytes: int = 4096 * MIB) -> Iterator[Pool]:
    """Yield a fresh pool, gone afterwards."""
    folder.mkdir(parents=True)
    image, mount_point = folder / "pool.img", folder / "mnt"
    mount_point.mkdir()
    with image.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    made = Pool(image, mount_point)
    made.mount()
    try:
        yield made
    finally:
        made.unmount()
        image.unlink()


class Link:
    """The way from NAS 1 to NAS 2 through a proxy each time it is asked for; ``proxy`` is the newest."""

    def __init__(self, trigger: Trigger | None = None) -> None:
        self._trigger = trigger
        self._stack = ExitStack()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def route(self, address: str, port: int) -> tuple[str, int]:
        """Return where to connect to instead."""
        self.proxy = self._stack.enter_context(Proxy(Endpoint(address, 0), Endpoint(address, port), trigger=self._trigger))
        return self.proxy.endpoint.host, self.proxy.endpoint.port


@dataclass
class Pair:
    """NAS 1 and NAS 2 and the little a management node does for a transfer."""

    nas1: NodeProcess
    nas2: NodeProcess
    authority: Authority

    def receive_and_send(
        self,
        transfer: UUID,
        base: GenerationId,
        target: GenerationId,
        differential: m.Differential,
        *,
        route: Callable[[str, int], tuple[str, int]] = lambda address, port: (address, port),
        streams: int = 2,
        silence_limit_s: float = 5.0,
        rate_limit_bytes_s: int = 0,
        on_progress: Callable[[m.Progress], None] | None = None,
        mends: bool = False,
    ) -> m.Sent:
        """Send an already built transfer; raises what the sender raises."""
        passes = self.authority.passes("nas1", "nas2")
        listening = self.nas2.ask(
            m.ReceiveTransfer(transfer, base, target, differential, streams, passes.token, passes.receiver, silence_limit_s, mends)
        )
        address, port = route(listening.address, listening.port)
        answer = self.nas1.ask(
            m.SendTransfer(
                transfer, address, port, differential, streams, passes.token, passes.sender, silence_limit_s, rate_limit_bytes_s
            ),
            on_progress,
        )
        assert isinstance(answer, m.Sent)
        return answer

    def create(self, name: str, filesystem: FilesystemKind, size_bytes: int) -> UUID:
        """Make a volume on both."""
        volume = uuid4()
        self.nas1.ask(m.CreateVolume(volume, name, filesystem, size_bytes))
        self.nas2.ask(m.AdmitReplica(volume, name, filesystem, size_bytes))
        return volume

    def take(self, volume: UUID) -> GenerationId:
        """Take a generation on NAS 1."""
        taken: m.Taken = self.nas1.ask(m.TakeGeneration(volume))
        return taken.generation.id

    def build(self, base: GenerationId, target: GenerationId) -> UUID:
        """Build the DMI of a new transfer on NAS 1."""
        transfer = uuid4()
        self.nas1.ask(m.BuildTransfer(transfer, base, target))
        return transfer

    def replicate(self, volume: UUID, base: GenerationId | None = None) -> GenerationId:
        """Take a generation and send it whole."""
        target = self.take(volume)
        base = base or empty_generation(volume)
        self.receive_and_send(self.build(base, target), base, target, m.Differential.VERIFY)
        return target
