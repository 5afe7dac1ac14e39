"""The address at which clients find a volume: on one node at a time, the one of the highest epoch.

A node that takes an address asks first whether somebody has it, and then says several times that it has it, since one frame can get lost.
What it says carries a claim: its epoch, proved by a digest that only who knows the volume's identity can make. So a node that was overtaken
and hears of a higher epoch gives up, and a stranger who says the same (ARP spoofing) is told of and does not make anybody give up.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import struct
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from agent.contract.errors import AddressTaken, CommandFailed, RequestRefused
from agent.system import neighbour
from agent.system.neighbour import Address, Heard, Link

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

ANNOUNCEMENTS: Final = 5
ANNOUNCE_EVERY_S: Final = 1.0
_MAGIC: Final = b"LF"
_DIGEST_BYTES: Final = 8
_IFA_F_NODAD: Final = 0x02
_FOREVER: Final = 0xFFFFFFFF


def parse(text: str) -> Interface:
    """Return a service address; RequestRefused unless it is a host's address with its prefix length, such as ``192.0.2.100/24``."""
    try:
        found = ipaddress.ip_interface(text)
    except ValueError as error:
        raise RequestRefused(f"{text!r} is no address with a prefix length", cause=str(error)) from error
    ip, network = found.ip, found.network
    whole = network.prefixlen >= network.max_prefixlen - 1
    is_edge = not whole and ip in {network.network_address, *([network.broadcast_address] if ip.version == 4 else [])}
    if "/" not in text or is_edge or ip.is_multicast or ip.is_loopback or ip.is_unspecified or ip.is_link_local:
        raise RequestRefused(f"{text} cannot be a service address", fix="Name a host's address with its prefix length: 192.0.2.100/24.")
    return found


@dataclass(frozen=True, slots=True)
class Claim:
    """What stands behind an announcement: of which volume, in which epoch."""

    volume: UUID
    epoch: int

    def mark(self, address: Address, mac: bytes) -> bytes:
        """Return the claim as the mark of a frame that says ``address`` is at ``mac``."""
        return _MAGIC + struct.pack(">Q", self.epoch) + self._digest(address, mac)

    def _digest(self, address: Address, mac: bytes) -> bytes:
        message = b"landfall claim" + address.packed + mac + struct.pack(">Q", self.epoch)
        return hmac.digest(self.volume.bytes, message, hashlib.sha256)[:_DIGEST_BYTES]


def epoch_of(said: Heard, volume: UUID) -> int | None:
    """Return the epoch that somebody claims a volume's address in; None if what he says proves none."""
    if len(said.mark) != neighbour.MARK_BYTES or said.mark[:2] != _MAGIC:
        return None
    (epoch,) = struct.unpack(">Q", said.mark[2:10])
    proved = hmac.compare_digest(said.mark, Claim(volume, epoch).mark(said.address, said.mac))
    return int(epoch) if proved else None


def link_with(replication_address: str, name: str = "") -> Link:
    """Return the interface called ``name``, or without a name the one that has the replication address. CommandFailed if there is none."""
    with IPRoute() as links:
        named = [link["index"] for link in links.get_links() if link.get("ifname") == name]
        found = named if name else _with_address(links, replication_address)
        for link in links.get_links(found[0]) if found else ():
            return Link(link["index"], link.get("ifname"), bytes.fromhex(str(link.get("address", "")).replace(":", "")))
    wanted = name or f"with the address {replication_address}"
    raise CommandFailed(f"there is no interface {wanted}", fix="Correct `service_interface` in agent.toml, or bring the interface up.")


def is_held(address: Interface) -> bool:
    """Whether this node has the address on one of its interfaces."""
    with IPRoute() as links:
        return bool(_with_address(links, str(address.ip)))


def refuse_taken(link: Link, address: Interface) -> None:
    """AddressTaken if another node on the link answers for the address."""
    mac = neighbour.answerer(link, address.ip)
    if mac is not None:
        raise AddressTaken(f"{address.ip} is held by another node on {link.name}", cause=f"{mac.hex(':')} answers for it")


def add(link: Link, address: Interface) -> None:
    """Have the address, if this node does not have it already. Nobody is told yet."""
    if is_held(address):
        return
    more = {"flags": _IFA_F_NODAD, "preferred_lft": 0, "valid_lft": _FOREVER} if address.version == 6 else {}
    with IPRoute() as links:  # never preferred: what this node itself begins comes from its own address
        links.addr("add", index=link.index, address=str(address.ip), prefixlen=address.network.prefixlen, **more)


def remove(address: Interface) -> None:
    """Have the address no more."""
    with IPRoute() as links:
        for index in _with_address(links, str(address.ip)):
            try:
                links.addr("del", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
            except NetlinkError as error:
                if is_held(address):
                    raise CommandFailed(f"{address} cannot be given up", cause=str(error)) from error


def announce(link: Link, address: Interface, claim: Claim) -> None:
    """Say once to everybody on the link where the address is."""
    neighbour.say(link, neighbour.announcement(address.ip, link.mac, claim.mark(address.ip, link.mac)))


def _with_address(links: IPRoute, address: str) -> list[int]:
    wanted = ipaddress.ip_address(address)
    return [found["index"] for found in links.get_addr() if ipaddress.ip_address(found.get("address") or found.get("local")) == wanted]
