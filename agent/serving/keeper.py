"""A program of its own: gives a volume up in time when its lease is not renewed, whatever has become of the agent.

It lives as long as there is a lease, and outlives the agent: an agent that was killed, that hangs or that is stopped cannot end its
exports. Every quarter of a second it looks at the tenures by CLOCK_BOOTTIME, which goes on while the machine sleeps. Some seconds before
the end of a lease (``margin_s``) it marks the tenure as ended, and then ends the exports, gives up the address and makes the volume
unwritable: each step even if the one before failed, and again as long as there is something left to do. From the mark on no renewal helps.
If it dies, the agent starts another; if both do, the node has lost more than its lease.

Half of the margin is for the exports and the address, all steps at their limits: a look (EVERY_S), the hands (HANDS_S), SMB (HANDS_S), NFS
(an eighth of the margin). So with a margin of 10 s clients have reached nothing for 5 s when a lease ends, whatever hangs.

Usage: python -m agent.serving.keeper ORDER, where ORDER is a KeeperOrder as JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NoReturn
from uuid import UUID

from agent.contract.errors import DeviceBusy, LandfallError
from agent.contract.messages import from_document, to_document
from agent.serving import address as addresses
from agent.serving.exports import Share
from agent.serving.machine import Machine, Smb
from agent.serving.nfs import Nfs
from agent.serving.tenure import Tenure, Tenures, is_over
from agent.system import clock
from agent.system.files import held_elsewhere, lock_for_life, locked
from agent.system.run import start

EVERY_S: Final = 0.25
HANDS_S: Final = 1.0
START_LIMIT_S: Final = 60.0
REASON: Final = "its lease was not renewed in time"

log = logging.getLogger("landfall.keeper")


@dataclass(frozen=True, slots=True)
class KeeperOrder:
    """What a keeper works on."""

    tenures: str
    mounts: str
    samba: str
    samba_address: str
    samba_port: int
    samba_guest: bool
    nfs: str
    nfs_clients: tuple[str, ...]
    margin_s: float

    @property
    def folder(self) -> Path:
        """The folder of the tenures and of the keeper's locks."""
        return Path(self.tenures)


def ensure(order: KeeperOrder) -> None:
    """Return when a keeper is at work; DeviceBusy if none could be started."""
    if held_elsewhere(order.folder / "keeper"):
        return
    with open(order.folder / "keeper.log", "ab") as said:
        argv = [sys.executable, "-m", "agent.serving.keeper", json.dumps(to_document(order))]
        child = start(argv, stdout=said.fileno(), stderr=said.fileno())
    if not clock.wait_until(lambda: held_elsewhere(order.folder / "keeper") or child.poll() not in (None, 0), START_LIMIT_S):
        raise DeviceBusy("the keeper of the leases did not start", cause=str(order.folder / "keeper.log"))
    child.returncode = 0  # it outlives this process


def main() -> None:
    """Keep the leases until there is none."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    order = from_document(json.loads(sys.argv[1]), KeeperOrder)
    os.chdir("/")
    try:
        alone = lock_for_life(order.folder / "keeper", wait_s=HANDS_S)
    except DeviceBusy:
        return  # another is at work
    keep(order, Machine(), lambda: os._exit(0))
    os.close(alone)


def keep(order: KeeperOrder, machine: Machine, leave: Callable[[], NoReturn], *, every_s: float = EVERY_S) -> NoReturn:
    """Keep the leases until there is none, then ``leave``, which ends this process: it lets go of its locks with its life."""
    tenures = Tenures(order.folder)
    while True:
        _leave_if_idle(order, machine, tenures, leave)
        if _to_give_up(order, machine, tenures):
            _give_up(order, machine, tenures)
        clock.sleep(every_s)


def _leave_if_idle(order: KeeperOrder, machine: Machine, tenures: Tenures, leave: Callable[[], NoReturn]) -> None:
    """Leave where there is nothing to keep; decided while nobody can add something, so that no lease is without a keeper."""
    if any(wants_keeping(order, machine, tenures, tenure) for tenure in tenures.all()):
        return
    with contextlib.suppress(DeviceBusy), locked(order.folder / "gate", wait_s=0.0):
        if not any(wants_keeping(order, machine, tenures, tenure) for tenure in tenures.all()):
            leave()  # with both locks held to the end: whoever waits at the gate finds no keeper


def wants_keeping(order: KeeperOrder, machine: Machine, tenures: Tenures, tenure: Tenure) -> bool:
    """Whether there has to be a keeper for a tenure: it has a lease that has not ended, or something of it is left that should not be."""
    return tenure.lease_until_ns is not None and (tenures.ended(tenure) is None or _is_left(order, machine, tenure))


def _is_left(order: KeeperOrder, machine: Machine, tenure: Tenure) -> bool:
    """Whether something can still be reached or written to."""
    share = _share(order, tenure)
    if machine.mounts.is_writable(share.path) or (tenure.address and machine.addresses.is_held(addresses.parse(tenure.address))):
        return True
    return any(exporter.is_open(share) for exporter in (_samba(order, machine, tuple), _nfs(order)))


def _share(order: KeeperOrder, tenure: Tenure) -> Share:
    return Share(tenure.name, Path(order.mounts) / tenure.name)


def _samba(order: KeeperOrder, machine: Machine, addresses_left: Callable[[], tuple[str, ...]]) -> Smb:
    return machine.smb(Path(order.samba), order.samba_address, order.samba_port, order.samba_guest, addresses_left)


def _nfs(order: KeeperOrder) -> Nfs:
    return Nfs(Path(order.nfs), order.nfs_clients)


def _give_up(order: KeeperOrder, machine: Machine, tenures: Tenures) -> None:
    """Mark, end the exports, give up the addresses, make unwritable: whatever is over by now, and what is over when that is done.

    The leases of one management node end one right after the other: what other volumes had exported waits until none is left to give up.
    Whoever serves anew holds the same lock, but not for ever.
    """
    given_up: dict[UUID, Tenure] = {}
    samba = _samba(order, machine, lambda: _addresses_without(tenures, given_up))
    with contextlib.ExitStack() as hands:
        with contextlib.suppress(DeviceBusy):  # an agent that was stopped while it held them
            hands.enter_context(locked(order.folder / "hands", wait_s=HANDS_S))
        shared: tuple[Share, ...] = ()
        stopped = False
        with _going_on([], "what is exported could not be read"):
            shared = samba.shares()
        while over := [found for found in _to_give_up(order, machine, tenures) if found.volume not in given_up]:
            given_up |= {tenure.volume: tenure for tenure in over}
            first = [tenure for tenure in over if tenures.ended(tenure) is None]
            for tenure in first:
                tenures.mark_ended(tenure, REASON)
            # While a local program keeps a volume busy this comes again and again: no share of another volume is to suffer from that.
            stop = bool(first) or any(samba.is_open(_share(order, tenure)) for tenure in over)
            stopped = stopped or stop
            for tenure, how in zip(over, _end(order, machine, samba if stop else None, over), strict=True):
                if tenure in first:
                    tenures.mark_ended(tenure, f"{REASON}: {how}")
                    log.info("volume %s: %s: %s", tenure.name, REASON, how)
        names = {tenure.name for tenure in given_up.values()}
        if stopped and (others := tuple(share for share in shared if share.name not in names)):
            with _going_on([], "the other shares could not be exported again"):
                samba.export_all(others, limit_s=order.margin_s / 8)


def _to_give_up(order: KeeperOrder, machine: Machine, tenures: Tenures) -> list[Tenure]:
    """Return the tenures that are over, and of which something is left."""
    over = [tenure for tenure in tenures.all() if is_over(tenure, clock.boottime_ns(), order.margin_s)]
    return [tenure for tenure in over if tenures.ended(tenure) is None or _is_left(order, machine, tenure)]


def _end(order: KeeperOrder, machine: Machine, samba: Smb | None, over: list[Tenure]) -> list[str]:
    """Return in words what was done for each; none is reached by a client any more before the first is made unwritable.

    ``samba``: what is to be stopped; None where it exports nothing of this.
    """
    exports: list[str] = []
    if samba is not None:
        with _going_on(exports, "the exports could not be ended"):
            samba.stop(limit_s=HANDS_S)
            exports.append("exports ended")
    done = [list(exports) for _ in over]
    for tenure, words in zip(over, done, strict=True):
        if tenure.address:
            with _going_on(words, "the address could not be given up"):
                machine.addresses.remove(addresses.parse(tenure.address))
                words.append("address given up")
    nfs, until_s = _nfs(order), clock.monotonic_s() + order.margin_s / 8
    for tenure, words in zip(over, done, strict=True):
        with _going_on(words, "the NFS export could not be ended"):  # only now that nobody can ask whether it is there
            was_open = nfs.is_open(_share(order, tenure))
            nfs.close(_share(order, tenure), limit_s=until_s - clock.monotonic_s())
            words += ["NFS export ended"] if was_open else []
    ending = [
        machine.threads.beside(partial(machine.make_unwritable, _share(order, tenure).path, limit_s=order.margin_s / 5)) for tenure in over
    ]
    for ended, words in zip(ending, done, strict=True):
        with _going_on(words, "the volume could not be made unwritable"):
            words.append(ended())
    return [", ".join(words) for words in done]


def _addresses_without(tenures: Tenures, given_up: dict[UUID, Tenure]) -> tuple[str, ...]:
    gone = {tenure.address for tenure in given_up.values()}
    return tuple(str(addresses.parse(other.address).ip) for other in tenures.all() if other.address and other.address not in gone)


@contextlib.contextmanager
def _going_on(done: list[str], otherwise: str) -> Iterator[None]:
    try:
        yield
    except (LandfallError, OSError) as error:
        log.exception("%s", otherwise)
        done.append(f"{otherwise} ({error})")


if __name__ == "__main__":
    main()
