"""ARP and IPv6 neighbour discovery on raw sockets: who answers for an address, saying that we do, hearing who else does.

Frames: RFC 826 and RFC 5227 (ARP, probes, announcements), RFC 4861 and RFC 4862 (neighbour solicitation and advertisement, duplicate
address detection); packet(7). What we say carries a ``mark`` of MARK_BYTES where others look for nothing: behind the 28 bytes of ARP, in
what fills the frame up to Ethernet's least length; in an option of an experimental type (RFC 4727) behind an advertisement.
"""

from __future__ import annotations

import ctypes
import ipaddress
import selectors
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from agent.system.clock import monotonic_s

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MARK_BYTES: Final = 18
PROBES: Final = 3
_ETH_ARP, _ETH_IPV6 = 0x0806, 0x86DD
_BROADCAST: Final = b"\xff" * 6
_NOBODY: Final = bytes(6)
_ARP: Final = struct.Struct(">HHBBH6s4s6s4s")
_ICMPV6, _SOLICITATION, _ADVERTISEMENT = 58, 135, 136
_OVERRIDE: Final = 0x20000000
_TARGET_LINK: Final = b"\x02\x01"
_MARK_OPTION: Final = b"\xfd\x03"  # type 253, 3 units of 8 bytes
_SO_ATTACH_FILTER: Final = 26
_OUTGOING: Final = 4


@dataclass(frozen=True, slots=True)
class Link:
    """An Ethernet interface of this node."""

    index: int
    name: str
    mac: bytes


@dataclass(frozen=True, slots=True)
class Heard:
    """Somebody says that an address is at ``mac``. ``mark`` is what stood behind it."""

    address: Address
    mac: bytes
    mark: bytes


def announcement(address: Address, mac: bytes, mark: bytes) -> bytes:
    """Return the frame that tells everybody on the link that ``address`` is at ``mac``."""
    if isinstance(address, ipaddress.IPv4Address):
        arp = _ARP.pack(1, 0x0800, 6, 4, 1, mac, address.packed, _NOBODY, address.packed)
        return _BROADCAST + mac + struct.pack(">H", _ETH_ARP) + arp + mark
    everybody = ipaddress.IPv6Address("ff02::1")
    options = _TARGET_LINK + mac + _MARK_OPTION + mark + bytes(22 - MARK_BYTES)
    icmp = struct.pack(">BBHI", _ADVERTISEMENT, 0, 0, _OVERRIDE) + address.packed + options
    return _ipv6_frame(mac, b"\x33\x33\x00\x00\x00\x01", address, everybody, icmp)


def question(address: Address, mac: bytes) -> bytes:
    """Return the frame that asks who has ``address``, from somebody who has none yet."""
    if isinstance(address, ipaddress.IPv4Address):
        arp = _ARP.pack(1, 0x0800, 6, 4, 1, mac, bytes(4), _NOBODY, address.packed)
        return _BROADCAST + mac + struct.pack(">H", _ETH_ARP) + arp + bytes(MARK_BYTES)
    asked = ipaddress.IPv6Address(ipaddress.IPv6Address("ff02::1:ff00:0").packed[:13] + address.packed[13:])
    icmp = struct.pack(">BBHI", _SOLICITATION, 0, 0, 0) + address.packed
    return _ipv6_frame(mac, b"\x33\x33" + asked.packed[12:], ipaddress.IPv6Address(0), asked, icmp)


def heard(frame: bytes) -> Heard | None:
    """Return what a frame says about an address; None for one that says nothing of the kind, or is cut short."""
    kind = frame[12:14]
    if kind == struct.pack(">H", _ETH_ARP) and len(frame) >= 14 + _ARP.size:
        hardware, protocol, hardware_bytes, protocol_bytes, _, mac, sender, *_ = _ARP.unpack_from(frame, 14)
        if (hardware, protocol, hardware_bytes, protocol_bytes) != (1, 0x0800, 6, 4) or sender == bytes(4):
            return None
        return Heard(ipaddress.IPv4Address(sender), mac, frame[42 : 42 + MARK_BYTES])
    if kind != struct.pack(">H", _ETH_IPV6) or len(frame) < 78:
        return None
    if (frame[20], frame[21], frame[54]) == (_ICMPV6, 255, _ADVERTISEMENT):
        mac, mark, options = frame[6:12], b"", frame[78:]
        while len(options) >= 8 and options[1] and len(options) >= options[1] * 8:
            if options[:2] == _TARGET_LINK:
                mac = options[2:8]
            elif options[:2] == _MARK_OPTION:
                mark = options[2 : 2 + MARK_BYTES]
            options = options[options[1] * 8 :]
        return Heard(ipaddress.IPv6Address(frame[62:78]), mac, mark)
    return None


def say(link: Link, frame: bytes) -> None:
    """Send one frame."""
    with _raw(link, 0) as sending:
        sending.send(frame)


def answerer(link: Link, address: Address, *, wait_s: float = 0.4) -> bytes | None:
    """Return the hardware address of another node that has ``address``; None if none answers to any of PROBES questions."""
    with listening(link) as ears:
        for _ in range(PROBES):
            say(link, question(address, link.mac))
            until = monotonic_s() + wait_s
            while (left := until - monotonic_s()) > 0:
                for said in ears.within(left):
                    if said.address == address and said.mac != link.mac:
                        return said.mac
    return None


class Ears:
    """Raw sockets on one link that hear ARP and neighbour advertisements of others."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._sockets = [_raw(link, _ETH_ARP), _raw(link, _ETH_IPV6)]
        self._selector = selectors.DefaultSelector()
        _hear_advertisements_only(self._sockets[1])
        for raw in self._sockets:
            raw.setblocking(False)
            self._selector.register(raw, selectors.EVENT_READ, raw)

    def __enter__(self) -> Ears:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for raw in self._sockets:
            raw.close()

    def within(self, wait_s: float) -> Iterator[Heard]:
        """Yield what others said, after waiting up to ``wait_s`` for the first."""
        for key, _ in self._selector.select(wait_s):
            raw: socket.socket = key.data
            while True:
                try:
                    frame, about = raw.recvfrom(2048)
                except OSError:  # nothing more, or the link went down: it is heard again when it is up
                    break
                if about[2] != _OUTGOING and (said := heard(frame)) is not None and said.mac != self._link.mac:
                    yield said


def listening(link: Link) -> Ears:
    """Return ears on a link; a context."""
    return Ears(link)


def _raw(link: Link, protocol: int) -> socket.socket:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(protocol))
    raw.bind((link.name, protocol))
    return raw


def _hear_advertisements_only(raw: socket.socket) -> None:
    """Let the kernel pass on neighbour advertisements alone (bpf(4)): everything else of IPv6 may be gigabytes of data."""
    program = (
        (0x30, 0, 0, 20),  # next header
        (0x15, 0, 3, _ICMPV6),
        (0x30, 0, 0, 54),  # type
        (0x15, 0, 1, _ADVERTISEMENT),
        (0x06, 0, 0, 2048),
        (0x06, 0, 0, 0),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)))


def _ipv6_frame(mac: bytes, to: bytes, source: Address, target: Address, icmp: bytes) -> bytes:
    pseudo = source.packed + target.packed + struct.pack(">II", len(icmp), _ICMPV6)
    total = sum(struct.unpack(f">{len(pseudo + icmp) // 2}H", pseudo + icmp))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    icmp = icmp[:2] + struct.pack(">H", ~total & 0xFFFF) + icmp[4:]
    head = struct.pack(">IHBB", 0x60000000, len(icmp), _ICMPV6, 255) + source.packed + target.packed
    return to + mac + struct.pack(">H", _ETH_IPV6) + head + icmp
