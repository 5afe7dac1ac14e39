"""Named places where a test makes the process die, raise or wait.

``LANDFALL_FAILPOINTS="transfer.before_commit=kill;recovery.file=raise:3"`` arms them: the action happens at the n-th passing (default 1).
Actions: ``kill`` (SIGKILL to this process, like a crash), ``exit`` (status 99 at once), ``raise`` (FailpointHit), ``stop``
(SIGSTOP to this process: a paused node). They are armed only when LANDFALL_ALLOW_FAILPOINTS=1 is set too, so a stray variable
does nothing on an appliance. Each passing is written to the file named by LANDFALL_FAILPOINT_TRACE, one name a line, so that a
test can prove that a point was reached.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

from agent.contract.errors import FailpointHit

_passed: Counter[str] = Counter()
_lock = threading.Lock()


def failpoint(name: str) -> None:
    """Do nothing, unless a test armed ``name``."""
    PASSING.get()(name)


def _by_environment(name: str) -> None:
    if os.environ.get("LANDFALL_ALLOW_FAILPOINTS") != "1":
        return
    with _lock:
        _passed[name] += 1
        passing = _passed[name]
        trace = os.environ.get("LANDFALL_FAILPOINT_TRACE")
        if trace:
            with open(trace, "a", encoding="utf-8") as file:
                file.write(f"{name}\n")
    for entry in filter(None, os.environ.get("LANDFALL_FAILPOINTS", "").split(";")):
        armed, _, rest = entry.partition("=")
        action, _, nth = rest.partition(":")
        if armed == name and passing == int(nth or 1):
            _act(name, action)


def _act(name: str, action: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(99)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise FailpointHit(f"failpoint {name}")
        case _:
            raise FailpointHit(f"failpoint {name} has the unknown action {action!r}")


PASSING: Final[ContextVar[Callable[[str], None]]] = ContextVar("passing", default=_by_environment)
"""What is done where a failpoint is passed. A variable of the context, so that a simulation places its own."""
