"""Kill at random bytes: on every filesystem, by every kind of death, in both differential modes. 0 false, 0 missed, 0 untouched differ.

From each crash state salvage and resume both run, on copies; a resume ends in a volume that is byte-identical to the source's generation.
"""

from __future__ import annotations

import os
import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from agent.contract import messages as m
from agent.contract.errors import LandfallError
from mgmt.drill.scenario import Fault
from mgmt.lab.proxy import Action, Direction, Endpoint, Event, Proxy, Trigger
from tests.faults.case import Case, Followed, follow
from tests.faults.rig import Pair

POSITIONS = int(os.environ.get("LANDFALL_KILL_POSITIONS", "200"))
"""In all, over filesystems, kinds and modes."""

KINDS = (
    Fault.SOURCE_AGENT_KILLED,
    Fault.SOURCE_POWER_CUT,
    Fault.LINK_CUT,
    Fault.RECEIVER_AGENT_KILLED,
    Fault.RECEIVER_POWER_CUT,
)
MODES = tuple(m.Differential)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_A6_D1_killed_at_200_random_bytes(ext4_case: Case, xfs_case: Case) -> None:
    with ThreadPoolExecutor(2) as side_by_side:  # one filesystem each; they share nothing
        done = list(side_by_side.map(_killed_in_both_modes, (ext4_case, xfs_case)))
    assert sum(done) >= POSITIONS


def _killed_in_both_modes(case: Case) -> int:
    """Return how many crashes of this filesystem were followed to both of their ends."""
    each = -(-POSITIONS // (2 * len(MODES)))
    return sum(_killed(case, differential, each) for differential in MODES)


def _killed(case: Case, differential: m.Differential, each: int) -> int:
    total = _bytes_of_whole_transfer(case, differential)
    generator = random.Random(f"{case.filesystem} {differential}")
    partly = 0
    for number in range(each):
        kind = KINDS[number % len(KINDS)]
        position = generator.randrange(1, total)
        pair = case.fresh()
        with_words = f"seed {case.filesystem} {differential}, number {number}: {kind} at byte {position} of {total}"
        try:
            _die(case, pair, differential, kind, position)
            followed = follow(case, pair, differential)
        except BaseException as error:
            error.add_note(with_words)
            error.add_note(pair.nas1.log()[-2000:])
            error.add_note(pair.nas2.log()[-2000:])
            raise
        partly += _is_partial(followed)
    assert partly > each // 4, f"too few of the crashes fell between: {partly} of {each}"
    return each


def _is_partial(followed: Followed) -> bool:
    return followed.salvaged and 0 < followed.recovered < followed.changed


def _bytes_of_whole_transfer(case: Case, differential: m.Differential) -> int:
    """Return the bytes that an undisturbed transfer sends."""
    pair = case.fresh()
    pair.nas1.start()
    pair.nas2.start()
    proxies: list[Proxy] = []

    def route(address: str, port: int) -> tuple[str, int]:
        proxy = Proxy(Endpoint(address, 0), Endpoint(address, port))
        proxies.append(proxy.__enter__())
        return proxy.endpoint.host, proxy.endpoint.port

    try:
        case.send(pair, differential, route=route)
        return proxies[0].forwarded(Direction.UPSTREAM)
    finally:
        pair.nas1.kill()
        pair.nas2.kill()
        for proxy in proxies:
            proxy.__exit__(None, None, None)


def _die(case: Case, pair: Pair, differential: m.Differential, kind: Fault, position: int) -> None:
    """Start a transfer and let ``kind`` happen after ``position`` bytes of it."""
    pair.nas1.start()
    pair.nas2.start()
    reached: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    proxies: list[Proxy] = []

    def route(address: str, port: int) -> tuple[str, int]:
        proxy = Proxy(
            Endpoint(address, 0),
            Endpoint(address, port),
            trigger=Trigger(position, Action.SIGNAL),
            on_event=lambda event: reached.put(event) if event.action is Action.SIGNAL else None,
        )
        proxies.append(proxy.__enter__())
        return proxy.endpoint.host, proxy.endpoint.port

    def send() -> None:
        with suppress(LandfallError, OSError):
            case.send(pair, differential, route=route, silence_limit_s=1.0)
        reached.put(None)

    sending = threading.Thread(target=send)
    sending.start()
    try:
        event = reached.get(timeout=60)
        if event is None:
            return  # TLS's own padding made this transfer a little shorter than the measured one: it is committed
        match kind:
            case Fault.SOURCE_AGENT_KILLED | Fault.SOURCE_POWER_CUT:
                pair.nas1.kill()
                if kind is Fault.SOURCE_AGENT_KILLED:
                    proxies[0].cut()
                _await_interruption(case, pair)
            case Fault.LINK_CUT:
                _await_interruption(case, pair)
            case Fault.RECEIVER_AGENT_KILLED:
                pair.nas2.kill()
            case Fault.RECEIVER_POWER_CUT:
                pair.nas2.kill()
                case.pool2.lose_power()
    finally:
        pair.nas1.kill()
        pair.nas2.kill()
        sending.join(30)
        assert not sending.is_alive()
        for proxy in proxies:
            proxy.__exit__(None, None, None)


def _await_interruption(case: Case, pair: Pair) -> None:
    """Wait for NAS 2's reception failure notification."""
    outbox: m.Outbox = pair.nas2.ask(m.ReadOutbox(0, 20.0))
    assert [said.kind for said in outbox.notifications] == ["reception-failure"]
    assert outbox.notifications[0].transfer == case.transfer
