"""A replication by a program of its own, as an operator's command is one: the drill hears what it says, and can kill it.

As a program, ``python -m mgmt.drill.sending CONFIGURATION VOLUME DIFFERENTIAL BYTES_PER_SECOND`` says JSON lines, and waits for a line
where it asks::

    {"ordered": TRANSFER}           a generation was taken and nothing of it is sent yet; waits
    {"reached": [ADDRESS, PORT]}    where the receiver listens; waits for {"address", "port"}, where it sends instead
    {"progress": [DONE, TOTAL]}
    {"ended": CODE}                 of the error; "committed" if there was none
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final
from uuid import UUID

from agent.contract import messages as m
from agent.contract.errors import LandfallError
from agent.system.run import start
from mgmt import run as operations
from mgmt.inventory import read_inventory

COMMITTED: Final = "committed"
KILLED: Final = "killed"

Route = Callable[[str, int], tuple[str, int]]


class Sending:
    """A replication under way. The three are called in a thread of their own; ``on_end`` last, with the code."""

    def __init__(
        self,
        configuration: Path,
        volume: str,
        differential: m.Differential,
        rate_bytes_s: int,
        *,
        on_order: Callable[[UUID], None],
        route: Route,
        advance: Callable[[int, int], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._on_order, self._route, self._advance, self._on_end = on_order, route, advance, on_end
        asked, self._answer = os.pipe()
        self._said, says = os.pipe()
        argv = [sys.executable, "-m", "mgmt.drill.sending", str(configuration), volume, differential.value, str(rate_bytes_s)]
        try:
            self._process = start(argv, stdin=asked, stdout=says)
        finally:
            os.close(asked)
            os.close(says)
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._listen, name="sending", daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """End it as a crash does."""
        self._process.kill()

    def ended(self, limit_s: float) -> bool:
        """Whether it ended within the limit."""
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    def _listen(self) -> None:
        code = KILLED
        try:
            with os.fdopen(self._said, "rb") as said, os.fdopen(self._answer, "wb") as answer:
                for line in said:
                    code = self._hear(json.loads(line), answer) or code
        except BaseException as error:
            self.failure = error
            self._process.kill()
        finally:
            self._process.wait()
            self._on_end(code)

    def _hear(self, said: dict[str, Any], answer: IO[bytes]) -> str | None:
        match said:
            case {"ordered": transfer}:
                self._on_order(UUID(transfer))
                _say(answer, {})
            case {"reached": [address, port]}:
                host, port = self._route(address, port)
                _say(answer, {"address": host, "port": port})
            case {"progress": [done, total]}:
                self._advance(done, total)
            case {"ended": code}:
                return str(code)
            case _:
                raise ValueError(f"it says {said}")
        return None


def _say(stream: IO[bytes], document: dict[str, Any]) -> None:
    stream.write(json.dumps(document).encode() + b"\n")
    stream.flush()


def main(configuration: str, volume: str, differential: str, rate: str) -> None:
    """Replicate once, without resuming."""
    said = sys.stdout.buffer

    def ask(document: dict[str, Any]) -> dict[str, Any]:
        _say(said, document)
        answer: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
        return answer

    def route(address: str, port: int) -> tuple[str, int]:
        instead = ask({"reached": [address, port]})
        return instead["address"], instead["port"]

    def on_order(transfer: UUID, built: m.Built | None) -> None:
        ask({"ordered": str(transfer)})

    code = COMMITTED
    with operations.Site(read_inventory(Path(configuration))) as site:
        try:
            operations.replicate(
                site,
                volume,
                differential=m.Differential(differential),
                attempts=1,
                rate_limit_bytes_s=int(rate),
                route=route,
                on_order=on_order,
                tell=lambda node, progress: _say(said, {"progress": [progress.done, progress.total]}),
            )
        except LandfallError as error:
            code = error.code
    _say(said, {"ended": code})


if __name__ == "__main__":
    main(*sys.argv[1:])
