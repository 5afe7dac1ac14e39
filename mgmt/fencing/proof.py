"""A fence run and judged. Lying, silent and babbling programs prove nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol
from uuid import UUID

from agent.contract.errors import CommandFailed, ProgramMissing
from agent.system.clock import monotonic_s, wall_ns
from agent.system.run import Output, run
from mgmt.fencing.kinds import FenceKind
from mgmt.fencing.protocol import MAX_LINE_BYTES, FenceCode, FenceRequest

ENDED_HOWEVER: Final = range(-64, 256)


class Program(Protocol):
    """Runs a program to its end, as agent.system.run does."""

    def __call__(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes, ok: Sequence[int]) -> Output: ...


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a fence said and whether it proves that nobody writes the volume at ``epoch`` or below on ``node``."""

    agent: str
    node: str
    volume: UUID
    epoch: int
    code: int
    proved: bool
    words: str
    at_ns: int
    seconds: float


def program_of(kind: FenceKind, own: tuple[str, ...]) -> tuple[str, ...]:
    """Return the argument list of a fence; ``own`` is the operator's, for `command`."""
    return own if kind is FenceKind.COMMAND else (sys.executable, "-m", f"mgmt.fencing.{kind.value.replace('-', '_')}")


def fence(kind: FenceKind, argv: tuple[str, ...], request: FenceRequest, limit_s: float, program: Program = run) -> Evidence:
    """Return what the program ``argv`` did and said within ``limit_s``. Never raises for what a program does.

    If we die here the node is fenced or not, and nobody knows: the next run fences again, which does no harm.
    """
    begun = monotonic_s()
    try:
        output = program(argv, stdin=request.line(), timeout_s=limit_s, ok=ENDED_HOWEVER)
        code, proved, words = judge(request, output.status, output.stdout, output.stderr)
    except CommandFailed:
        code, proved, words = FenceCode.TOO_LATE, False, f"it did not end within {limit_s:g} s"
    except (ProgramMissing, OSError) as error:
        code, proved, words = FenceCode.REFUSED, False, f"{argv[0]} cannot be run: {error}"
    return Evidence(kind.value, request.node, request.volume, request.epoch, code, proved, words, wall_ns(), monotonic_s() - begun)


def judge(request: FenceRequest, status: int, stdout: bytes, stderr: bytes) -> tuple[int, bool, str]:
    """Return the code, whether it is a proof, and the words for a person. Pure."""
    said = _said(stdout)
    if status != FenceCode.FENCED:
        known = FenceCode(status).sentence if status in set(FenceCode) else f"it ended with status {status}, which says nothing"
        own = said.get("words") if said else stderr.decode("utf-8", "replace").strip()[-500:]
        return status, False, f"{known}: {own}" if own else known
    if said is None:
        return status, False, "it says that it fenced, without the line that proves it"
    about = (said.get("node"), said.get("volume"), said.get("epoch"))
    if about != (request.node, str(request.volume), request.epoch) or isinstance(said.get("epoch"), bool):
        return status, False, f"its proof is of something else: node, volume and epoch are {about}"
    proof = said.get("proof")
    if not isinstance(proof, str) or not proof.strip():
        return status, False, "it says that it fenced, and gives no proof"
    return status, True, proof.strip()


def _said(stdout: bytes) -> dict[str, object] | None:
    """Return the one JSON object that a program said; None if it said anything else."""
    if len(stdout) > MAX_LINE_BYTES or len(stdout.strip().splitlines()) != 1:
        return None
    try:
        document = json.loads(stdout)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
