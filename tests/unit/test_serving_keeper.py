"""The keeper on a machine of the test's own, by its clock: what is given up when, at the slowest that every step may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from uuid import UUID, uuid4

import pytest

from agent.config import LEAST_MARGIN_S
from agent.contract.errors import CommandFailed
from agent.serving import keeper
from agent.serving.address import Interface
from agent.serving.exports import Share
from agent.serving.keeper import KeeperOrder
from agent.serving.machine import Machine
from agent.serving.tenure import Tenures
from agent.system.clock import CLOCK
from agent.system.files import locked

S = 1_000_000_000
HELD_S = 5.0
"""So long before the end of a lease no client reaches the volume any more."""

R = TypeVar("R")


class Clock:
    """Goes when somebody waits."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def wall_ns(self) -> int:
        return self.boottime_ns()

    def monotonic_s(self) -> float:
        return self.now_s

    def boottime_ns(self) -> int:
        return round(self.now_s * S)

    def boot_id(self) -> str:
        return "boot"

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class AsSlow:
    """Mounts, addresses and SMB of a machine on which each step takes all the time that it is given, and then fails or not."""

    def __init__(self, clock: Clock, folder: Path, *, fails: bool) -> None:
        self.clock, self.folder, self.fails = clock, folder, fails
        self.mounted: set[Path] = set()
        self.held: set[str] = set()
        self.shared: tuple[Share, ...] = ()
        self.at_s: dict[str, float] = {}

    def machine(self) -> Machine:
        threads: Any = self
        own: Any = self
        return Machine(own, own, lambda *_: own, self.make_unwritable, threads)

    def beside(self, work: Callable[[], R]) -> Callable[[], R]:
        return work

    def is_writable(self, mount_point: Path) -> bool:
        return mount_point in self.mounted

    def is_held(self, address: Interface) -> bool:
        return str(address) in self.held

    def remove(self, address: Interface) -> None:
        if self.is_held(address):
            self.held.discard(str(address))
            self._noted(f"address {address.ip}")

    def shares(self) -> tuple[Share, ...]:
        return self.shared

    def is_open(self, share: Share) -> bool:
        return share in self.shared

    def stop(self, *, limit_s: float) -> None:
        if not self.shared:
            return
        self.clock.now_s += limit_s
        self.shared = ()
        self._noted("SMB")
        if self.fails:
            raise CommandFailed("smbd did not end")

    def export_all(self, shares: tuple[Share, ...], *, limit_s: float) -> None:
        self.clock.now_s += limit_s
        self.shared = shares
        self._noted("the others")

    def make_unwritable(self, mount_point: Path, *, limit_s: float) -> str:
        self.clock.now_s += 3 * limit_s  # each of three ways at its limit
        self.mounted.discard(mount_point)
        self._noted(f"unwritable {mount_point.name}")
        return "in use, shut down"

    def _noted(self, what: str) -> None:
        assert what not in self.at_s, f"{what} twice"
        self.at_s[what] = self.clock.now_s


class DoneError(Exception):
    """The keeper has nothing to keep any more."""


def leave() -> NoReturn:
    raise DoneError


@pytest.fixture
def clock() -> Iterator[Clock]:
    made = Clock()
    held = CLOCK.set(made)
    yield made
    CLOCK.reset(held)


def order_in(folder: Path) -> KeeperOrder:
    return KeeperOrder(str(folder), str(folder / "srv"), "samba", "192.0.2.1", 445, False, str(folder / "nfs"), (), LEAST_MARGIN_S)


def leased(scene: AsSlow, tenures: Tenures, number: int, lease_s: float | None) -> UUID:
    """Let a volume be served at an address of its own."""
    volume, name, address = uuid4(), f"v{number}", f"192.0.2.{100 + number}/24"
    scene.mounted.add(scene.folder / "srv" / name)
    scene.held.add(address)
    scene.shared += (Share(name, scene.folder / "srv" / name),)
    tenures.confirm(volume, name, 1, None if lease_s is None else scene.clock.boottime_ns() + round(lease_s * S))
    tenures.have_address(volume, name, 1, address)
    return volume


@pytest.mark.parametrize("fails", [False, True], ids=["slow", "failing"])
def test_I4_nobody_reaches_a_volume_for_the_last_five_seconds_of_its_lease_however_slow_every_step_is(
    clock: Clock, tmp_path: Path, fails: bool
) -> None:
    """An agent that was stopped holds the lock, smbd takes its time, and the leases of eight volumes end one right after the other."""
    scene, tenures = AsSlow(clock, tmp_path, fails=fails), Tenures(tmp_path)
    ends_s = {number: clock.now_s + 20.0 + number / 10 for number in range(8)}
    for number in ends_s:
        leased(scene, tenures, number, 20.0 + number / 10)
    with locked(tmp_path / "hands", wait_s=0.0), pytest.raises(DoneError):
        keeper.keep(order_in(tmp_path), scene.machine(), leave)
    assert not scene.mounted | scene.held
    assert "the others" not in scene.at_s, "there are none"
    for number, end_s in ends_s.items():
        reached_until_s = max(scene.at_s["SMB"], scene.at_s[f"address 192.0.2.{100 + number}"])
        assert end_s - reached_until_s >= HELD_S, f"v{number} was reached until {end_s - reached_until_s:.2f} s before its lease ended"
    mark = tenures.ended(tenures.all()[0])
    assert mark is not None
    assert ("could not be ended" in mark.reason) is fails


def test_I4_other_shares_are_away_only_until_all_that_is_over_is_given_up(clock: Clock, tmp_path: Path) -> None:
    scene, tenures = AsSlow(clock, tmp_path, fails=False), Tenures(tmp_path)
    for number, lease_s in enumerate((20.0, 21.0, None)):
        leased(scene, tenures, number, lease_s)
    with pytest.raises(DoneError):
        keeper.keep(order_in(tmp_path), scene.machine(), leave)
    assert [share.name for share in scene.shared] == ["v2"]
    assert scene.held == {"192.0.2.102/24"}
    assert scene.at_s["the others"] == max(scene.at_s.values())


def test_I4_a_lease_that_is_renewed_while_the_keeper_waits_ends_nothing(clock: Clock, tmp_path: Path) -> None:
    scene, tenures = AsSlow(clock, tmp_path, fails=False), Tenures(tmp_path)
    volume = leased(scene, tenures, 0, LEAST_MARGIN_S)
    order = order_in(tmp_path)
    tenures.lease(volume, "v0", 1, clock.boottime_ns() + 60 * S)
    keeper._give_up(order, scene.machine(), tenures)
    assert not scene.at_s
    assert (scene.held, len(scene.shared), len(scene.mounted)) == ({"192.0.2.100/24"}, 1, 1)


def test_I4_a_volume_that_a_local_program_keeps_busy_takes_no_other_share_away_again_and_again(clock: Clock, tmp_path: Path) -> None:
    scene, tenures = AsSlow(clock, tmp_path, fails=False), Tenures(tmp_path)
    for number, lease_s in enumerate((20.0, None)):
        leased(scene, tenures, number, lease_s)
    rounds = iter(range(3))

    def stays_busy(mount_point: Path, *, limit_s: float) -> str:
        if next(rounds, None) is None:
            scene.mounted.discard(mount_point)
        return "in use, shut down"

    machine = dataclasses.replace(scene.machine(), make_unwritable=stays_busy)
    with pytest.raises(DoneError):
        keeper.keep(order_in(tmp_path), machine, leave)
    assert next(rounds, None) is None
    assert {"SMB", "the others"} <= scene.at_s.keys(), "once each: a second time is refused above"
