"""The service address between three nodes: taken once, said again and again, kept by the highest epoch; and what clients see of it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from agent.config import LEAST_MARGIN_S
from agent.contract import messages as m
from agent.contract.errors import AddressTaken, EpochStale, LeaseEnded, NodeUnreachable, NotPrimary, RequestRefused
from agent.contract.identity import FilesystemKind
from agent.serving import address as addresses
from agent.serving.address import Claim
from agent.system import neighbour
from agent.system.clock import monotonic_s, wait_until
from agent.system.run import run as start_program
from mgmt import run
from mgmt.inventory import read_inventory
from mgmt.lab import control, lifecycle
from mgmt.lab.layout import Lab, NodeName
from mgmt.lab.namespace import within
from mgmt.reach import ssh_node

MGMT, NAS1, NAS2 = NodeName
SERVICE, SERVICE6 = "10.77.0.100/24", "fd77::100/64"
VOLUME_BYTES = 64 << 20
LIMIT_S = 60.0
STRANGER = bytes.fromhex("02deadbeef01")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="landfall-serving-", dir="/var/tmp") as folder:
        made = Lab.at(Path(folder) / "lab")
        try:
            lifecycle.up(made, pool_size_bytes=1 << 30)
            yield made
        finally:
            lifecycle.down(made)


def ask(lab: Lab, node: NodeName, arguments: Any) -> Any:
    def asked() -> Any:
        inventory = read_inventory(lab.node(MGMT) / "etc" / "landfall.toml")
        with contextlib.closing(ssh_node(inventory.entry(node), term=1)) as agent:
            return agent.ask(arguments)

    return within(lab.namespace(MGMT), asked)


def facts(lab: Lab, node: NodeName, volume: UUID) -> m.VolumeFacts:
    found: m.VolumeFacts = next(held for held in ask(lab, node, m.ListVolumes()).volumes if held.id == volume)
    return found


@pytest.fixture
def volume(lab: Lab) -> Iterator[UUID]:
    """Yield a volume that NAS 1 serves and NAS 2 holds a replica of; served by nobody afterwards."""
    name = f"v{uuid4().hex[:8]}"

    def made() -> UUID:
        with run.Site(read_inventory(lab.node(MGMT) / "etc" / "landfall.toml")) as site:
            served = run.add_volume(site, name, filesystem=FilesystemKind.EXT4, size_bytes=VOLUME_BYTES, primary="nas1", secondary="nas2")
            run.replicate(site, name)
            return served.id

    found = within(lab.namespace(MGMT), made)
    yield found
    for node in (NAS1, NAS2):
        ask(lab, node, m.StopServing(found))


def said(lab: Lab, node: NodeName, kind: str, volume: UUID) -> list[str]:
    return [word.message for word in ask(lab, node, m.ReadOutbox()).notifications if word.kind == kind and word.volume == volume]


def eventually_said(lab: Lab, node: NodeName, kind: str, volume: UUID) -> str:
    assert wait_until(lambda: bool(said(lab, node, kind, volume)), LIMIT_S, every_s=0.2), f"{node} says nothing of {kind}"
    return said(lab, node, kind, volume)[0]


def clients_see(lab: Lab, address: str, share: str) -> bool:
    words = ["smbclient", f"//{address}/{share}", "-N", "-c", "ls"]
    return start_program(lifecycle.inside(lab, MGMT, words), ok=range(256)).status == 0


def link_of(lab: Lab, node: NodeName) -> neighbour.Link:
    return within(lab.namespace(node), lambda: addresses.link_with(node.address))


def has(lab: Lab, node: NodeName, address: str) -> bool:
    return within(lab.namespace(node), lambda: addresses.is_held(addresses.parse(address)))


def shout(lab: Lab, address: str, mac: bytes, mark: bytes) -> None:
    """Say from the management node's link that an address is at ``mac``."""
    frame = neighbour.announcement(addresses.parse(address).ip, mac, mark)
    link = link_of(lab, MGMT)
    within(lab.namespace(MGMT), lambda: neighbour.say(link, frame))


@pytest.mark.parametrize("address", [SERVICE, SERVICE6], ids=["ipv4", "ipv6"])
def test_I7_a_primary_has_the_address_and_clients_find_the_share_there(lab: Lab, volume: UUID, address: str) -> None:
    ip, name = address.partition("/")[0], facts(lab, NAS1, volume).name
    with pytest.raises(NotPrimary):
        ask(lab, NAS2, m.TakeAddress(volume, address))
    assert not has(lab, NAS2, address)
    for _ in range(2):
        ask(lab, NAS1, m.TakeAddress(volume, address))
        assert has(lab, NAS1, address)
    assert facts(lab, NAS1, volume).address == address
    assert clients_see(lab, ip, name)
    with pytest.raises(RequestRefused):
        ask(lab, NAS1, m.TakeAddress(volume, "10.77.0.102/24"))
    restart_agent(lab)
    assert clients_see(lab, ip, name), "a restart of the agent is none of the clients' business"
    assert facts(lab, NAS1, volume).address == address
    for _ in range(2):
        assert not ask(lab, NAS1, m.StopServing(volume)).serving
        assert not has(lab, NAS1, address)
    ask(lab, NAS1, m.TakeAddress(volume, address))
    ask(lab, NAS1, m.ServeVolume(volume, 1))
    assert clients_see(lab, ip, name), "at a failover the address comes first"
    for _ in range(2):
        ask(lab, NAS1, m.DropAddress(volume, address))
        assert not has(lab, NAS1, address)
    assert facts(lab, NAS1, volume).serving


def restart_agent(lab: Lab) -> None:
    control.kill_service(lab, NAS1, "agent")
    control.start_service(lab, NAS1, "agent")


@pytest.mark.parametrize("address", [SERVICE, SERVICE6], ids=["ipv4", "ipv6"])
def test_I5_an_address_that_somebody_has_is_not_taken(lab: Lab, volume: UUID, address: str) -> None:
    link = link_of(lab, MGMT)
    within(lab.namespace(MGMT), lambda: addresses.add(link, addresses.parse(address)))
    try:
        with pytest.raises(AddressTaken, match="another node") as refused:
            ask(lab, NAS1, m.TakeAddress(volume, address))
        assert link.mac.hex(":") in refused.value.cause
    finally:
        within(lab.namespace(MGMT), lambda: addresses.remove(addresses.parse(address)))
    assert not has(lab, NAS1, address)
    assert facts(lab, NAS1, volume).address == ""


@pytest.mark.parametrize("address", [SERVICE, SERVICE6], ids=["ipv4", "ipv6"])
def test_I6_where_the_address_is_is_said_five_times(lab: Lab, volume: UUID, address: str) -> None:
    link = link_of(lab, MGMT)

    def hear() -> list[int | None]:
        with neighbour.listening(link) as ears:
            ask(lab, NAS1, m.TakeAddress(volume, address))
            until, heard = monotonic_s() + LIMIT_S, list[int | None]()
            while len(heard) < addresses.ANNOUNCEMENTS and monotonic_s() < until:
                heard += [addresses.epoch_of(word, volume) for word in ears.within(1.0) if word.address == addresses.parse(address).ip]
            return heard

    heard = within(lab.namespace(MGMT), hear)
    assert heard[: addresses.ANNOUNCEMENTS].count(1) == addresses.ANNOUNCEMENTS


@pytest.mark.parametrize("address", [SERVICE, SERVICE6], ids=["ipv4", "ipv6"])
def test_I5_I17_a_stranger_with_the_address_is_told_of_and_nobody_gives_up(lab: Lab, volume: UUID, address: str) -> None:
    ask(lab, NAS1, m.TakeAddress(volume, address))
    ip = addresses.parse(address).ip
    forged = (
        bytes(neighbour.MARK_BYTES),
        Claim(uuid4(), 9).mark(ip, STRANGER),  # who does not know the volume
        Claim(volume, 9).mark(ip, bytes(6)),  # another's claim, from another address
        Claim(volume, 1).mark(ip, STRANGER),  # no higher epoch
    )
    link = link_of(lab, MGMT)

    def defended() -> bool:
        with neighbour.listening(link) as ears:
            for mark in forged:
                shout(lab, address, STRANGER, mark)
            until = monotonic_s() + LIMIT_S
            while monotonic_s() < until:
                if any(addresses.epoch_of(word, volume) == 1 and word.mac != STRANGER for word in ears.within(1.0)):
                    return True
            return False

    assert within(lab.namespace(MGMT), defended)
    assert STRANGER.hex(":") in eventually_said(lab, NAS1, "address-conflict", volume)
    assert facts(lab, NAS1, volume).serving
    assert has(lab, NAS1, address)
    assert not said(lab, NAS1, "overtaken", volume)


def test_I5_both_have_the_address_and_the_lower_epoch_gives_up(lab: Lab, volume: UUID) -> None:
    """NAS 1 was cut off and goes on; NAS 2 is promoted. When the link is back, they hear of each other."""
    ask(lab, NAS1, m.TakeAddress(volume, SERVICE))
    name = facts(lab, NAS1, volume).name
    lifecycle.cut(lab, NAS1, NAS2)
    lifecycle.cut(lab, NAS1, MGMT)
    try:
        ask(lab, NAS2, m.PromoteVolume(volume, 2))
        ask(lab, NAS2, m.TakeAddress(volume, SERVICE))
        ask(lab, NAS2, m.ServeVolume(volume, 2))
        assert has(lab, NAS1, SERVICE)
        assert clients_see(lab, "10.77.0.100", name)
    finally:
        lifecycle.heal(lab, NAS1, NAS2)
        lifecycle.heal(lab, NAS1, MGMT)
    assert wait_until(lambda: not has(lab, NAS1, SERVICE), LIMIT_S, every_s=0.2), "the overtaken node keeps the address"
    assert "at epoch 2" in eventually_said(lab, NAS1, "overtaken", volume)
    assert wait_until(lambda: not facts(lab, NAS1, volume).serving, LIMIT_S, every_s=0.2)
    assert has(lab, NAS2, SERVICE)
    assert facts(lab, NAS2, volume).serving
    assert clients_see(lab, "10.77.0.100", name)
    assert eventually_said(lab, NAS1, "link-down", volume)
    assert eventually_said(lab, NAS1, "link-up", volume)


TAKING = ("address.before_take=kill", "address.recorded=kill", "address.after_take=kill")
DROPPING = ("address.before_drop=kill", "address.after_drop=kill")


@pytest.mark.parametrize("point", [*TAKING, *DROPPING])
def test_I7_the_agent_dies_when_it_takes_or_drops_an_address(lab: Lab, volume: UUID, point: str) -> None:
    """Asked again it goes on, and it knows what it has."""
    order = m.TakeAddress(volume, SERVICE) if point in TAKING else m.DropAddress(volume, SERVICE)
    if point in DROPPING:
        ask(lab, NAS1, m.TakeAddress(volume, SERVICE))
    control.kill_service(lab, NAS1, "agent")
    control.start_service(lab, NAS1, "agent", {"LANDFALL_ALLOW_FAILPOINTS": "1", "LANDFALL_FAILPOINTS": point})
    with pytest.raises(NodeUnreachable):
        ask(lab, NAS1, order)
    control.start_service(lab, NAS1, "agent")
    assert has(lab, NAS1, SERVICE) <= (facts(lab, NAS1, volume).address == SERVICE), "no address that it does not know of"
    ask(lab, NAS1, order)
    assert has(lab, NAS1, SERVICE) is (point in TAKING)
    assert facts(lab, NAS1, volume).address == (SERVICE if point in TAKING else "")
    assert facts(lab, NAS1, volume).serving


LEASE_S = 22.0
HELD_S = 5.0
"""So long before the end of its lease a volume has been given up."""
WRITER = """
import os, sys, time
with open(sys.argv[1], "wb", buffering=0) as file:
    sys.stdout.write("open")
    sys.stdout.flush()
    while True:
        file.write(b"x")
        time.sleep(0.01)
"""


def agent_pid(lab: Lab) -> str:
    return str(next(service.pid for service in control.services(lab, NAS1) if service.name == "agent"))


def is_writable(lab: Lab, facts_before: m.VolumeFacts) -> bool:
    """Ask the node's kernel, not its agent."""
    words = ["touch", f"{facts_before.mount_point}/touched"]
    mounted = start_program(lifecycle.inside(lab, NAS1, ["mountpoint", "-q", facts_before.mount_point]), ok=range(256)).status == 0
    return mounted and start_program(lifecycle.inside(lab, NAS1, words), ok=range(256)).status == 0


@pytest.mark.parametrize("agent", ["running", "stopped", "killed"])
def test_A13_I2_I4_a_lease_that_is_not_renewed_ends_in_time_whatever_became_of_the_agent(lab: Lab, volume: UUID, agent: str) -> None:
    ask(lab, NAS1, m.TakeAddress(volume, SERVICE))
    before = facts(lab, NAS1, volume)
    asked = monotonic_s()
    lease = ask(lab, NAS1, m.RenewLease(volume, 1, LEASE_S))
    assert 0 < lease.remaining_s <= LEASE_S
    assert 0 < (facts(lab, NAS1, volume).lease_s or 0) <= LEASE_S
    pid = agent_pid(lab)
    if agent == "stopped":
        program(lab, ["kill", "-STOP", pid])
    elif agent == "killed":
        control.kill_service(lab, NAS1, "agent")
    assert is_writable(lab, before)
    assert clients_see(lab, "10.77.0.100", before.name)
    assert wait_until(lambda: not is_writable(lab, before), LIMIT_S, every_s=0.1), "clients can write for ever"
    ended_s = monotonic_s() - asked
    assert not has(lab, NAS1, SERVICE)
    assert not clients_see(lab, NAS1.address, before.name)
    assert ended_s > 5.0, "a lease was cut short"
    assert ended_s < LEASE_S - HELD_S + lease_began_s(lease), f"it ended {ended_s:.1f} s after a lease of {LEASE_S:g} s was asked for"
    if agent == "stopped":
        program(lab, ["kill", "-CONT", pid])
    elif agent == "killed":
        control.start_service(lab, NAS1, "agent")
    assert "not renewed in time" in eventually_said(lab, NAS1, "lease-ended", volume)
    after = facts(lab, NAS1, volume)
    assert (after.serving, after.confirmed, after.address, after.lease_s) == (False, False, "", None)
    for order in (m.RenewLease(volume, 1, LEASE_S), m.TakeAddress(volume, SERVICE)):
        with pytest.raises(LeaseEnded):
            ask(lab, NAS1, order)
    assert not is_writable(lab, before)
    again = ask(lab, NAS1, m.ServeVolume(volume, 1, 60.0))
    assert again.serving
    assert again.confirmed
    ask(lab, NAS1, m.TakeAddress(volume, SERVICE))
    assert clients_see(lab, "10.77.0.100", before.name)


def lease_began_s(lease: m.Lease) -> float:
    """Return how long before its answer a lease began."""
    return LEASE_S - lease.remaining_s


def program(lab: Lab, argv: list[str]) -> None:
    start_program(lifecycle.inside(lab, NAS1, argv))


def test_I4_a_local_process_that_writes_does_not_keep_the_volume_writable(lab: Lab, volume: UUID) -> None:
    before = facts(lab, NAS1, volume)
    words = lifecycle.inside(lab, NAS1, [sys.executable, "-c", WRITER, f"{before.mount_point}/open"])
    writer = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert writer.stdout is not None
        assert writer.stdout.read(4) == b"open"
        ask(lab, NAS1, m.RenewLease(volume, 1, LEASE_S))
        assert writer.wait(LIMIT_S) != 0, "the write went on"
        assert not is_writable(lab, before)
    finally:
        writer.kill()
        writer.wait()
    assert "in use" in eventually_said(lab, NAS1, "lease-ended", volume)
    assert wait_until(lambda: not facts(lab, NAS1, volume).serving, LIMIT_S, every_s=0.2), "unmounted when nobody uses it any more"
    assert ask(lab, NAS1, m.ServeVolume(volume, 1)).serving
    assert is_writable(lab, before)


def test_a_lease_is_renewed_and_one_that_is_too_short_is_refused(lab: Lab, volume: UUID) -> None:
    for seconds in (0.0, 1.0, LEAST_MARGIN_S, 1e9, float("-inf")):
        with pytest.raises(RequestRefused):
            ask(lab, NAS1, m.RenewLease(volume, 1, seconds))
    with pytest.raises(EpochStale):
        ask(lab, NAS1, m.RenewLease(volume, 2, LEASE_S))
    with pytest.raises(NotPrimary):
        ask(lab, NAS2, m.RenewLease(volume, 1, LEASE_S))
    assert facts(lab, NAS1, volume).lease_s is None
    until = monotonic_s() + LEASE_S
    while monotonic_s() < until:
        ask(lab, NAS1, m.RenewLease(volume, 1, LEASE_S))
    assert facts(lab, NAS1, volume).serving


def test_I3_a_node_that_was_booted_serves_nothing_until_it_is_told_to(lab: Lab, volume: UUID) -> None:
    ask(lab, NAS1, m.TakeAddress(volume, SERVICE))
    before = facts(lab, NAS1, volume)
    assert before.confirmed
    lifecycle.kill(lab, NAS1)
    lifecycle.start_node(lab, NAS1)
    booted = facts(lab, NAS1, volume)
    assert (booted.role, booted.epoch, booted.serving, booted.confirmed, booted.address) == (m.Role.PRIMARY, 1, False, False, "")
    assert not has(lab, NAS1, SERVICE)
    assert not clients_see(lab, NAS1.address, before.name)
    with pytest.raises(LeaseEnded):
        ask(lab, NAS1, m.RenewLease(volume, 1, LEASE_S))
    with pytest.raises(EpochStale):
        ask(lab, NAS1, m.ServeVolume(volume, 2))
    served = ask(lab, NAS1, m.ServeVolume(volume, 1))
    assert served.confirmed
    assert clients_see(lab, NAS1.address, before.name)


def test_J10_addresses_that_are_none_are_refused(lab: Lab, volume: UUID) -> None:
    for text in ("10.77.0.100", "10.77.0.0/24", "10.77.0.255/24", "127.0.0.1/8", "224.0.0.1/4", "nas1/24", "fe80::1/64", "x; reboot", ""):
        with pytest.raises(RequestRefused):
            ask(lab, NAS1, m.TakeAddress(volume, text))
    with pytest.raises(RequestRefused):
        ask(lab, NAS1, m.DropAddress(volume, "10.77.0.11/24"))
    assert has(lab, NAS1, "10.77.0.11/24")
