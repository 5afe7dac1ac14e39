"""A differential between two agents on volume groups, ready to be sent, begun from as often as wanted, on disks that can be made to fail.

``fresh`` brings both nodes up from copies of their whole disks as they were before the transfer. ``converge`` is the oracle's end: once
the fault is gone, at most two tries reach equality block by block (I6), the base is what it was (I1), nothing is left over (I8).
"""

from __future__ import annotations

import os
import random
import secrets
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np

from agent.contract import messages as m
from agent.contract.errors import LandfallError
from agent.contract.identity import FilesystemKind, GenerationId
from agent.system.clock import wait_until
from mgmt.authority import Authority
from mgmt.drill.checker.blocks import read_arrival
from tests.faults.disks import Disk, generation_tag
from tests.faults.rig import MIB, Keeping, NodeProcess, Pair

BLOCK = 4096
VOLUME_BYTES = 32 * MIB
FILES = 48
SLOWLY = 2 * MIB  # bytes in a second, so that pieces come in several groups
VERY_SLOWLY = 64 << 10
LIMIT_S = 120.0
MARK = b"landfall: these bytes stand in the target's one big file, and nowhere else. "


@dataclass
class LvmCase:
    """Two disks as they were before the transfer, and what stands in the generations."""

    substrate: str
    disks: tuple[Disk, Disk]
    authority: Authority
    volume: UUID
    transfer: UUID
    base: GenerationId
    target: GenerationId
    digests: dict[GenerationId, str]
    target_bytes: bytes

    def fresh(self) -> Pair:
        """Return both nodes, not running, as they were before the transfer."""
        for disk in self.disks:
            disk.detach()
            subprocess.run(["cp", "--reflink=always", disk.image.with_suffix(".origin"), disk.image], check=True)
            disk.attach()
        return pair_on(self.substrate, self.disks, self.authority)

    def send(self, pair: Pair, **options: object) -> m.Sent:
        """Send the differential between two running nodes."""
        options = {"differential": m.Differential.VERIFY, **options}
        return pair.receive_and_send(self.transfer, self.base, self.target, **options)  # type: ignore[arg-type]

    def arrived(self, pair: Pair) -> int:
        """Return how many pieces NAS 2 says have arrived."""
        known: m.Transfers = pair.nas2.ask(m.ListTransfers())
        return next(facts.pieces_arrived for facts in known.transfers if facts.id == self.transfer)

    def newest(self, node: NodeProcess) -> GenerationId:
        """Return the newest generation of a node, by its own word."""
        volumes: m.Volumes = node.ask(m.ListVolumes())
        return next(facts for facts in volumes.volumes if facts.id == self.volume).generations[-1].id

    def untouched(self, pair: Pair) -> None:
        """Assert that NAS 2 stands at the base, byte for byte."""
        assert self.newest(pair.nas2) == self.base
        assert self.disks[1].digest(self.base) == self.digests[self.base]

    def converge(self, pair: Pair) -> m.Sent:
        """Let the transfer be sent again (both nodes run), and look at what comes of it."""
        try:
            sent = self.send(pair)
        except LandfallError:
            sent = self.send(pair)  # I6: at most two tries
        assert self.newest(pair.nas2) == self.target
        for generation in (self.base, self.target):
            assert self.disks[1].digest(generation) == self.digests[generation]
        assert self.disks[1].workspaces() == []
        return sent


def meanwhile(
    case: LvmCase, pair: Pair, node: NodeProcess, act: Callable[[], None], *, silence_limit_s: float = 60.0
) -> LandfallError | None:
    """Send; once ``node`` stands still at its failpoint, act and let it go on. Return the error in which the transfer ends."""

    def send() -> LandfallError | None:
        try:
            case.send(pair, rate_limit_bytes_s=VERY_SLOWLY, silence_limit_s=silence_limit_s)
        except LandfallError as error:
            return error
        return None

    with ThreadPoolExecutor(1) as executor:
        ended: Future[LandfallError | None] = executor.submit(send)
        try:
            assert wait_until(lambda: node.stopped() or ended.done(), LIMIT_S)
            assert not ended.done(), ended.result()
            act()
        finally:
            node.go_on()
        return ended.result(timeout=LIMIT_S)


def settled(case: LvmCase, pair: Pair) -> None:
    """Wait until NAS 2's reception has ended."""

    def ended() -> bool:
        known: m.Transfers = pair.nas2.ask(m.ListTransfers())
        return all(facts.state is not m.TransferState.RUNNING for facts in known.transfers if facts.id == case.transfer)

    assert wait_until(ended, LIMIT_S)


def landed_as_recorded(case: LvmCase, disk: Disk) -> int:
    """Assert that every piece recorded as arrived stands on the landing volume, by plain reads; return how many those are."""
    folder = disk.state / "state" / "transfers" / str(case.transfer)
    if not (folder / "arrival").exists():
        return 0
    arrival = read_arrival(folder / "dmi", folder / "arrival")
    if not arrival.arrived.any():
        return 0
    landed = np.frombuffer(disk.content(f"landfall/workspace/1/{case.volume}/{case.transfer}/landing"), np.uint8).reshape(-1, BLOCK)
    wanted = np.frombuffer(case.target_bytes, np.uint8).reshape(-1, BLOCK)
    for first, count in zip(arrival.first[arrival.arrived].tolist(), arrival.count[arrival.arrived].tolist(), strict=True):
        assert np.array_equal(landed[first : first + count], wanted[first : first + count]), f"recorded, but not there: block {first}"
    return int(arrival.arrived.sum())


def pair_on(substrate: str, disks: tuple[Disk, Disk], authority: Authority) -> Pair:
    """Return the nodes on two attached disks."""
    one, two = (
        NodeProcess(disk.state, name, keeping=Keeping(substrate, disk.group), environment={"LVM_SYSTEM_DIR": str(disk.settings)})
        for disk, name in zip(disks, ("nas1", "nas2"), strict=True)
    )
    return Pair(one, two, authority)


def prepare(substrate: str, folder: Path, authority: Authority) -> LvmCase:
    """Return a case on a substrate: a volume of small files and one big one, replicated once, then changed."""
    tag = secrets.token_hex(3)
    one, two = (Disk(folder / f"{node}.img", f"lf-{tag}-{node}", f"lf-{tag}-{node}-vg", folder / node) for node in ("nas1", "nas2"))
    disks = (one, two)
    for disk in disks:
        disk.make()
    pair = pair_on(substrate, disks, authority)
    try:
        pair.nas1.start()
        pair.nas2.start()
        volume = pair.create("case", FilesystemKind.EXT4, VOLUME_BYTES)
        volumes: m.Volumes = pair.nas1.ask(m.ListVolumes())
        root = Path(volumes.volumes[0].mount_point)
        dice = random.Random(7)
        for number in range(FILES):
            (root / f"f{number}").write_bytes(dice.randbytes(dice.randrange(1, 120_000)))
        (root / "big").write_bytes(dice.randbytes(3 * MIB))
        base = pair.replicate(volume)
        for number in range(0, FILES, 2):
            with open(root / f"f{number}", "r+b") as file:
                os.pwrite(file.fileno(), dice.randbytes(5000), dice.randrange(0, 2000))
        (root / "big").write_bytes((MARK * (4 * MIB // len(MARK)))[: 3 * MIB - 4096] + dice.randbytes(4096))
        (root / "new").write_bytes(dice.randbytes(300_000))
        target = pair.take(volume)
        transfer = pair.build(base, target)
        pair.nas1.ask(m.StopServing(volume))
    finally:
        pair.nas1.kill()
        pair.nas2.kill()
    digests = {generation: one.digest(generation) for generation in (base, target)}
    content = one.content(generation_tag(target))
    for disk in disks:
        disk.detach()
        subprocess.run(["cp", "--reflink=always", disk.image, disk.image.with_suffix(".origin")], check=True)
    return LvmCase(substrate, disks, authority, volume, transfer, base, target, digests, content)


def end(pair: Pair | None, case: LvmCase) -> None:
    """End the nodes and take their disks down; I8: nothing of device-mapper's stays."""
    if pair is not None:
        for node in (pair.nas1, pair.nas2):
            with suppress(ProcessLookupError):
                node.kill()
    for disk in case.disks:
        disk.detach()
    names = subprocess.run(["dmsetup", "ls"], capture_output=True, text=True, check=True).stdout
    assert "landfall-" not in names
