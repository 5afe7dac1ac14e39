"""Events in the order of their time, and tasks that wait for them: one runs at a time, and only where it waits can another go on.

A task is a greenlet that runs code of the product as it is. Everything it can wait for ends here: time, locks, events, answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
import re
from collections.abc import Callable
from random import Random
from typing import Any, Final, TypeVar, cast

from greenlet import getcurrent, greenlet

from agent.system.clock import CLOCK, Clock
from agent.system.failpoint import PASSING
from agent.system.threads import Event, Threads

S: Final = 10**9
R = TypeVar("R")
_BY_CHANCE: Final = re.compile(r"(g\d{8})-[0-9a-f]{8}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Random parts of identities: a log that is compared with another has none."""


class KilledError(BaseException):
    """This process is dead; no code of its own handles that."""


class World:
    """Time, and what is to happen. ``rng`` is the only source of chance."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now_ns = 0
        self.log: list[str] = []
        self.unforeseen: list[str] = []  # errors that nobody handled
        self.watchers: list[Callable[[], None]] = []  # called after every event
        self.processes: list[Process] = []
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0

    def at(self, ns: int, action: Callable[[], None]) -> None:
        """Let something happen at a time; of two at the same time the one that was said first comes first."""
        self._number += 1
        heapq.heappush(self._events, (max(ns, self.now_ns), self._number, action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Let something happen in so many seconds."""
        self.at(self.now_ns + round(seconds * S), action)

    def run(self, until_ns: int, done: Callable[[], bool] = lambda: False) -> None:
        """Let time go by until then, or until ``done``."""
        while self._events and self._events[0][0] <= until_ns and not done():
            self.now_ns, _, action = heapq.heappop(self._events)
            action()
            for watcher in self.watchers:
                watcher()
        if not done():
            self.now_ns = max(self.now_ns, until_ns)

    def say(self, who: str, what: str) -> None:
        """Note something that happened."""
        words = _BY_CHANCE.sub(lambda found: found[1] or "an-id", what)
        self.log.append(f"{self.now_ns / S:10.3f} {who:<14} {words}")

    @property
    def digest(self) -> str:
        """What tells this run's log from another's."""
        return hashlib.sha256("\n".join(self.log).encode()).hexdigest()

    def close(self) -> None:
        """Let nothing of this world be left."""
        for process in list(self.processes):
            process.die()
        self._events.clear()


class Process:
    """A process: its tasks share its life. What it holds open ends with it."""

    def __init__(self, world: World, name: str, clock: Clock) -> None:
        self.world = world
        self.name = name
        self.clock = clock
        self.alive = True
        self.passing: Callable[[str], None] = lambda name: None
        self.at_death: list[Callable[[], None]] = []
        self._stopped: set[str] = set()
        self._tasks: dict[Task, None] = {}
        self._held: list[Callable[[], None]] = []
        world.processes.append(self)

    def start(self, job: Callable[[], None], name: str = "") -> None:
        """Begin a task; it runs as soon as whoever runs now waits."""
        task = Task(self, job, name or self.name)
        self._tasks[task] = None
        self.world.at(self.world.now_ns, task.begin)

    def own(self, descriptor: int) -> int:
        """Close an open file with the process."""
        self.at_death.append(lambda: os.close(descriptor))
        return descriptor

    def stop(self, why: str) -> None:
        """Let it stand still, as by SIGSTOP, or with its machine."""
        self._stopped.add(why)

    def go_on(self, why: str) -> None:
        """Let it go on, if it stands still for no other reason."""
        self._stopped.discard(why)
        if not self._stopped:
            held, self._held = self._held, []
            for act in held:
                self.world.at(self.world.now_ns, lambda act=act: self.when_it_runs(act))  # type: ignore[misc]

    @property
    def stands(self) -> bool:
        """Whether it stands still."""
        return bool(self._stopped)

    def when_it_runs(self, act: Callable[[], None]) -> None:
        """Do something now, or when it goes on."""
        if not self.alive:
            return
        if self._stopped:
            self._held.append(act)
        else:
            act()

    def die(self) -> None:
        """Be dead at once. Nothing of its own code has an effect any more, however it is left."""
        if not self.alive:
            return
        self.alive = False
        self.world.processes.remove(self)
        for act in self.at_death:
            act()
        for task in list(self._tasks):
            if task.glet is not getcurrent():
                task.abandon()
        self._tasks.clear()
        self._held.clear()

    def ended(self, task: Task) -> None:
        """Forget a task that came to its end."""
        self._tasks.pop(task, None)


class Task:
    """One line of work of a process."""

    def __init__(self, process: Process, work: Callable[[], None], name: str) -> None:
        self.process = process
        self.name = name
        self.glet = _Line(self)
        self._work = work
        self._turn = 0
        self._begun = False

    def begin(self) -> None:
        self.process.when_it_runs(self._enter)

    def wait(self, seconds: float | None) -> Any:
        """Return what ``wake`` brings, or None when so much true time went by."""
        if not self.process.alive:
            raise KilledError
        self._turn += 1
        turn = self._turn
        if seconds is not None:
            self.process.world.after(seconds, lambda: self.wake(turn, None))
        parent = self.glet.parent
        assert parent is not None
        found = parent.switch()
        if not self.process.alive:
            raise KilledError
        return found

    @property
    def turn(self) -> int:
        """Tells this waiting from every other of the task."""
        return self._turn

    def wake(self, turn: int, value: Any) -> None:
        """Let it go on, if it still waits for this."""
        if turn == self._turn:
            self._turn += 1
            self.process.when_it_runs(lambda: self._switch(value))

    def abandon(self) -> None:
        """Leave it where it waits."""
        if self._begun and not self.glet.dead:
            self.glet.parent = getcurrent()
            self.glet.throw(KilledError)

    def _enter(self) -> None:
        self._begun = True
        self._switch()

    def _switch(self, *values: Any) -> None:
        self.glet.parent = getcurrent()
        self.glet.switch(*values)

    def run(self) -> None:
        """Be the work of its greenlet."""
        CLOCK.set(self.process.clock)
        PASSING.set(self._pass)
        try:
            self._work()
        except KilledError:
            pass
        except Exception as error:
            if self.process.alive:
                self.process.world.say(self.process.name, f"{self.name} failed: {type(error).__name__}: {error}")
                self.process.world.unforeseen.append(f"{self.process.name}: {self.name} failed: {type(error).__name__}: {error}")
        finally:
            self.process.ended(self)

    def _pass(self, name: str) -> None:
        if not self.process.alive:
            raise KilledError
        self.process.passing(name)
        if not self.process.alive:
            raise KilledError


class _Line(greenlet):
    """The greenlet of a task."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.run)
        self.task = task


def current() -> Task:
    """Return the task that runs."""
    line = getcurrent()
    assert isinstance(line, _Line), "no task runs"
    return line.task


def pause(seconds: float) -> None:
    """Let true time go by for the task that runs; dead processes come no further."""
    current().wait(seconds)


class Mailbox:
    """Something that one task waits for and somebody brings, once."""

    def __init__(self) -> None:
        self._task: Task | None = None
        self._turn = 0
        self._brought: list[Any] = []

    def bring(self, value: Any) -> None:
        """Bring it; what comes second is not looked at."""
        if self._brought:
            return
        self._brought.append(value)
        if self._task is not None:
            self._task.wake(self._turn, True)

    def wait(self, seconds: float | None) -> list[Any]:
        """Return what was brought, in a list; an empty one when so much true time went by."""
        if not self._brought:
            self._task = current()
            self._turn = self._task.turn + 1
            self._task.wait(seconds)
            self._task = None
        return self._brought


class SimEvent:
    """An Event of this world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._set = False
        self._waiting: list[Mailbox] = []

    def set(self) -> None:
        self._set = True
        waiting, self._waiting = self._waiting, []
        for box in waiting:
            self._world.at(self._world.now_ns, lambda box=box: box.bring(True))  # type: ignore[misc]

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        if not self._set:
            box = Mailbox()
            self._waiting.append(box)
            box.wait(timeout)
            with contextlib.suppress(ValueError):
                self._waiting.remove(box)
        return self._set


class SimLock:
    """A lock of this world, which its holder may wait under. It ends with its holder's task."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._held = False
        self._waiting: list[Mailbox] = []

    def __enter__(self) -> SimLock:
        while self._held:
            box = Mailbox()
            self._waiting.append(box)
            box.wait(None)
        self._held = True
        return self

    def __exit__(self, *_: object) -> None:
        self._held = False
        waiting, self._waiting = self._waiting, []
        for box in waiting:
            self._world.at(self._world.now_ns, lambda box=box: box.bring(True))  # type: ignore[misc]


class SimThreads(Threads):
    """Threads of the process whose task runs."""

    def __init__(self, world: World) -> None:
        self._world = world

    def lock(self) -> SimLock:
        return SimLock(self._world)

    def event(self) -> Event:
        return SimEvent(self._world)

    def start(self, work: Callable[[], None], name: str) -> None:
        current().process.start(work, name)

    def beside(self, work: Callable[[], R]) -> Callable[[], R]:
        box = Mailbox()
        world = self._world

        def act() -> None:
            try:
                done: tuple[bool, Any] = (True, work())
            except Exception as error:
                done = (False, error)
            world.at(world.now_ns, lambda: box.bring(done))

        current().process.start(act, "beside")

        def result() -> R:
            ((well, value),) = box.wait(None)
            if not well:
                raise cast(Exception, value)
            return cast(R, value)

        return result
