"""The service: cycles until it is told to stop. One works; a second one on the same catalog waits until the first is gone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from agent.contract.errors import DeviceBusy
from agent.system.files import lock_for_life
from mgmt import metrics
from mgmt.inventory import Inventory
from mgmt.run import Site
from mgmt.watch.cycle import Watch

STOP_LIMIT_S = 30.0
"""How long jobs may take to end; what they were doing is resumable."""


def watch(inventory: Inventory, say: Callable[[str], None], *, once: bool = False) -> None:
    """Cycle every ``cycle_s`` until SIGTERM or SIGINT, or once; ``say`` hears a sentence when it is another than in the last cycle.

    If we die anywhere, transfers that run go on between the agents, and the next service finds them there.
    """
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
    jobs: list[threading.Thread] = []
    alone = _alone(inventory, stopping, say)
    if alone is None:
        return
    with Site(inventory) as site:
        watching = Watch(lambda: Site(inventory), lambda job, name: _start(jobs, job, name))
        if inventory.metrics_port:
            metrics.serve(watching, inventory.state_dir, inventory.metrics_address, inventory.metrics_port)
        said: set[str] = set()
        while True:
            sentences = watching.cycle(site)
            for sentence in sentences:
                if sentence not in said:
                    say(sentence)
            said = set(sentences)
            if once or stopping.wait(inventory.cycle_s):
                break
    for job in jobs:
        job.join(None if once else STOP_LIMIT_S)
    os.close(alone)


def _alone(inventory: Inventory, stopping: threading.Event, say: Callable[[str], None]) -> int | None:
    """Return the lock's descriptor once no other service works on this catalog; None if told to stop before."""
    told = False
    while not stopping.is_set():
        try:
            return lock_for_life(inventory.state_dir / "watch.lock")
        except DeviceBusy:
            if not told:
                say("waits: another service watches these volumes.")
                told = True
            stopping.wait(inventory.cycle_s)
    return None


def _start(jobs: list[threading.Thread], job: Callable[[], None], name: str) -> None:
    jobs[:] = [found for found in jobs if found.is_alive()]
    thread = threading.Thread(target=job, name=name, daemon=True)
    jobs.append(thread)
    thread.start()
