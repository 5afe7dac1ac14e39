"""What a fence is asked and answers, on standard input and output.

Asked, one line: ``{"node", "volume", "epoch", "options"}``. Answered, one line: ``{"node", "volume", "epoch", "proof"}``, the first
three as they were asked; or, where nothing is proved, ``{"words"}`` and an exit code that says why.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Final, NoReturn
from uuid import UUID

from agent.contract.errors import LandfallError

MAX_LINE_BYTES: Final = 1 << 16


class FenceCode(IntEnum):
    """Exit codes of a fence. Any other is no proof either."""

    FENCED = 0  # and the line on standard output proves it
    ALIVE = 3  # the node is alive and was not fenced
    UNTOLD = 4  # whether it can write cannot be told
    DEVICE_SILENT = 5  # what fences it (hypervisor, power switch, terminal) does not answer
    TOO_LATE = 6  # it took too long
    REFUSED = 7  # its configuration does not allow it, as for a lease on a node that can be paused

    @property
    def sentence(self) -> str:
        """What the code says, for a person."""
        return _SENTENCES[self]


_SENTENCES: Final = {
    FenceCode.FENCED: "fenced",
    FenceCode.ALIVE: "the node is alive and was not fenced",
    FenceCode.UNTOLD: "whether the node can write cannot be told",
    FenceCode.DEVICE_SILENT: "the fencing device does not answer",
    FenceCode.TOO_LATE: "fencing took too long",
    FenceCode.REFUSED: "the configuration does not allow this fence",
}


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What a fence may need beside the node's name; what is not configured is empty."""

    domain: str = ""  # libvirt: the virtual machine
    uri: str = ""  # libvirt: the hypervisor
    directory: str = ""  # lab: its folder
    lease_s: float = 0.0  # lease: the longest that may have been given; 0: perhaps it serves without
    pausable: bool = False  # its clock may stand still while it is not looked at, as a virtual machine's does
    confirmed: str = ""  # manual: the node that an operator named beforehand
    address: str = ""
    ssh_port: int = 22
    ssh_user: str = "root"
    ssh_key: str = ""
    host_key: str = ""
    term: int = 0  # of the management node: ssh-stop gives an order


@dataclass(frozen=True, slots=True)
class FenceRequest:
    """Fence ``node`` off ``volume``: whoever writes it at ``epoch`` or below must not any more."""

    node: str
    volume: UUID
    epoch: int
    options: AgentOptions = AgentOptions()

    def line(self) -> bytes:
        """Return the request as a fence reads it."""
        document = {"node": self.node, "volume": str(self.volume), "epoch": self.epoch, "options": asdict(self.options)}
        return json.dumps(document).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> FenceRequest:
        """Return the request on a line; ValueError if it is none."""
        try:
            document = json.loads(line)
            options = AgentOptions(**document["options"])
            return FenceRequest(str(document["node"]), UUID(document["volume"]), int(document["epoch"]), options)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no request: {error}") from error


class NotFencedError(Exception):
    """A fence could not do it; its code and words."""

    def __init__(self, code: FenceCode, words: str) -> None:
        super().__init__(words)
        self.code = code


def serve(fence: Callable[[FenceRequest], str]) -> NoReturn:
    """Run ``fence`` as a program: it returns the proof, or raises. Whatever else it raises is no proof."""
    said, code = answer(fence, sys.stdin.buffer.readline(MAX_LINE_BYTES))
    sys.stdout.write(said)
    sys.stdout.flush()
    os._exit(code)  # no thread of a library may turn the code into another


def answer(fence: Callable[[FenceRequest], str], line: bytes) -> tuple[str, FenceCode]:
    """Return what a fence says when it is asked with ``line``, and the code it ends with."""
    try:
        request = FenceRequest.from_line(line)
        proof = fence(request)
    except NotFencedError as error:
        return _said({"words": str(error)}), error.code
    except ValueError as error:
        return _said({"words": str(error)}), FenceCode.REFUSED
    except (LandfallError, OSError) as error:
        return _said({"words": str(error)}), FenceCode.UNTOLD
    return _said({"node": request.node, "volume": str(request.volume), "epoch": request.epoch, "proof": proof}), FenceCode.FENCED


def _said(document: dict[str, object]) -> str:
    return json.dumps(document) + "\n"
