"""Who is who: volumes, generations and transfers are known by identity, never by path, device name or clock."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from agent.contract.errors import NameRefused

BLOCK_BYTES = 4096
"""Bytes of a block everywhere in Landfall: of volumes, differentials and digests."""

_SHARES_OF_SAMBA = frozenset({"global", "homes", "printers"})  # smb.conf(5), "Special sections"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,63}")


class FilesystemKind(StrEnum):
    """Filesystems an operational volume may hold."""

    EXT4 = "ext4"
    XFS = "xfs"


class GenerationKind(StrEnum):
    """How a generation came to be."""

    EMPTY = "empty"  # g0: the base of a first transfer, all holes
    FROZEN = "frozen"  # taken from the operational volume under a freeze
    COMMITTED = "committed"  # received whole: equal to the peer's frozen generation, block by block
    SALVAGED = "salvaged"  # base plus whole files: consistent, labelled, equal to no frozen generation
    KEPT = "kept"  # what an overtaken primary still held when it was demoted: for comparing only, never a base


@dataclass(frozen=True, slots=True)
class GenerationId:
    """One frozen point in time of a volume. A base matches only if all four fields do.

    ``counter`` counts generations of the volume (64 bit, never a clock); g0 is the empty volume with nonce of zeros.
    ``nonce`` is 128 random bits in hex: two generations with the same counter on diverged nodes still differ.
    """

    volume: UUID
    epoch: int
    counter: int
    nonce: str

    @property
    def name(self) -> str:
        """Name of this generation's files and the word shown to people, such as ``g00000007-5f3a9c21``."""
        return f"g{self.counter:08d}-{self.nonce[:8]}"


def empty_generation(volume: UUID) -> GenerationId:
    """Return g0 of a volume: no data, known to every node without being told."""
    return GenerationId(volume, 0, 0, "0" * 32)


def next_generation(volume: UUID, epoch: int, newest_counter: int) -> GenerationId:
    """Return a fresh identity after ``newest_counter``."""
    return GenerationId(volume, epoch, newest_counter + 1, secrets.token_hex(16))


def plain_name(text: str) -> str:
    """Return ``text`` if it is fit to name a volume or node; NameRefused otherwise.

    The rule is lvm2's, without the leading hyphen, so that a name is never an option, a path or shell syntax.
    """
    if not _PLAIN_NAME.fullmatch(text) or text in {".", ".."}:
        raise NameRefused(f"{text!r} cannot name a volume or a node")
    return text


def volume_name(text: str) -> str:
    """Return ``text`` if it is fit to name a volume, which is also its share; NameRefused otherwise."""
    if plain_name(text).lower() in _SHARES_OF_SAMBA:
        raise NameRefused(f"{text!r} cannot name a volume: to Samba it is no share like others", fix="Choose another name.")
    return text
