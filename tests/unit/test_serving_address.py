"""What service addresses may be, what frames say, and who gives an address up."""

from __future__ import annotations

import ipaddress
from uuid import uuid4

import pytest

from agent.contract.errors import RequestRefused
from agent.service.addresses import decide
from agent.serving.address import Claim, epoch_of, parse
from agent.system.neighbour import MARK_BYTES, Heard, announcement, heard, question

MAC, OTHER = bytes.fromhex("02000000000a"), bytes.fromhex("02000000000b")
ADDRESSES = [ipaddress.ip_address("10.77.0.100"), ipaddress.ip_address("fd77::100")]


@pytest.mark.parametrize("text", ["192.0.2.100/24", "192.0.2.1/31", "192.0.2.9/32", "2001:db8::1/64", "2001:db8::1/128"])
def test_addresses_of_hosts_are_taken(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "192.0.2.100",
        "192.0.2.0/24",
        "192.0.2.255/24",
        "127.0.0.1/8",
        "224.0.0.9/24",
        "0.0.0.0/0",
        "::1/128",
        "fe80::1/64",
        "a/24",
        "",
        "1/24",
    ],
)
def test_J10_others_are_refused(text: str) -> None:
    with pytest.raises(RequestRefused):
        parse(text)


@pytest.mark.parametrize("address", ADDRESSES, ids=["ipv4", "ipv6"])
def test_an_announcement_is_heard_as_it_was_said(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    volume = uuid4()
    frame = announcement(address, MAC, Claim(volume, 7).mark(address, MAC))
    said = heard(frame)
    assert said is not None
    assert (said.address, said.mac, epoch_of(said, volume)) == (address, MAC, 7)
    assert len(frame) >= 60, "Ethernet's least length: nothing is added behind the mark"
    assert heard(question(address, MAC)) is None, "a question says nothing of who has it"
    for length in range(len(frame)):
        heard(frame[:length])


@pytest.mark.parametrize("address", ADDRESSES, ids=["ipv4", "ipv6"])
def test_I17_a_claim_proves_nothing_for_another_volume_address_or_node(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    volume = uuid4()
    mark = Claim(volume, 7).mark(address, MAC)
    assert epoch_of(Heard(address, MAC, mark), volume) == 7
    assert epoch_of(Heard(address, MAC, mark), uuid4()) is None
    assert epoch_of(Heard(address, OTHER, mark), volume) is None
    assert epoch_of(Heard(ADDRESSES[0] if address is ADDRESSES[1] else ADDRESSES[1], MAC, mark), volume) is None
    assert epoch_of(Heard(address, MAC, mark[:-1]), volume) is None
    for at in range(MARK_BYTES):
        flipped = bytes(byte ^ (1 if place == at else 0) for place, byte in enumerate(mark))
        assert epoch_of(Heard(address, MAC, flipped), volume) is None


def test_I5_only_a_proved_higher_epoch_makes_a_node_give_up() -> None:
    assert [decide(3, claimed) for claimed in (None, 0, 2, 3, 4, 1 << 63)] == [False, False, False, False, True, True]
