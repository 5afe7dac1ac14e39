"""Rescues: single files from a generation that one node has, into the volume that the other serves."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID

from agent.contract.identity import GenerationId
from agent.contract.messages.generations import PlacedFile
from agent.contract.messages.transfers import TlsMaterial


@dataclass(frozen=True, slots=True)
class ReceiveFiles:
    """rescue.receive: open the data port for one order of files, on the node that serves the volume. Answers Listening.

    What is there already is replaced as PlacedFile says.
    """

    rescue: UUID
    volume: UUID
    files: tuple[PlacedFile, ...]
    untouched_since: GenerationId | None
    token: str = field(repr=False)
    tls: TlsMaterial
    silence_limit_s: float = 10.0


@dataclass(frozen=True, slots=True)
class SendFiles:
    """rescue.send: connect and send the same order of files from a generation. Answers progress lines, then Restored."""

    rescue: UUID
    generation: GenerationId
    files: tuple[PlacedFile, ...]
    address: str
    port: int
    token: str = field(repr=False)
    tls: TlsMaterial
    silence_limit_s: float = 10.0
    rate_limit_bytes_s: int = 0  # 0: none
