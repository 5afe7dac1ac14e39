"""A lab for the cycle's benchmark, and Landfall's cycle on it: two real agents, their real way over TLS, and where the seconds go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from agent.contract import messages as m
from agent.contract.dmi import Dmi
from agent.contract.identity import BLOCK_BYTES, FilesystemKind, GenerationId
from agent.system.clock import monotonic_s
from agent.system.priority import IoPriority
from agent.system.run import run
from mgmt import run as operations
from mgmt.drill.disks import within_node
from mgmt.inventory import read_inventory
from mgmt.lab import control, lifecycle, processes
from mgmt.lab.layout import NODE_ROOT, Lab, NodeName
from mgmt.lab.namespace import enter
from tests.bench.harness import cold

NAS1, NAS2 = NodeName.NAS1, NodeName.NAS2
VOLUME: Final = "bench"
PROGRAM_S: Final = 3600.0
POOL: Final = NODE_ROOT / "pool"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cycle:
    """One cycle of Landfall: seconds from the order to the acknowledged commit, and where they went."""

    seconds: float
    frozen_ms: float
    stages: dict[str, float]
    changed_bytes: int
    changed_files: int
    dmi_bytes: int
    raw_bytes: int  # what travels before compression: the DMI, the pieces' data, and what frames them
    sent_bytes: int  # what travelled after compression and before TLS


class Scene:
    """The lab, its one volume, and the thread that is the management node."""

    def __init__(self, lab: Lab, mgmt: ThreadPoolExecutor, filesystem: FilesystemKind) -> None:
        self.lab, self.filesystem = lab, filesystem
        self._mgmt = mgmt
        self._site: operations.Site | None = None
        self._dmi: Dmi | None = None

    def asked(self, act: Callable[[operations.Site], T]) -> T:
        """Return what ``act`` returns, done on the management node."""

        def work() -> T:
            if self._site is None:
                self._site = operations.Site(read_inventory(self.lab.node(NodeName.MGMT) / "etc" / "landfall.toml"))
            return act(self._site)

        return self._mgmt.submit(work).result()

    def close(self) -> None:
        """Close the management node's connections."""
        if self._site is not None:
            self._mgmt.submit(self._site.close).result()

    def prioritise(self, priority: IoPriority) -> None:
        """Let both agents replicate with this I/O priority, from new processes."""
        for node in (NAS1, NAS2):
            settings = self.lab.node(node) / "etc" / "agent.toml"
            lines = [line for line in settings.read_text().splitlines() if not line.startswith("io_priority")]
            settings.write_text("\n".join([*lines, f'io_priority = "{priority}"', ""]))
            control.kill_service(self.lab, node, "agent")
            control.start_service(self.lab, node, "agent")
        self.close()
        self._site = None

    def add_volume(self, size_bytes: int) -> Path:
        """Make the volume and return where nas1 serves it, as this machine reaches it."""
        self.asked(
            lambda site: operations.add_volume(
                site, VOLUME, filesystem=self.filesystem, size_bytes=size_bytes, primary=NAS1, secondary=NAS2
            )
        )
        return self.reach(NAS1, self.served)

    @property
    def served(self) -> Path:
        """Where nas1 mounts the volume."""
        return NODE_ROOT / "srv" / VOLUME

    def reach(self, node: NodeName, path: Path) -> Path:
        """Return a node's path as this machine reaches it."""
        return within_node(self.lab, node, path)

    def inside(self, node: NodeName, *argv: str | Path) -> str:
        """Return what a program prints that runs on a node."""
        return run(lifecycle.inside(self.lab, node, [str(word) for word in argv]), timeout_s=PROGRAM_S).text

    def on_wire(self) -> int:
        """Return how many bytes have left nas1 and nas2, headers included."""
        total = 0
        for node in (NAS1, NAS2):
            pid = processes.first_process(self.lab, node)
            for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]:
                name, _, counts = line.partition(":")
                if name.strip() != "lo":
                    total += int(counts.split()[8])
        return total

    def generations(self) -> list[GenerationId]:
        """Return what nas1 holds, oldest first."""
        facts = self.asked(lambda site: site.node(NAS1).ask(m.ListVolumes()).volumes)
        return [generation.id for generation in facts[0].generations]

    def image(self, node: NodeName, generation: GenerationId) -> Path:
        """Return a generation's image in a node's pool, as the node sees it."""
        return POOL / "volumes" / str(generation.volume) / "generations" / f"{generation.name}.img"

    def settle(self) -> None:
        """Write back what is dirty on the nodes' filesystems, and drop the machine's clean caches."""
        for node, path in ((NAS1, self.served), (NAS1, POOL), (NAS2, POOL)):
            self.inside(node, "sync", "-f", path)
        cold()

    def cycle(self, rate_limit_bytes_s: int = 0) -> Cycle:
        """Replicate what changed; return when it is committed on nas2, with the seconds of each stage. 0: no limit."""
        return self.asked(lambda site: self._cycle(site, rate_limit_bytes_s))

    def dmi(self) -> Dmi:
        """Return the DMI of the last cycle."""
        assert self._dmi is not None
        return self._dmi

    def _cycle(self, site: operations.Site, rate_limit_bytes_s: int) -> Cycle:
        at: dict[str, float] = {}

        def mark(name: str) -> None:
            at.setdefault(name, monotonic_s())

        def tell(node: str, progress: m.Progress) -> None:
            if progress.done == progress.total:
                mark(progress.step)

        def route(address: str, port: int) -> tuple[str, int]:
            mark("listening")
            return address, port

        ask = site.node(NAS1).ask

        def asking(arguments: Any, *others: Any, **more: Any) -> Any:
            if isinstance(arguments, m.TakeGeneration):
                mark("looked around")
            answer = ask(arguments, *others, **more)
            if isinstance(arguments, m.TakeGeneration | m.BuildTransfer | m.SendTransfer):
                mark(type(arguments).__name__)
            return answer

        mark("begin")
        site.node(NAS1).ask = asking  # type: ignore[method-assign]
        try:
            done = operations.replicate(site, VOLUME, rate_limit_bytes_s=rate_limit_bytes_s, route=route, tell=tell)
        finally:
            site.node(NAS1).ask = ask  # type: ignore[method-assign]
        mark("end")
        dmi = self._dmi = Dmi.decode(site.node(NAS1).fetch(m.FetchDmi(done.transfer)))
        assert done.built is not None
        names = (
            ("look around", "looked around"), ("take", "TakeGeneration"),
            ("build", "BuildTransfer"), ("listen", "listening"), ("send DMI", "management information"),
            ("send pieces", "pieces"), ("verify and commit", "SendTransfer"), ("record", "end"),
        )  # fmt: skip
        stages, before = {}, at["begin"]
        for name, stamp in names:
            if stamp in at:
                stages[name] = at[stamp] - before
                before = at[stamp]
        data = int(dmi.block_count[dmi.target_hole == 0].sum(dtype=np.int64)) * BLOCK_BYTES
        return Cycle(
            at["end"] - at["begin"], done.frozen_ms, stages, done.built.changed_bytes, done.built.files, done.built.dmi_bytes,
            done.built.dmi_bytes + data + 5 * done.built.pieces, done.sent.bytes_sent,
        )  # fmt: skip


@contextmanager
def scene(folder: Path, filesystem: FilesystemKind, pool_bytes: int) -> Iterator[Scene]:
    """Yield a lab in ``folder``; nothing of it is left afterwards."""
    lab = Lab.at(folder / "lab")
    try:
        lifecycle.up(lab, pool_size_bytes=pool_bytes)
        with ThreadPoolExecutor(1, initializer=enter, initargs=(lab.namespace(NodeName.MGMT),)) as mgmt:
            made = Scene(lab, mgmt, filesystem)
            try:
                yield made
            finally:
                made.close()
    finally:
        lifecycle.down(lab)
